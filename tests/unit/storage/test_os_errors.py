"""What an operating system's error becomes."""

import errno

import pytest

from schemas.errors import StoreFull, StoreUnavailable, WanError
from storage.os_errors import store_errors


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, StoreFull),
        (errno.EDQUOT, StoreFull),
        (errno.EIO, StoreUnavailable),
        (errno.EACCES, StoreUnavailable),
        (errno.EROFS, StoreUnavailable),
        (errno.ENOENT, StoreUnavailable),
        (errno.ENOTCONN, StoreUnavailable),
        (None, StoreUnavailable),
    ],
)
def test_store_errors_translates_and_names_no_path(number: int | None, expected: type[WanError]) -> None:
    cause = OSError(number, "strerror", "/secret/path") if number else OSError("/secret/path")
    with pytest.raises(WanError) as translated, store_errors():
        raise cause
    assert type(translated.value) is expected
    assert translated.value.__cause__ is cause
    assert "secret" not in translated.value.problem().model_dump_json()


def test_store_errors_lets_other_errors_pass() -> None:
    with pytest.raises(KeyError), store_errors():
        raise KeyError("a")
