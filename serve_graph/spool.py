"""Where clips grow before they go into the store: one folder per process, swept when its process is gone."""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_LOCK = ".lock"


def claim_spool(parent: Path) -> Path:
    """Make a folder below `parent` that belongs to this process until it ends, and remove those of dead processes.

    A process holds its folder by a lock that dies with it, however it dies. Raises OSError.
    """
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (parent / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # nobody sweeps between our making a folder and our holding it
        for folder in parent.iterdir():
            if folder.is_dir():
                _remove_unless_held(folder)
        own = Path(tempfile.mkdtemp(dir=parent))
        fcntl.flock(os.open(own, os.O_RDONLY | os.O_DIRECTORY), fcntl.LOCK_EX)  # open until the process ends
    return own


def _remove_unless_held(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    else:
        shutil.rmtree(folder)
    finally:
        os.close(descriptor)
