"""WebhookSender against receivers on loopback: where it connects, what it trusts, what it puts up with."""

import asyncio
import ssl
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

import pytest
import trustme
from prometheus_client import CollectorRegistry
from standardwebhooks import Webhook, WebhookVerificationError
from webhook_receiver import Receiver, Respond, answers, receiving, status

from schemas.webhooks import WebhookDelivery, WebhookEvent, WebhookSubject
from serve_graph.metrics import IngressMetrics, new_registry
from serve_graph.webhooks import sender as sender_module
from serve_graph.webhooks.policy import WebhookPolicy
from serve_graph.webhooks.schedule import Outcome
from serve_graph.webhooks.sender import MAX_ANSWER_BYTES, WebhookSender
from serve_graph.webhooks.signing import WebhookSigner

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OLD_SECRET = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"
HOST = "hooks.example.com"
ID = "msg_job_1"
EVENT = WebhookEvent(
    type="video.completed",
    timestamp=datetime(2026, 11, 25, 12, tzinfo=UTC),
    data=WebhookSubject(id="job_1", state="succeeded", request_id="r1"),
)
OPEN = WebhookPolicy(allow_http=True, allow_private_addresses=True)

MakeSender = Callable[..., WebhookSender]


class Names:
    """A resolver that gives its answers one after the other, the last one for ever, and counts the questions."""

    def __init__(self, *given: Sequence[str]) -> None:
        self._given = list(given)
        self.asked: list[str] = []

    async def __call__(self, name: str, port: int) -> Sequence[str]:
        self.asked.append(name)
        return self._given.pop(0) if len(self._given) > 1 else self._given[0]


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def registry() -> CollectorRegistry:
    return new_registry()


@pytest.fixture
def make_sender(authority: trustme.CA, registry: CollectorRegistry) -> MakeSender:
    metrics = IngressMetrics(registry)

    def make(
        policy: WebhookPolicy = OPEN,
        resolve: Names | None = None,
        secrets: str = SECRET,
        timeout_s: float = 10,
    ) -> WebhookSender:
        trust = ssl.create_default_context()
        authority.configure_trust(trust)
        return WebhookSender(
            policy,
            WebhookSigner(secrets),
            metrics,
            timeout=timedelta(seconds=timeout_s),
            resolve=resolve or Names(["127.0.0.1"]),
            trust=trust,
            jitter=lambda: 0.0,
        )

    return make


async def test_sender_delivers_an_event_that_the_reference_library_verifies(
    authority: trustme.CA, make_sender: MakeSender
) -> None:
    async with receiving(authority=authority) as receiver:
        outcome = await make_sender().deliver(f"https://{HOST}:{receiver.port}/hook?a=b", ID, EVENT)

    assert outcome == Outcome("delivered", 204)
    assert Webhook(SECRET).verify(receiver.bodies[0], receiver.headers[0]) == {
        "type": "video.completed",
        "timestamp": "2026-11-25T12:00:00Z",
        "data": {"id": "job_1", "state": "succeeded", "request_id": "r1"},
    }
    assert receiver.targets == ["/hook?a=b"]
    assert receiver.headers[0]["webhook-id"] == ID
    assert receiver.headers[0]["content-type"] == "application/json"


async def test_sender_names_the_host_in_sni_and_host_and_connects_to_the_address(
    authority: trustme.CA, make_sender: MakeSender
) -> None:
    async with receiving(authority=authority) as receiver:
        await make_sender().deliver(f"https://Hooks.Example.com:{receiver.port}/", ID, EVENT)

    assert receiver.sni == [HOST]
    assert receiver.headers[0]["host"] == f"Hooks.Example.com:{receiver.port}"


async def test_sender_signs_with_every_secret_while_they_are_rotated(
    authority: trustme.CA, make_sender: MakeSender
) -> None:
    async with receiving(authority=authority) as receiver:
        await make_sender(secrets=f"{SECRET} {OLD_SECRET}").deliver(f"https://{HOST}:{receiver.port}/", ID, EVENT)

    for secret in (SECRET, OLD_SECRET):
        Webhook(secret).verify(receiver.bodies[0], receiver.headers[0])
    with pytest.raises(WebhookVerificationError):
        Webhook("whsec_" + "A" * 32).verify(receiver.bodies[0], receiver.headers[0])


async def test_two_attempts_have_one_id_and_one_body(authority: trustme.CA, make_sender: MakeSender) -> None:
    async with receiving(status(500), authority=authority) as receiver:
        sender = make_sender()
        for _ in range(2):
            await sender.deliver(f"https://{HOST}:{receiver.port}/", ID, EVENT)

    assert receiver.bodies[0] == receiver.bodies[1]
    assert [headers["webhook-id"] for headers in receiver.headers] == [ID, ID]


