"""URLs for the local store: signed, checked, expiring. Knows no object, no file and no HTTP server.

    {public_url}/outputs/{clip_id}/{attempt_token}.mp4|jpg?expires=…[&response-content-disposition=…]&signature=…

The signature is HMAC-SHA256 over the method, the key, the expiry (unix seconds) and the response header,
written as a JSON list, which reads in one way only. Hex, since base64 spells the same bytes in several ways.
"""

import hashlib
import hmac
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Literal
from urllib.parse import quote, urlencode

from schemas.errors import UrlExpired, UrlInvalid
from schemas.requests import MAX_URL_TTL_S
from storage.keys import parse_output_key
from storage.store import PresignedUrl, check_expires_in

EXPIRES: Final = "expires"
SIGNATURE: Final = "signature"
DISPOSITION: Final = "response-content-disposition"
MIN_SECRET_BYTES: Final = 16

_SCHEME: Final = "wan-serve-url-1"
_UNIX_SECONDS: Final = re.compile(r"[1-9][0-9]{0,11}")
_HEX_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_HEADER_VALUE: Final = re.compile(r"[\x20-\x7e]{1,512}")
_METHODS_SIGNED_FOR: Final = {"GET": ("GET",), "HEAD": ("HEAD", "GET")}
"""Who may GET may HEAD, which reveals less; not the other way round."""


@dataclass(frozen=True)
class _SignedQuery:
    expires: str
    signature: str
    disposition: str | None


class LocalPresigner:
    """Signs and verifies URLs below `public_url`; every process with the same secret accepts them.

    Args:
        public_url: where clients reach the service, such as `http://127.0.0.1:8000`.
        secret: at least 16 bytes, used for nothing else (see `storage.secret.derive`).
        now: the clock; aware datetimes.
    """

    def __init__(
        self, public_url: str, secret: bytes, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        if len(secret) < MIN_SECRET_BYTES:
            raise ValueError(f"a signing secret has at least {MIN_SECRET_BYTES} bytes")
        self._public_url = public_url.rstrip("/")
        self._secret = secret
        self._now = now

    def presign(
        self,
        key: str,
        *,
        method: Literal["GET", "HEAD"] = "GET",
        expires_in: timedelta,
        response_content_disposition: str | None = None,
    ) -> PresignedUrl:
        """See `Presigner.presign`. `key`: of a clip or thumbnail. Disposition: 1 to 512 printable ASCII characters."""
        clip_id, name = parse_output_key(key)
        if method not in _METHODS_SIGNED_FOR:
            raise ValueError("only GET and HEAD are signed")
        if response_content_disposition is not None and not _HEADER_VALUE.fullmatch(response_content_disposition):
            raise ValueError("a content disposition is 1 to 512 printable ASCII characters")
        expires = int((self._now() + check_expires_in(expires_in)).timestamp())
        query = {EXPIRES: str(expires)}
        if response_content_disposition is not None:
            query[DISPOSITION] = response_content_disposition
        query[SIGNATURE] = self._sign(method, key, str(expires), response_content_disposition)
        url = f"{self._public_url}/outputs/{clip_id}/{name}?{urlencode(query, quote_via=quote)}"
        return PresignedUrl(url, expires_at=datetime.fromtimestamp(expires, UTC))

    def verify(self, method: str, key: str, query: Iterable[tuple[str, str]]) -> str | None:
        """Check the signed URL of a request. Returns the `Content-Disposition` that was signed, if any.

        Args:
            method: the request's.
            key: of the object that would be sent.
            query: the decoded query, repeated names repeated (Starlette: `query_params.multi_items()`).

        Raises:
            UrlExpired: the signature is right and its time is over.
            UrlInvalid: anything else is wrong, also an expiry more than 7 days ahead. Nothing else is raised.
        """
        signed = _parse(query)
        if not self._is_signed(method, key, signed):
            raise UrlInvalid
        seconds_left = int(signed.expires) - self._now().timestamp()
        if seconds_left > MAX_URL_TTL_S:
            raise UrlInvalid
        if seconds_left <= 0:
            raise UrlExpired
        return signed.disposition

    def _is_signed(self, method: str, key: str, signed: _SignedQuery) -> bool:
        candidates = [
            self._sign(allowed, key, signed.expires, signed.disposition)
            for allowed in _METHODS_SIGNED_FOR.get(method, ())
        ]
        return any([hmac.compare_digest(candidate, signed.signature) for candidate in candidates])

    def _sign(self, method: str, key: str, expires: str, disposition: str | None) -> str:
        message = json.dumps([_SCHEME, method, key, expires, disposition], ensure_ascii=True)
        return hmac.new(self._secret, message.encode("ascii"), hashlib.sha256).hexdigest()


def _parse(query: Iterable[tuple[str, str]]) -> _SignedQuery:
    pairs = list(query)
    values = dict(pairs)
    if len(values) != len(pairs) or not {EXPIRES, SIGNATURE} <= values.keys() <= {
        EXPIRES,
        SIGNATURE,
        DISPOSITION,
    }:
        raise UrlInvalid
    if not _UNIX_SECONDS.fullmatch(values[EXPIRES]) or not _HEX_SHA256.fullmatch(values[SIGNATURE]):
        raise UrlInvalid
    return _SignedQuery(values[EXPIRES], values[SIGNATURE], values.get(DISPOSITION))
