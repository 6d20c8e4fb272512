"""Private files and folders by descriptor, opened segment by segment past no symbolic link. Knows no objects.

Owns the mode bits (0700 and 0600, whatever the umask), locks that hold between threads and processes, and
temporary files that outlive a crash only until the next `remove_stale`. Everything raises plain `OSError`.
"""

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

FILE_MODE: Final = 0o600
FOLDER_MODE: Final = 0o700
NOT_A_FILE: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR})
"""What the kernel answers where there is no regular file, or where the way to it is no chain of folders."""

_FOLDER_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY
_CREATION_LOCK: Final = "temporary"


def make_private_folder(path: Path) -> None:
    """Create `path` with mode 0700, and its parents; one that exists keeps its mode."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return
    path.chmod(FOLDER_MODE)


@contextmanager
def root_folder(path: Path) -> Iterator[int]:
    """Open the one folder that may be reached through symbolic links, since its user named it."""
    descriptor = os.open(path, _FOLDER_FLAGS)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def subfolder(root: int, names: Sequence[str], *, create: bool = False) -> Iterator[int]:
    """Open the folder at `names` below `root`, one segment at a time."""
    descriptor = os.dup(root)
    try:
        for name in names:
            child = _enter(descriptor, name, create)
            os.close(descriptor)
            descriptor = child
        yield descriptor
    finally:
        os.close(descriptor)


def _enter(parent: int, name: str, create: bool) -> int:
    flags = _FOLDER_FLAGS | os.O_NOFOLLOW
    try:
        return os.open(name, flags, dir_fd=parent)
    except FileNotFoundError:
        if not create:
            raise
    with suppress(FileExistsError):
        os.mkdir(name, FOLDER_MODE, dir_fd=parent)
        os.chmod(name, FOLDER_MODE, dir_fd=parent)
        os.fsync(parent)
    return os.open(name, flags, dir_fd=parent)


def prune(root: int, names: Sequence[str]) -> None:
    """Remove the folder at `names` and those above it, up to `root`, as far as they are empty."""
    for depth in range(len(names), 0, -1):
        try:
            with subfolder(root, names[: depth - 1]) as parent:
                os.rmdir(names[depth - 1], dir_fd=parent)
        except OSError as error:
            if error.errno in NOT_A_FILE | {errno.ENOTEMPTY, errno.EEXIST}:
                return
            raise


def file_stat(root: int, names: Sequence[str]) -> os.stat_result | None:
    """The stat of the regular file at `names` below `root`; None where there is no such file."""
    try:
        with subfolder(root, names[:-1]) as parent:
            found = os.stat(names[-1], dir_fd=parent, follow_symlinks=False)
    except OSError as error:
        if error.errno in NOT_A_FILE:
            return None
        raise
    return found if stat.S_ISREG(found.st_mode) else None


def open_file(root: int, names: Sequence[str]) -> BinaryIO | None:
    """Open the regular file at `names` below `root` for reading; None where there is no such file."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # not blocked by a FIFO that someone put there
    try:
        with subfolder(root, names[:-1]) as parent:
            descriptor = os.open(names[-1], flags, dir_fd=parent)
    except OSError as error:
        if error.errno in NOT_A_FILE:
            return None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        return None
    return os.fdopen(descriptor, "rb")


@contextmanager
def locked(locks: int, name: str, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock file `name` in the folder `locks`; waits. The kernel frees it when the process dies.

    Each call opens the file anew, so the lock also excludes the threads of one process from each other.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    descriptor = os.open(name, flags, FILE_MODE, dir_fd=locks)
    try:
        os.fchmod(descriptor, FILE_MODE)
        fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        # Closing alone may not unlock: a child forked meanwhile shares the descriptor.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


@contextmanager
def temporary_file(temporaries: int, locks: int) -> Iterator[tuple[str, BinaryIO]]:
    """A new file in the folder `temporaries` under a random name, locked while it is open, gone afterwards.

    The caller keeps it by renaming it.
    """
    name = secrets.token_hex(16)
    try:
        with _create_locked(temporaries, locks, name) as file:
            yield name, file
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=temporaries)


def _create_locked(temporaries: int, locks: int, name: str) -> BinaryIO:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with locked(locks, _CREATION_LOCK, shared=True):  # `remove_stale` must not see it before it is locked
        file = os.fdopen(os.open(name, flags, FILE_MODE, dir_fd=temporaries), "wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            os.fchmod(file.fileno(), FILE_MODE)
        except OSError:
            file.close()
            raise
    return file


def remove_stale(temporaries: int, locks: int) -> None:
    """Remove the temporary files of dead processes: those that nobody holds locked."""
    with locked(locks, _CREATION_LOCK):
        for name in os.listdir(temporaries):
            with suppress(FileNotFoundError):  # its owner finished it
                _remove_unless_locked(temporaries, name)


def _remove_unless_locked(temporaries: int, name: str) -> None:
    descriptor = os.open(name, os.O_RDWR | os.O_NOFOLLOW, dir_fd=temporaries)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    else:
        os.unlink(name, dir_fd=temporaries)
    finally:
        os.close(descriptor)
