"""The service's own secret, and the keys made from it. Knows nothing of what they are used for.

It comes from the environment, or is made once and kept beside the data. A file that others can read is
refused and its mode not repaired, since they may know it by then.
"""

import hashlib
import hmac
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from pydantic import SecretStr

from storage.folder import FILE_MODE, make_private_folder, root_folder
from storage.os_errors import store_errors

FILE_NAME: Final = ".secret"
SECRET_BYTES: Final = 32
MIN_SECRET_CHARS: Final = 16


def load_secret(configured: SecretStr | None, folder: Path) -> bytes:
    """The secret from the environment, else the one kept in `folder`, made if there is none.

    Processes that make it at the same time end up with the same one.

    Raises:
        ValueError: the configured secret is shorter than 16 characters, or the kept one is damaged or can be
            read by others.
        StoreUnavailable, StoreFull: the folder can't be used.
    """
    if configured is not None:
        return _configured_secret(configured.get_secret_value())
    with store_errors():
        make_private_folder(folder)
        path = folder / FILE_NAME
        if not os.path.lexists(path):
            _make(path)
        return _read(path)


def derive(secret: bytes, purpose: str) -> bytes:
    """A key of 32 bytes for one purpose. Keys of different purposes say nothing about each other."""
    return hmac.new(secret, f"wan-serve/{purpose}".encode(), hashlib.sha256).digest()


def _configured_secret(text: str) -> bytes:
    if len(text) < MIN_SECRET_CHARS:
        raise ValueError(f"the configured secret needs at least {MIN_SECRET_CHARS} characters")
    return text.encode()


def _make(path: Path) -> None:
    """Create the file whole or not at all; where another process was first, its file stays."""
    temporary = path.with_name(f"{FILE_NAME}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, FILE_MODE)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, FILE_MODE)
            file.write(secrets.token_bytes(SECRET_BYTES))
            file.flush()
            os.fsync(descriptor)
        with suppress(FileExistsError):
            os.link(temporary, path)
        with root_folder(path.parent) as folder:
            os.fsync(folder)
    finally:
        temporary.unlink()


def _read(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        mode = os.fstat(descriptor).st_mode
        if stat.S_IMODE(mode) & 0o077:
            raise ValueError(
                f"{FILE_NAME} in the storage folder can be read by others: give it mode 0600, or delete it "
                "and lose the URLs signed so far; where modes don't hold, configure the secret"
            )
        secret = file.read(SECRET_BYTES + 1)
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"{FILE_NAME} in the storage folder is damaged: delete it and lose the URLs signed so far")
    return secret
