"""The object store in a local folder. Owns atomic writes and compare-and-swap; knows nothing of URLs or HTTP.

    folder/jobs/…  folder/clips/…   the objects, named by their keys
    folder/.tmp/                    what is being written, renamed into place when it is whole and on the disk
    folder/.locks/                  a fixed set of lock files; a key's writers take turns at one of them
    folder/.secret                  see `storage.secret`

No segment of a key begins with a dot, so the hidden names are out of reach. POSIX only (`flock`, `openat`).
"""

import io
import itertools
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Final

from schemas.errors import StoreFull, StoreUnavailable
from storage.folder import (
    file_stat,
    locked,
    make_private_folder,
    open_file,
    prune,
    remove_stale,
    root_folder,
    subfolder,
    temporary_file,
)
from storage.keys import check_key
from storage.listing import keys_in_order
from storage.os_errors import store_errors
from storage.store import (
    MAX_LIST_LIMIT,
    InvalidRange,
    Object,
    ObjectNotFound,
    ObjectStat,
    Page,
    PreconditionFailed,
    check_conditions,
    check_limit,
    check_range,
)

_TEMPORARIES: Final = ".tmp"
_LOCKS: Final = ".locks"
_LOCK_SHARDS: Final = 16
_COPY_BYTES: Final = 1 << 20
_PUBLISH_ATTEMPTS: Final = 16


