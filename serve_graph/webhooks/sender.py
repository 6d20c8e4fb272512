"""Sends webhooks: resolve once, check every address, connect to one that was checked. Knows no job and no record.

The URL is a stranger's, so all of this is bounded: the time of an attempt, what is read of an answer, and where it
leads. No redirect is followed, no proxy is taken from the environment, no cookie and no connection is kept: a
connection belongs to the host whose certificate it saw, and httpx's pool would lend it by address.
"""

import asyncio
import random
import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import partial
from logging import INFO, WARNING
from typing import Final

import certifi
import httpx

from schemas.webhook_url import WebhookUrlParts, split_webhook_url
from schemas.webhooks import WebhookDelivery, WebhookError, WebhookEvent
from serve_graph.logs import log_event
from serve_graph.metrics import IngressMetrics
from serve_graph.webhooks.addresses import parse_address
from serve_graph.webhooks.policy import WebhookPolicy
from serve_graph.webhooks.resolver import Resolve, SystemResolver
from serve_graph.webhooks.schedule import Outcome, after
from serve_graph.webhooks.signing import WebhookSigner

MAX_ANSWER_BYTES: Final = 64 * 1024
"""Read of an answer's body, and thrown away; a receiver that writes more finds its connection closed."""

MAX_ADDRESSES: Final = 3
"""Tried in turn while none lets us connect: nothing was sent yet."""

USER_AGENT: Final = "wan-serve"


class _Failed(Exception):
    """An attempt that ends here, with the word for it."""

    def __init__(self, error: WebhookError) -> None:
        super().__init__(error)
        self.error = error


