"""Sends requests to an S3 server through the minio SDK. Owns timeouts, repetition and the error table's use.

Knows no object of ours. The SDK signs, builds URLs and reads errors; its public methods lack conditional
writes, page sizes and lifecycle rules as they are, so the object requests go through `Minio._execute`, which is
private: the version is pinned.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar
from urllib.parse import urlsplit

import certifi
from minio import Minio
from minio.credentials.providers import Provider
from minio.helpers import DictType
from urllib3 import BaseHTTPResponse, PoolManager, Timeout

from storage.s3_credentials import retrieve
from storage.s3_errors import VENDOR_ERRORS, failure
from storage.s3_options import S3Options
from storage.store import PreconditionFailed

_FIRST_PAUSE_S: Final = 0.1
"""Doubles with each repetition."""

_Result = TypeVar("_Result")


class RefusedRepetition(PreconditionFailed):
    """A repeated request was refused, perhaps because an earlier try did the work.

    doubtful: whether an earlier try failed in a way that leaves that open; else it is most unlikely.
    """

    def __init__(self, doubtful: bool) -> None:
        Exception.__init__(self, doubtful)

    def __str__(self) -> str:
        return "a repeated request was refused"

    @property
    def doubtful(self) -> bool:
        return bool(self.args[0])


@dataclass(frozen=True)
class Answer:
    """A success. headers: names in any case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class S3Client:
    """Requests to one bucket. Threads may share it, processes may not.

    Args:
        options: where the bucket is.
        credentials: asked before each request; None sends requests that nobody signed.
    """

    def __init__(self, options: S3Options, credentials: Provider | None) -> None:
        self._options = options
        self._credentials = credentials
        self._sdk = sdk(options, options.endpoint, credentials)

    def send(
        self,
        method: str,
        name: str | None = None,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> Answer:
        """Send a request to the object `name`, or to the bucket, and read the whole answer.

        Raises what `call` raises.
        """

        def execute(client: Minio) -> BaseHTTPResponse:
            fresh: DictType = dict(headers or {})  # the SDK writes the signature into it
            parameters: DictType = dict(query or {})
            return client._execute(method, self._options.bucket, name, body, fresh, parameters)

        response = self.call(execute)
        return Answer(response.status, response.headers, response.data)

    def call(self, operation: Callable[[Minio], _Result]) -> _Result:
        """Do something with the SDK; again when it fails in a way that passes.

        Raises the errors of `storage.s3_errors`, and RefusedRepetition.
        """
        began = time.monotonic()
        maybe_done = False
        attempt = 0
        while True:
            if self._credentials is not None:
                retrieve(self._credentials)
            try:
                return operation(self._sdk)
            except VENDOR_ERRORS as error:
                failed = failure(error)
                if attempt > 0 and isinstance(failed.error, PreconditionFailed):
                    raise RefusedRepetition(maybe_done) from error
                if not failed.passing or not self._may_repeat(attempt, began):
                    raise failed.error from error
                maybe_done = maybe_done or failed.maybe_done
            time.sleep(_FIRST_PAUSE_S * 2**attempt)  # the backoff of a repetition
            attempt += 1

    def _may_repeat(self, attempt: int, began: float) -> bool:
        return attempt < self._options.retries and time.monotonic() - began < self._options.read_timeout_s


def sdk(options: S3Options, endpoint: str, credentials: Provider | None) -> Minio:
    """The SDK's client for one endpoint; making it sends nothing.

    urllib3 repeats nothing: it would wait as long as a server's Retry-After says, and hide a lost answer.
    """
    parts = urlsplit(endpoint)
    pool = PoolManager(
        maxsize=options.max_connections,
        timeout=Timeout(connect=options.connect_timeout_s, read=options.read_timeout_s),
        retries=False,
        cert_reqs="CERT_REQUIRED",
        ca_certs=certifi.where() if options.ca_file is None else str(options.ca_file),
    )
    return Minio(
        parts.netloc, secure=parts.scheme == "https", region=options.region, credentials=credentials, http_client=pool
    )
