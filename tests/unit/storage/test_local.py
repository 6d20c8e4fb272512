"""What is the local folder's own: modes, links, temporary files, full disks. The rest is in the contract."""

import errno
import os
import pickle
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import storage
from schemas.errors import StoreFull, StoreUnavailable
from storage.folder import root_folder, subfolder, temporary_file
from storage.keys import clip_key
from storage.local import LocalStore
from storage.store import ObjectNotFound, PreconditionFailed

KEY = clip_key("clip_" + "a" * 32, "token")
SMALL_DISK_BYTES = 256 * 1024
DIE_BEFORE_RENAME = """
import os, pathlib, sys
from storage.local import LocalStore
store = LocalStore(pathlib.Path(sys.argv[1]))
os.rename = lambda *args, **kwargs: os._exit(77)
store.put("a", b"x" * 100_000)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(folder: Path) -> LocalStore:
    return LocalStore(folder)


def temporaries(folder: Path) -> list[Path]:
    return list((folder / ".tmp").iterdir())


@pytest.fixture
def umask() -> Iterator[Callable[[int], None]]:
    before = os.umask(0)
    yield lambda mask: (os.umask(mask), None)[1]
    os.umask(before)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o277])
def test_put_makes_everything_private_whatever_the_umask(folder: Path, umask: Callable[[int], None], mask: int) -> None:
    umask(mask)
    LocalStore(folder).put(KEY, b"body")
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}
    assert {modes[path] for path in modes if path.is_dir()} == {0o700}
    assert {modes[path] for path in modes if path.is_file()} == {0o600}
    assert folder / KEY in modes


def test_open_keeps_the_mode_of_a_folder_that_exists(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o750)
    LocalStore(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750


def test_open_accepts_a_folder_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "store").symlink_to(tmp_path / "disk")
    LocalStore(tmp_path / "store").put(KEY, b"body")
    assert (tmp_path / "disk" / KEY).read_bytes() == b"body"


def test_open_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreUnavailable):
        LocalStore(tmp_path / "file")


def test_store_crosses_a_process_boundary(store: LocalStore) -> None:
    store.put("a", b"body")
    assert pickle.loads(pickle.dumps(store)).get("a").body == b"body"  # noqa: S301  # made one line before


def test_reads_follow_no_link(store: LocalStore, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a.mp4").write_bytes(b"outside")
    (folder / "linked").symlink_to(tmp_path / "outside")
    (folder / "a.mp4").symlink_to(tmp_path / "outside" / "a.mp4")
    for key in ("linked/a.mp4", "a.mp4"):
        for read in (store.get, store.stat, store.path):
            with pytest.raises(ObjectNotFound):
                read(key)
    assert store.list("").stats == ()


def test_writes_follow_no_link(store: LocalStore, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a").write_bytes(b"outside")
    (folder / "linked").symlink_to(tmp_path / "outside")
    (folder / "a").symlink_to(tmp_path / "outside" / "a")
    with pytest.raises(StoreUnavailable):
        store.put("linked/a", b"body")
    store.delete("linked/a")
    store.put("a", b"body")
    assert (tmp_path / "outside" / "a").read_bytes() == b"outside"
    assert not (folder / "a").is_symlink()
    assert temporaries(folder) == []


def test_reads_do_not_wait_for_a_pipe(store: LocalStore, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(ObjectNotFound):
        store.get("pipe")


def test_put_refuses_a_key_below_an_object(store: LocalStore, folder: Path) -> None:
    store.put("a", b"body")
    with pytest.raises(StoreUnavailable):
        store.put("a/b", b"body")
    with pytest.raises(StoreUnavailable):
        store.put("a/b/c", b"body")
    assert store.get("a").body == b"body"
    assert temporaries(folder) == []


def test_path_leads_to_the_bytes(store: LocalStore, folder: Path) -> None:
    store.put(KEY, b"body")
    assert store.path(KEY) == folder / KEY
    assert store.path(KEY).read_bytes() == b"body"


def test_list_leaves_out_what_is_no_object(store: LocalStore, folder: Path) -> None:
    store.put("a/b", b"")
    (folder / "a" / ".hidden").write_bytes(b"")
    (folder / "a" / "not a key").write_bytes(b"")
    (folder / "a" / "not a folder").mkdir()
    (folder / "a" / "not a folder" / "c").write_bytes(b"")
    os.mkfifo(folder / "a" / "pipe")
    assert [found.key for found in store.list("").stats] == ["a/b"]


def test_delete_removes_the_folders_it_emptied(store: LocalStore, folder: Path) -> None:
    store.put("a/b/c", b"")
    store.put("a/d", b"")
    store.delete("a/b/c")
    assert [path.name for path in (folder / "a").iterdir()] == ["d"]


def test_put_survives_folders_that_delete_removes(store: LocalStore) -> None:
    stop = threading.Event()

    def churn() -> int:
        rounds = 0
        while not stop.is_set():
            store.put("a/b/other", b"")
            store.delete("a/b/other")
            rounds += 1
        return rounds

    with ThreadPoolExecutor(1) as pool:
        churning = pool.submit(churn)
        for number in range(100):
            store.put("a/b/mine", b"%d" % number)
            assert store.get("a/b/mine").body == b"%d" % number
            store.delete("a/b/mine")
        stop.set()
        assert churning.result() > 0


def test_put_repeats_the_rename_when_its_folder_is_pruned(
    store: LocalStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, parent = os.rename, folder / "a" / "b"
    pruned: list[Path] = []

    def prune_first(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        if not pruned:
            parent.rmdir()
            pruned.append(parent)
        rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr("os.rename", prune_first)
    store.put("a/b/c", b"body")
    assert pruned == [parent]
    assert store.get("a/b/c").body == b"body"


def test_compare_and_swap_loses_no_update_between_threads(store: LocalStore) -> None:
    store.put("counter", b"0")

    def increment(_number: int) -> None:
        while True:
            found = store.get("counter")
            try:
                store.put("counter", str(int(found.body) + 1).encode(), if_match=found.stat.etag)
            except PreconditionFailed:
                continue
            return

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(increment, range(64)))
    assert store.get("counter").body == b"64"


def test_etag_never_recurs_while_the_clock_stands_still(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time_ns", lambda: 1_790_000_000_000_000_000)
    etags = [store.put("a", b"same size").etag for _ in range(30)]
    assert len(set(etags)) == 30


def test_etag_changes_when_the_clock_is_set_back(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first = store.put("a", b"1")
    monkeypatch.setattr("time.time_ns", lambda: 1_000_000_000)
    second = store.put("a", b"2", if_match=first.etag)
    with pytest.raises(PreconditionFailed):
        store.put("a", b"3", if_match=first.etag)
    assert store.get("a").stat == second


def test_put_waits_for_the_disk_twice(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    first = store.put("jobs/a", b"1")
    synced = []
    monkeypatch.setattr("os.fsync", lambda fd: synced.append(stat.S_ISDIR(os.fstat(fd).st_mode)))
    store.put("jobs/a", b"2", if_match=first.etag)
    assert synced == [False, True]  # the file, then its folder


def test_open_removes_what_a_dead_process_left(store: LocalStore, folder: Path) -> None:
    died = subprocess.run(
        [sys.executable, "-c", DIE_BEFORE_RENAME, str(folder)],
        env={"PYTHONPATH": str(Path(storage.__file__).parents[1])},
        check=False,
    )
    assert died.returncode == 77
    (left,) = temporaries(folder)
    assert left.stat().st_size == 100_000
    assert store.list("").stats == ()
    LocalStore(folder)
    assert temporaries(folder) == []


def test_open_spares_what_a_live_writer_holds(store: LocalStore, folder: Path) -> None:
    with (
        root_folder(folder) as root,
        subfolder(root, [".tmp"]) as temporary,
        subfolder(root, [".locks"]) as locks,
        temporary_file(temporary, locks) as (name, file),
    ):
        LocalStore(folder)
        assert [path.name for path in temporaries(folder)] == [name]
        file.write(b"still writable")
    assert temporaries(folder) == []


def test_open_never_disturbs_writers(folder: Path) -> None:
    store = LocalStore(folder)
    stop = threading.Event()

    def reopen() -> int:
        rounds = 0
        while not stop.is_set():
            LocalStore(folder)
            rounds += 1
        return rounds

    with ThreadPoolExecutor(1) as pool:
        reopening = pool.submit(reopen)
        for number in range(100):
            store.put(f"a/{number}", b"body")
        stop.set()
        assert reopening.result() > 0
    assert len(store.list("").stats) == 100


def test_put_passes_on_that_its_source_is_missing(store: LocalStore, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store.put(KEY, tmp_path / "missing.mp4")
    assert temporaries(folder) == []


def test_locks_stay_few(store: LocalStore, folder: Path) -> None:
    before = sorted((folder / ".locks").iterdir())
    for number in range(50):
        store.put(f"a/{number}", b"")
    assert sorted((folder / ".locks").iterdir()) == before


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on a disk of 256 kB; where mounting is not allowed, larger writes fail at fsync instead."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={SMALL_DISK_BYTES}", "tmpfs"]
    mounted = os.geteuid() == 0 and subprocess.run(["mount", *options, disk], check=False).returncode == 0
    if not mounted:
        fail_when_large(monkeypatch)
    yield disk
    if mounted:
        subprocess.run(["umount", disk], check=True)


def fail_when_large(monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def fsync_or_fail(descriptor: int) -> None:
        if os.fstat(descriptor).st_size > SMALL_DISK_BYTES:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", fsync_or_fail)


def test_put_leaves_nothing_partial_on_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.mp4"
    source.write_bytes(b"x" * 2 * SMALL_DISK_BYTES)
    store = LocalStore(small_disk / "store")
    kept = store.put("kept", b"first version")
    for body in (source, b"x" * 2 * SMALL_DISK_BYTES):
        with pytest.raises(StoreFull):
            store.put(KEY, body)
        with pytest.raises(StoreFull):
            store.put("kept", body, if_match=kept.etag)
    assert temporaries(small_disk / "store") == []
    assert store.list("").stats == (kept,)
    assert store.get("kept").body == b"first version"
    store.put(KEY, b"there is room for this one")


@pytest.mark.parametrize("failing", ["fsync", "rename", "utime"])
@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.ENOSPC, StoreFull), (errno.EDQUOT, StoreFull), (errno.EIO, StoreUnavailable)],
)
def test_put_leaves_nothing_partial_wherever_it_fails(
    store: LocalStore,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
    number: int,
    expected: type[Exception],
) -> None:
    kept = store.put("a", b"first version")

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError(number, "failed", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(f"os.{failing}", fail)
        with pytest.raises(expected) as failure:
            store.put("a", b"second version")
    assert str(folder) not in str(failure.value)
    assert temporaries(folder) == []
    assert store.get("a").body == b"first version"
    assert store.stat("a") == kept
    store.put("a", b"third version", if_match=kept.etag)


def test_check_tells_that_the_disk_is_full(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fchmod", fail)
    with pytest.raises(StoreUnavailable, match="no space left"):
        store.check()


def test_everything_tells_that_the_folder_is_gone(store: LocalStore, folder: Path, tmp_path: Path) -> None:
    folder.rename(tmp_path / "elsewhere")
    calls: list[Callable[[], object]] = [
        store.check,
        lambda: store.put("a", b""),
        lambda: store.get("a"),
        lambda: store.stat("a"),
        lambda: store.list(""),
        lambda: store.delete("a"),
    ]
    for call in calls:
        with pytest.raises(StoreUnavailable, match=r"^the storage folder is gone$"):
            call()