async def test_sender_refuses_a_certificate_for_another_name(authority: trustme.CA, make_sender: MakeSender) -> None:
    async with receiving(authority=authority, certificate_for="other.example.com") as receiver:
        outcome = await make_sender().deliver(f"https://{HOST}:{receiver.port}/", ID, EVENT)

    assert outcome == Outcome("failed", error="tls_failed")
    assert receiver.bodies == []


async def test_sender_refuses_a_certificate_of_an_unknown_authority(make_sender: MakeSender) -> None:
    async with receiving(authority=trustme.CA()) as receiver:
        outcome = await make_sender().deliver(f"https://{HOST}:{receiver.port}/", ID, EVENT)

    assert outcome == Outcome("failed", error="tls_failed")
    assert receiver.bodies == []


async def test_sender_accepts_a_certificate_for_an_address(authority: trustme.CA, make_sender: MakeSender) -> None:
    async with receiving(authority=authority, certificate_for="127.0.0.1") as receiver:
        outcome = await make_sender().deliver(f"https://127.0.0.1:{receiver.port}/", ID, EVENT)

    assert outcome.kind == "delivered"


async def test_sender_reaches_an_ipv6_address(authority: trustme.CA, make_sender: MakeSender) -> None:
    async with receiving(authority=authority, certificate_for="::1", address="::1") as receiver:
        outcome = await make_sender().deliver(f"https://[::1]:{receiver.port}/", ID, EVENT)

    assert outcome.kind == "delivered"
    assert receiver.headers[0]["host"] == f"[::1]:{receiver.port}"


async def test_hosts_behind_one_address_share_no_connection(authority: trustme.CA, make_sender: MakeSender) -> None:
    keeps_open = answers(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: keep-alive\r\n\r\n")
    async with receiving(keeps_open, authority=authority) as receiver:
        sender = make_sender()
        ours = await sender.deliver(f"https://{HOST}:{receiver.port}/", ID, EVENT)
        theirs = await sender.deliver(f"https://other.example.com:{receiver.port}/", ID, EVENT)

    assert (ours.kind, theirs.error) == ("delivered", "tls_failed")


async def test_a_name_is_resolved_once_so_a_second_answer_is_never_asked_for(
    authority: trustme.CA, make_sender: MakeSender
) -> None:
    rebinding = Names(["127.0.0.1"], ["169.254.169.254"])
    async with receiving(authority=authority) as receiver:
        outcome = await make_sender(resolve=rebinding).deliver(f"https://{HOST}:{receiver.port}/", ID, EVENT)

    assert outcome.kind == "delivered"
    assert rebinding.asked == [HOST]


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["8.8.8.8", "127.0.0.1"],
        ["2001:4860:4860::8888", "::ffff:127.0.0.1"],
        ["fe80::1%1"],
        ["not an address"],
        [],
    ],
    ids=lambda addresses: ",".join(addresses) or "none",
)
async def test_sender_connects_nowhere_when_any_address_is_not_public(
    authority: trustme.CA, make_sender: MakeSender, addresses: list[str]
) -> None:
    async with receiving(authority=authority) as receiver:
        sender = make_sender(WebhookPolicy(), Names(addresses))
        outcome = await sender.deliver(f"https://{HOST}:{receiver.port}/", ID, EVENT)

    assert outcome == Outcome("failed", error="no_public_address")
    assert receiver.connections == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "169.254.169.254"])
async def test_sender_refuses_an_address_that_its_policy_no_longer_allows(make_sender: MakeSender, host: str) -> None:
    names = Names([])

    outcome = await make_sender(WebhookPolicy(), names).deliver(f"https://{host}/", ID, EVENT)

    assert outcome == Outcome("failed", error="url_not_allowed")
    assert names.asked == []


async def test_sender_speaks_no_http_unless_allowed(make_sender: MakeSender) -> None:
    async with receiving() as receiver:
        url = f"http://{HOST}:{receiver.port}/"
        refused = await make_sender(WebhookPolicy(allow_private_addresses=True)).deliver(url, ID, EVENT)
        allowed = await make_sender().deliver(url, ID, EVENT)

    assert refused == Outcome("failed", error="url_not_allowed")
    assert allowed.kind == "delivered"
    assert receiver.connections == 1


async def test_sender_tries_the_next_address_when_one_does_not_let_it_connect(
    authority: trustme.CA, make_sender: MakeSender
) -> None:
    async with receiving(authority=authority) as receiver:
        sender = make_sender(resolve=Names(["127.0.0.2", "127.0.0.1"]))
        outcome = await sender.deliver(f"https://{HOST}:{receiver.port}/", ID, EVENT)

    assert outcome.kind == "delivered"
    assert receiver.connections == 1


