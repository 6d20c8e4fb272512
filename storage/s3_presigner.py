"""Presigned URLs of an S3 bucket, at the address that clients know. Sends nothing, and knows no object."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Literal

from minio.credentials.credentials import Credentials
from minio.credentials.providers import Provider
from minio.helpers import DictType

from storage.keys import parse_output_key
from storage.s3_client import sdk
from storage.s3_credentials import retrieve
from storage.s3_options import S3Options
from storage.store import PresignedUrl, check_expires_in


class S3Presigner:
    """A `Presigner` for clips, at the address that clients know. It never sends anything.

    Args:
        options: `public_endpoint`, else `endpoint`, is part of each signature.
        credentials: their rights are what a URL's bearer gets, and no longer than they last.
        now: the clock; aware datetimes.
    """

    def __init__(
        self, options: S3Options, credentials: Provider, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._options = options
        self._credentials = credentials
        self._now = now
        self._sdk = sdk(options, options.public_endpoint or options.endpoint, credentials)

    def presign(
        self,
        key: str,
        *,
        method: Literal["GET", "HEAD"] = "GET",
        expires_in: timedelta,
        response_content_disposition: str | None = None,
    ) -> PresignedUrl:
        """See `Presigner.presign`. `key`: of a clip or thumbnail. Disposition: 1 to 512 printable ASCII characters.

        Raises StoreUnavailable when there are no credentials.
        """
        parse_output_key(key)
        if method not in ("GET", "HEAD"):
            raise ValueError("only GET and HEAD are signed")
        began = self._now().astimezone(UTC).replace(microsecond=0)
        lifetime = timedelta(seconds=int(check_expires_in(expires_in).total_seconds()))
        credentials = retrieve(self._credentials)
        url = self._sdk.get_presigned_url(
            method,
            self._options.bucket,
            self._options.prefix + key,
            expires=lifetime,
            response_headers=_response_headers(response_content_disposition),
            request_date=began,
        )
        return PresignedUrl(url, expires_at=_first_end(began + lifetime, credentials))


def _response_headers(disposition: str | None) -> DictType:
    if disposition is None:
        return {}
    if not 1 <= len(disposition) <= 512 or not (disposition.isascii() and disposition.isprintable()):
        raise ValueError("a content disposition is 1 to 512 printable ASCII characters")
    return {"response-content-disposition": disposition}


def _first_end(expires_at: datetime, credentials: Credentials) -> datetime:
    """A URL that is signed with temporary credentials dies with them."""
    if credentials.expiration is None:
        return expires_at
    return min(expires_at, credentials.expiration.replace(tzinfo=UTC, microsecond=0))
