"""The one table from `OSError` to the error tree. Its sentences reach clients: none names a path."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from schemas.errors import StoreFull, StoreUnavailable

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})

_UNAVAILABLE: Final = {
    errno.EACCES: "the service may not use the storage folder",
    errno.EPERM: "the service may not use the storage folder",
    errno.EROFS: "the storage folder is read-only",
    errno.EIO: "the disk reports an error",
    errno.ENOENT: "the storage folder is gone",
    errno.ESTALE: "the storage folder is gone",
    errno.ENOTDIR: "something else is where an object belongs",
    errno.EISDIR: "something else is where an object belongs",
    errno.ELOOP: "something else is where an object belongs",
    errno.EMFILE: "the service has too many files open",
    errno.ENFILE: "the machine has too many files open",
}


def store_error(error: OSError) -> StoreFull | StoreUnavailable:
    """What an `OSError` of the storage folder means to a client."""
    if error.errno in _FULL:
        return StoreFull()
    return StoreUnavailable(_UNAVAILABLE.get(error.errno or 0, "the storage folder does not answer"))


@contextmanager
def store_errors() -> Iterator[None]:
    """Translate every `OSError` inside. Raises StoreFull, StoreUnavailable."""
    try:
        yield
    except OSError as error:
        raise store_error(error) from error