class WebhookSender:
    """One per process; the caller bounds how many attempts run at a time."""

    def __init__(
        self,
        policy: WebhookPolicy,
        signer: WebhookSigner,
        metrics: IngressMetrics,
        *,
        timeout: timedelta = timedelta(seconds=10),
        resolve: Resolve | None = None,
        trust: ssl.SSLContext | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """timeout: of a whole attempt, the name's lookup included. trust: the public authorities where absent."""
        self._policy = policy
        self._signer = signer
        self._metrics = metrics
        self._timeout_s = timeout.total_seconds()
        self._system_resolver = SystemResolver()  # without a thread until it is asked
        self._resolve: Resolve = resolve or self._system_resolver
        self._trust = trust or ssl.create_default_context(cafile=certifi.where())
        self._jitter = jitter

    def close(self) -> None:
        """Let go of the threads that look names up."""
        self._system_resolver.close()

    async def attempt(self, delivery: WebhookDelivery, webhook_id: str, event: WebhookEvent) -> WebhookDelivery:
        """Try once; log it and count it. Returns the delivery to record, which says when to come again."""
        began = time.monotonic()
        outcome = await self.deliver(delivery.url, webhook_id, event)
        tried = after(delivery, outcome, datetime.now(UTC), self._jitter())
        self._metrics.webhook_attempted(tried.state)
        succeeded = tried.state == "delivered"
        log_event(
            "webhook_delivered" if succeeded else "webhook_failed",
            level=INFO if succeeded else WARNING,
            webhook_id=webhook_id,
            type=event.type,
            host=str(split_webhook_url(delivery.url).host),
            state=tried.state,
            attempts=tried.attempts,
            status=tried.last_status,
            error=tried.last_error,
            duration_s=time.monotonic() - began,
        )
        return tried

    async def deliver(self, url: str, webhook_id: str, event: WebhookEvent) -> Outcome:
        """Send one event once. Whatever a receiver, its name or the way to it does is an Outcome and raises nothing."""
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        try:
            async with httpx.AsyncClient(
                transport=httpx.AsyncHTTPTransport(verify=self._trust, trust_env=False),
                trust_env=False,
                follow_redirects=False,
            ) as client:
                async with asyncio.timeout_at(deadline):
                    parts, body = split_webhook_url(url), event.model_dump_json()
                    answer = await self._send(client, parts, webhook_id, body, deadline)
                outcome = _judge(answer, datetime.now(UTC))
                await _read_some(answer, deadline)
                return outcome
        except _Failed as failed:
            return Outcome("failed", error=failed.error)
        except (TimeoutError, httpx.TimeoutException):
            return Outcome("failed", error="timed_out")
        except httpx.ConnectError as error:
            return Outcome("failed", error="tls_failed" if _came_from_tls(error) else "connect_failed")
        except httpx.HTTPError:
            return Outcome("failed", error="broken_answer")

    async def _checked_addresses(self, parts: WebhookUrlParts) -> Sequence[str]:
        """The host's addresses, resolved here and never again. All must be allowed.

        A name with a public and a private address is a mistake or an attempt to get inside, and picking the public one
        would hide either. Raises _Failed.
        """
        if not self._policy.allows_scheme(parts.scheme):
            raise _Failed("url_not_allowed")
        if not isinstance(parts.host, str):
            if not self._policy.allows_address(parts.host):
                raise _Failed("url_not_allowed")
            return [str(parts.host)]
        try:
            found = [parse_address(text) for text in await self._resolve(parts.host, parts.port)]
        except (OSError, ValueError) as error:
            raise _Failed("no_public_address") from error
        if not found or not all(self._policy.allows_address(address) for address in found):
            raise _Failed("no_public_address")
        return [str(address) for address in found[:MAX_ADDRESSES]]

    async def _send(
        self, client: httpx.AsyncClient, parts: WebhookUrlParts, webhook_id: str, body: str, deadline: float
    ) -> httpx.Response:
        """Returns an answer whose body is not read yet.

        TCP and TLS have a share of the remaining time each, for each address, and end before all of it is over:
        httpcore closes its socket when a handshake times out, and not when it is cancelled.
        """
        *others, last = await self._checked_addresses(parts)
        left_s = deadline - asyncio.get_running_loop().time()
        connect_timeout_s = max(left_s, 0.0) / (2 * len(others) + 3)
        send = partial(self._send_to, client, parts, webhook_id, body, connect_timeout_s)
        for address in others:
            with suppress(httpx.ConnectError, httpx.ConnectTimeout):
                return await send(address)
        return await send(last)

    async def _send_to(
        self,
        client: httpx.AsyncClient,
        parts: WebhookUrlParts,
        webhook_id: str,
        body: str,
        connect_timeout_s: float,
        address: str,
    ) -> httpx.Response:
        """Connect to the address and speak to the host: in `Host`, in SNI and in what the certificate must be for."""
        literal = f"[{address}]" if ":" in address else address
        request = client.build_request(
            "POST",
            f"{parts.scheme}://{literal}:{parts.port}{parts.target}",
            content=body.encode(),
            headers={
                "host": parts.authority,
                "content-type": "application/json",
                "user-agent": USER_AGENT,
                "accept-encoding": "identity",
                "connection": "close",
                **self._signer.headers(webhook_id, datetime.now(UTC), body),
            },
            extensions={"sni_hostname": str(parts.host)},
            timeout=httpx.Timeout(self._timeout_s, connect=connect_timeout_s),
        )
        return await client.send(request, stream=True)


def _judge(answer: httpx.Response, now: datetime) -> Outcome:
    status = answer.status_code
    if answer.is_success:
        return Outcome("delivered", status)
    if status == httpx.codes.GONE:
        return Outcome("gone", status, "gone")
    if 300 <= status < 400:
        return Outcome("failed", status, "redirected")
    return Outcome("failed", status, "unexpected_status", _retry_after(answer.headers.get("retry-after", ""), now))


def _retry_after(text: str, now: datetime) -> timedelta | None:
    """Seconds, or a date (RFC 9110, section 10.2.3); None where it is neither, or over. `after` bounds it."""
    if text.isascii() and text.isdigit():
        return timedelta(seconds=int(text[:9]))
    try:
        date = parsedate_to_datetime(text)
        left = (date if date.tzinfo is not None else date.replace(tzinfo=UTC)) - now
    except (ValueError, OverflowError):
        return None
    return left if left > timedelta(0) else None


async def _read_some(answer: httpx.Response, deadline: float) -> None:
    """Take a small answer's body, as it came, and close. The status has decided: no failure here changes it."""
    size_bytes = 0
    with suppress(TimeoutError, httpx.HTTPError):
        async with asyncio.timeout_at(deadline):
            async for chunk in answer.aiter_raw():
                size_bytes += len(chunk)
                if size_bytes >= MAX_ANSWER_BYTES:
                    break
    await answer.aclose()


def _came_from_tls(error: BaseException) -> bool:
    """Whether the handshake failed; httpx has one error for that and for a refused connection."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    return cause is not None