class LocalStore:
    """An `ObjectStore` in a folder; several processes of one machine may share it.

    Opening it creates the folder and removes what dead processes left half written. It holds no descriptors
    and no state but the folder's path. Raises StoreUnavailable, StoreFull.
    """

    kind = "local"

    def __init__(self, folder: Path) -> None:
        with store_errors():
            make_private_folder(folder)
            self._folder = folder.resolve()
            with self._opened() as root, subfolder(root, [_LOCKS], create=True) as locks:
                for shard in range(_LOCK_SHARDS):  # made now, so that locking needs no space on a full disk
                    with locked(locks, _shard_name(shard)):
                        pass
                with subfolder(root, [_TEMPORARIES], create=True) as temporaries:
                    remove_stale(temporaries, locks)

    def put(
        self, key: str, body: bytes | Path, *, if_none_match: bool = False, if_match: str | None = None
    ) -> ObjectStat:
        """See `ObjectStore.put`. Costs one fsync of the file and one of its folder."""
        names = _names(key)
        check_conditions(if_none_match, if_match)
        with (
            _source(body) as source,
            store_errors(),
            self._opened() as root,
            self._temporary(root) as (temporaries, name, file),
        ):
            _fill(file, source)
            with self._turn(root, key):
                current = file_stat(root, names)
                _check_precondition(current, if_none_match, if_match)
                _outdate(file, current)
                _publish(temporaries, name, root, names)
                return _object_stat(key, os.fstat(file.fileno()))

    def get(self, key: str) -> Object:
        """See `ObjectStore.get`."""
        with store_errors(), self._reading(key) as file:
            stat = os.fstat(file.fileno())
            return Object(file.read(), _object_stat(key, stat))

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """See `ObjectStore.get_range`."""
        check_range(start, end)
        with store_errors(), self._reading(key) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if start >= size_bytes:
                raise InvalidRange
            file.seek(start)
            return file.read(min(end + 1, size_bytes) - start)

    def stat(self, key: str) -> ObjectStat:
        """See `ObjectStore.stat`."""
        names = _names(key)
        with store_errors(), self._opened() as root:
            found = file_stat(root, names)
        if found is None:
            raise ObjectNotFound
        return _object_stat(key, found)

    def path(self, key: str) -> Path:
        """Where the object's bytes are, for a server that sends files itself; no link is on the way there.

        Raises ObjectNotFound.
        """
        self.stat(key)
        return self._folder / key

    def list(self, prefix: str, *, start_after: str | None = None, limit: int = MAX_LIST_LIMIT) -> Page:
        """See `ObjectStore.list`."""
        check_limit(limit)
        with store_errors(), self._opened() as root:
            matches = keys_in_order(root, prefix, start_after or "")
            found = list(itertools.islice(matches, limit + 1))
        stats = tuple(_object_stat(key, stat) for key, stat in found[:limit])
        return Page(stats, next_after=stats[-1].key if len(found) > limit else None)

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`. Folders that it empties go too."""
        *folders, name = names = _names(key)
        with store_errors(), self._opened() as root, self._turn(root, key):
            if file_stat(root, names) is None:
                return
            with subfolder(root, folders) as parent:
                os.unlink(name, dir_fd=parent)
                os.fsync(parent)
            prune(root, folders)

    def check(self) -> None:
        """See `ObjectStore.check`. Writes one byte, waits for no disk."""
        try:
            with store_errors(), self._opened() as root, self._temporary(root) as (_, _, file):
                file.write(b"\0")
                file.flush()
        except StoreFull as full:
            raise StoreUnavailable("there is no space left in the storage folder") from full

    def _opened(self) -> AbstractContextManager[int]:
        return root_folder(self._folder)

    @contextmanager
    def _temporary(self, root: int) -> Iterator[tuple[int, str, BinaryIO]]:
        with (
            subfolder(root, [_TEMPORARIES]) as temporaries,
            subfolder(root, [_LOCKS]) as locks,
            temporary_file(temporaries, locks) as (name, file),
        ):
            yield temporaries, name, file

    @contextmanager
    def _turn(self, root: int, key: str) -> Iterator[None]:
        shard = zlib.crc32(key.encode("ascii")) % _LOCK_SHARDS
        with subfolder(root, [_LOCKS]) as locks, locked(locks, _shard_name(shard)):
            yield

    @contextmanager
    def _reading(self, key: str) -> Iterator[BinaryIO]:
        names = _names(key)
        with self._opened() as root:
            file = open_file(root, names)
        if file is None:
            raise ObjectNotFound
        with file:
            yield file


def _names(key: str) -> list[str]:
    return check_key(key).split("/")


def _shard_name(shard: int) -> str:
    return f"{shard:02d}"


def _source(body: bytes | Path) -> BinaryIO:
    return body.open("rb") if isinstance(body, Path) else io.BytesIO(body)


def _fill(file: BinaryIO, source: BinaryIO) -> None:
    shutil.copyfileobj(source, file, _COPY_BYTES)
    file.flush()
    # The kernel's own time stamps tick every few milliseconds; an ETag needs one that two writes don't share.
    now_ns = time.time_ns()
    os.utime(file.fileno(), ns=(now_ns, now_ns))
    os.fsync(file.fileno())


def _check_precondition(current: os.stat_result | None, if_none_match: bool, if_match: str | None) -> None:
    if if_none_match and current is not None:
        raise PreconditionFailed
    if if_match is not None and (current is None or _etag(current) != if_match):
        raise PreconditionFailed


def _outdate(file: BinaryIO, current: os.stat_result | None) -> None:
    """Make the file newer than what it replaces, also after the clock was set back: no ETag recurs."""
    if current is not None and os.fstat(file.fileno()).st_mtime_ns <= current.st_mtime_ns:
        newer_ns = current.st_mtime_ns + 1
        os.utime(file.fileno(), ns=(newer_ns, newer_ns))


def _publish(temporaries: int, temporary: str, root: int, names: list[str]) -> None:
    """Rename the file into place; again when `delete` pruned the folder in between."""
    for _ in range(_PUBLISH_ATTEMPTS):
        try:
            with subfolder(root, names[:-1], create=True) as parent:
                os.rename(temporary, names[-1], src_dir_fd=temporaries, dst_dir_fd=parent)
                os.fsync(parent)
                return
        except FileNotFoundError:
            continue
    raise StoreUnavailable("the storage folder changes too fast")


def _object_stat(key: str, stat: os.stat_result) -> ObjectStat:
    last_modified = datetime.fromtimestamp(stat.st_mtime, UTC)
    return ObjectStat(key=key, size_bytes=stat.st_size, etag=_etag(stat), last_modified=last_modified)


def _etag(stat: os.stat_result) -> str:
    """Time of the write, size and inode: another one after every write, and no need to read a large clip."""
    return f"{stat.st_mtime_ns:x}-{stat.st_size:x}-{stat.st_ino:x}"
