"""The one table from what the minio SDK and urllib3 raise to the error tree. Its sentences reach clients.

    StoreUnavailable
    ├── BucketMissing
    └── NotSupported            the server does not know the operation or the header

S3's code decides where the server sent one, else the HTTP status. No sentence names a key, a host or a secret.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final
from xml.etree.ElementTree import ParseError

from minio.error import InvalidResponseError, MinioException, S3Error, ServerError
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, SSLError

from schemas.errors import StoreFull, StoreUnavailable
from storage.store import InvalidRange, ObjectNotFound, PreconditionFailed, StoreError


class BucketMissing(StoreUnavailable):
    """There is no bucket of the configured name."""


class NotSupported(StoreUnavailable):
    """The server lacks the operation."""


VENDOR_ERRORS: Final = (MinioException, HTTPError, ParseError, ValueError)
"""All that a call of the SDK raises; ValueError and ParseError for an answer that is no S3."""


@dataclass(frozen=True)
class Failure:
    """What one failed request means.

    error: what the caller is told.
    passing: whether the same request may work at once.
    maybe_done: whether the server may have done what was asked all the same.
    """

    error: StoreError | StoreUnavailable | StoreFull
    passing: bool = False
    maybe_done: bool = False


_Meaning = Callable[[], Failure]
"""A new error each time: an error that is raised carries its traceback."""


def _failure(error: Callable[[], StoreError | StoreUnavailable | StoreFull], **kind: bool) -> _Meaning:
    return lambda: Failure(error(), **kind)


def _unavailable(detail: str) -> Callable[[], StoreUnavailable]:
    return lambda: StoreUnavailable(detail)


_FULL = _failure(StoreFull)
_MISSING = _failure(ObjectNotFound)
_LOST = _failure(PreconditionFailed)
_RANGE = _failure(InvalidRange)
_BUSY = _failure(_unavailable("the object store is overloaded or has an error"), passing=True, maybe_done=True)
_CONFLICT = _failure(_unavailable("the object store is busy with the same object"), passing=True)
_DENIED = _failure(_unavailable("the object store refuses the service's credentials"))
_SKEWED = _failure(_unavailable("the clocks of the service and the object store differ too much"))
_ELSEWHERE = _failure(_unavailable("the bucket is in another region"))
_NO_BUCKET = _failure(partial(BucketMissing, "the bucket does not exist"))
_NOT_SUPPORTED = _failure(partial(NotSupported, "the object store does not support what the service needs"))
_REFUSED = _failure(_unavailable("the object store refuses the request"))
_NO_S3 = _failure(_unavailable("what answers is no S3 server"))

_BY_CODE: Final = {
    "NoSuchKey": _MISSING,
    "NoSuchVersion": _MISSING,
    "NoSuchUpload": _MISSING,
    "NoSuchLifecycleConfiguration": _MISSING,
    "NoSuchBucket": _NO_BUCKET,
    "PreconditionFailed": _LOST,
    "BucketAlreadyOwnedByYou": _LOST,
    "BucketAlreadyExists": _DENIED,
    "InvalidRange": _RANGE,
    "QuotaExceeded": _FULL,
    "ServiceQuotaExceeded": _FULL,
    "InsufficientStorage": _FULL,
    "EntityTooLarge": _FULL,
    "XMinioStorageFull": _FULL,
    "XMinioAdminBucketQuotaExceeded": _FULL,
    "ConditionalRequestConflict": _CONFLICT,
    "OperationAborted": _CONFLICT,
    "UnknownError": _CONFLICT,  # with status 500: what Ceph 16 says to the loser of a race at If-Match
    "RequestTimeout": _BUSY,
    "RequestTimeTooSkewed": _SKEWED,
    "PermanentRedirect": _ELSEWHERE,
    "AuthorizationHeaderMalformed": _ELSEWHERE,
    "IllegalLocationConstraintException": _ELSEWHERE,
    "ExpiredToken": _DENIED,
    "InvalidToken": _DENIED,
    "NotImplemented": _NOT_SUPPORTED,
    "MethodNotAllowed": _NOT_SUPPORTED,
}
_BY_STATUS: Final = {
    301: _ELSEWHERE,
    307: _ELSEWHERE,
    401: _DENIED,
    403: _DENIED,
    404: _MISSING,
    405: _NOT_SUPPORTED,
    408: _BUSY,
    409: _CONFLICT,
    412: _LOST,
    413: _FULL,
    416: _RANGE,
    429: _BUSY,
    500: _BUSY,
    501: _NOT_SUPPORTED,
    502: _BUSY,
    503: _BUSY,
    504: _BUSY,
    507: _FULL,
}
_BY_EXCEPTION: Final[tuple[tuple[tuple[type[Exception], ...], _Meaning], ...]] = (
    ((SSLError,), _failure(_unavailable("the object store's certificate is not trusted"))),
    (
        (ConnectTimeoutError, NewConnectionError),
        _failure(_unavailable("the object store can't be reached"), passing=True),
    ),
    ((HTTPError,), _failure(_unavailable("the object store does not answer"), passing=True, maybe_done=True)),
)


def failure(error: Exception) -> Failure:
    """What one of `VENDOR_ERRORS` means."""
    if isinstance(error, S3Error) and error.code in _BY_CODE:
        return _BY_CODE[error.code]()
    if (status := _status(error)) is not None:
        return _BY_STATUS.get(status, _REFUSED)()
    return next((meaning for kinds, meaning in _BY_EXCEPTION if isinstance(error, kinds)), _NO_S3)()


def _status(error: Exception) -> int | None:
    match error:
        case S3Error():
            return error.response.status
        case InvalidResponseError():
            return error._code  # the SDK has no public name for it
        case ServerError():
            return error.status_code
    return None