async def test_sender_says_when_nobody_listens(make_sender: MakeSender) -> None:
    async with receiving() as receiver:
        pass

    outcome = await make_sender().deliver(f"https://{HOST}:{receiver.port}/", ID, EVENT)

    assert outcome == Outcome("failed", error="connect_failed")


async def test_sender_follows_no_redirect(make_sender: MakeSender) -> None:
    async with receiving() as inside:
        redirect = status(307, f"Location: http://127.0.0.1:{inside.port}/")
        async with receiving(redirect) as receiver:
            outcome = await make_sender().deliver(f"http://{HOST}:{receiver.port}/", ID, EVENT)

    assert outcome == Outcome("failed", 307, "redirected")
    assert inside.connections == 0


async def test_sender_ignores_proxies_of_the_environment(
    make_sender: MakeSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with receiving() as proxy, receiving() as receiver:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        outcome = await make_sender().deliver(f"http://{HOST}:{receiver.port}/", ID, EVENT)

    assert outcome.kind == "delivered"
    assert (proxy.connections, receiver.connections) == (0, 1)


async def silence(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


async def one_byte_at_a_time(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"H")
        await writer.drain()
        await asyncio.sleep(0.05)


async def endless_head(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X: " + b"y" * 1_000 + b"\r\n")
        await writer.drain()


async def endless_interim_answers(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("respond", [silence, one_byte_at_a_time, endless_interim_answers])
async def test_sender_gives_a_slow_receiver_so_much_time_and_no_more(make_sender: MakeSender, respond: Respond) -> None:
    async with receiving(respond) as receiver:
        began = time.monotonic()
        outcome = await make_sender(timeout_s=0.5).deliver(f"http://{HOST}:{receiver.port}/", ID, EVENT)
        took_s = time.monotonic() - began

    assert outcome == Outcome("failed", error="timed_out")
    assert took_s < 2


async def test_sender_takes_no_endless_head(make_sender: MakeSender) -> None:
    async with receiving(endless_head) as receiver:
        outcome = await make_sender().deliver(f"http://{HOST}:{receiver.port}/", ID, EVENT)

    assert outcome == Outcome("failed", error="broken_answer")


async def test_a_silent_handshake_is_cut(make_sender: MakeSender) -> None:
    async with receiving(silence) as receiver:  # speaks no TLS: it waits for a request's first line
        outcome = await make_sender(timeout_s=0.5).deliver(f"https://{HOST}:{receiver.port}/", ID, EVENT)

    assert outcome == Outcome("failed", error="timed_out")


async def test_a_silent_name_server_is_cut(make_sender: MakeSender, authority: trustme.CA) -> None:
    class Silent(Names):
        async def __call__(self, name: str, port: int) -> Sequence[str]:
            await asyncio.sleep(60)
            return []

    outcome = await make_sender(resolve=Silent([]), timeout_s=0.2).deliver(f"https://{HOST}/", ID, EVENT)

    assert outcome == Outcome("failed", error="timed_out")


async def test_sender_closes_an_endless_body_and_trusts_the_status(make_sender: MakeSender) -> None:
    sent = 0

    async def endless(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b"x" * 65_536)
            sent += 65_536
            await writer.drain()

    async with receiving(endless) as receiver:
        began = time.monotonic()
        outcome = await make_sender().deliver(f"http://{HOST}:{receiver.port}/", ID, EVENT)
        took_s = time.monotonic() - began

    assert outcome == Outcome("delivered", 200)
    assert took_s < 2
    assert sent < MAX_ANSWER_BYTES + 16 * 2**20  # what the kernel's buffers swallowed


async def test_a_body_that_drips_past_the_time_limit_does_not_undo_a_success(make_sender: MakeSender) -> None:
    async def drips(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    async with receiving(drips) as receiver:
        began = time.monotonic()
        outcome = await make_sender(timeout_s=0.5).deliver(f"http://{HOST}:{receiver.port}/", ID, EVENT)
        took_s = time.monotonic() - began

    assert outcome == Outcome("delivered", 200)
    assert took_s < 2


async def test_a_compressed_body_is_not_unpacked(make_sender: MakeSender) -> None:
    packed = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnope"
    async with receiving(answers(packed)) as receiver:
        outcome = await make_sender().deliver(f"http://{HOST}:{receiver.port}/", ID, EVENT)

    assert outcome.kind == "delivered"
    assert receiver.headers[0]["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    ("respond", "outcome"),
    [
        (status(200), Outcome("delivered", 200)),
        (status(400), Outcome("failed", 400, "unexpected_status")),
        (status(410), Outcome("gone", 410, "gone")),
        (status(429, "Retry-After: 7"), Outcome("failed", 429, "unexpected_status", timedelta(seconds=7))),
        (status(503, "Retry-After: soon"), Outcome("failed", 503, "unexpected_status")),
        (status(503, "Retry-After: -1"), Outcome("failed", 503, "unexpected_status")),
        (
            status(503, "Retry-After: Fri, 31 Dec 2100 23:59:59 +" + "9" * 20),
            Outcome("failed", 503, "unexpected_status"),
        ),
        (status(503, "Retry-After: Wed, 21 Oct 2015 07:28:00 GMT"), Outcome("failed", 503, "unexpected_status")),
        (answers(b"nonsense\r\n\r\n"), Outcome("failed", error="broken_answer")),
        (answers(b""), Outcome("failed", error="broken_answer")),
    ],
)
async def test_sender_judges_an_answer(make_sender: MakeSender, respond: Respond, outcome: Outcome) -> None:
    async with receiving(respond) as receiver:
        assert await make_sender().deliver(f"http://{HOST}:{receiver.port}/", ID, EVENT) == outcome


@pytest.mark.parametrize("digits", ["9" * 400, "1" + "0" * 30])
async def test_a_huge_retry_after_is_no_error(make_sender: MakeSender, digits: str) -> None:
    async with receiving(status(503, f"Retry-After: {digits}")) as receiver:
        outcome = await make_sender().deliver(f"http://{HOST}:{receiver.port}/", ID, EVENT)

    assert outcome.retry_after is not None
    assert outcome.retry_after > timedelta(days=1)


async def test_a_retry_after_may_be_a_date(make_sender: MakeSender) -> None:
    async with receiving(status(503, "Retry-After: Fri, 31 Dec 2100 23:59:59 GMT")) as receiver:
        outcome = await make_sender().deliver(f"http://{HOST}:{receiver.port}/", ID, EVENT)

    assert outcome.retry_after is not None
    assert outcome.retry_after > timedelta(days=365)


async def test_system_resolver_finds_this_machine_and_ends_where_there_is_no_name(registry: CollectorRegistry) -> None:
    sender = WebhookSender(OPEN, WebhookSigner(SECRET), IngressMetrics(registry))
    try:
        async with receiving() as receiver:
            found = await sender.deliver(f"http://localhost:{receiver.port}/", ID, EVENT)
        lost = await sender.deliver("http://nowhere.invalid/", ID, EVENT)
    finally:
        sender.close()

    assert found.kind == "delivered"
    assert lost.error == "no_public_address"


async def attempt(
    sender: WebhookSender, respond: Respond | None, delivery: WebhookDelivery | None = None
) -> tuple[WebhookDelivery, Receiver]:
    async with receiving(respond) as receiver:
        url = f"http://{HOST}:{receiver.port}/secret-path?token=secret-token"
        tried = await sender.attempt(delivery or WebhookDelivery(url=url), ID, EVENT)
    return tried, receiver


async def test_attempt_records_logs_and_counts_a_delivery(
    make_sender: MakeSender, registry: CollectorRegistry, events: list[tuple[str, dict[str, object]]]
) -> None:
    tried, _ = await attempt(make_sender(), None)

    assert (tried.state, tried.attempts, tried.last_status, tried.last_error) == ("delivered", 1, 204, None)
    assert tried.delivered_at is not None
    assert registry.get_sample_value("wan_webhook_deliveries_total", {"outcome": "delivered"}) == 1
    assert [name for name, _ in events] == ["webhook_delivered"]
    assert events[0][1]["host"] == HOST


async def test_attempt_records_logs_and_counts_a_failure(
    make_sender: MakeSender, registry: CollectorRegistry, events: list[tuple[str, dict[str, object]]]
) -> None:
    tried, _ = await attempt(make_sender(), answers(b"HTTP/1.1 500 secret-reason\r\nContent-Length: 3\r\n\r\nbad"))

    assert (tried.state, tried.attempts, tried.last_status) == ("waiting", 1, 500)
    assert tried.next_attempt_at is not None
    assert registry.get_sample_value("wan_webhook_deliveries_total", {"outcome": "failed"}) == 1
    assert [name for name, _ in events] == ["webhook_failed"]
    assert "secret" not in f"{events} {tried.model_copy(update={'url': ''})}"


async def test_attempt_gives_up_at_410(make_sender: MakeSender, registry: CollectorRegistry) -> None:
    tried, _ = await attempt(make_sender(), status(410))

    assert (tried.state, tried.last_error, tried.next_attempt_at) == ("given_up", "gone", None)
    assert registry.get_sample_value("wan_webhook_deliveries_total", {"outcome": "given_up"}) == 1


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, object]]]:
    seen: list[tuple[str, dict[str, object]]] = []
    monkeypatch.setattr(sender_module, "log_event", lambda event, **fields: seen.append((event, fields)))
    return seen
