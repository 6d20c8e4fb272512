import subprocess
import sys
from pathlib import Path

from serve_graph.spool import claim_spool

HOLD = """
import sys
from pathlib import Path
from serve_graph.spool import claim_spool
folder = claim_spool(Path(sys.argv[1]))
(folder / "clip.mp4").write_bytes(b"half a clip")
print(folder, flush=True)
sys.stdin.read()
"""


def holder(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that holds a spool folder with a file in it until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(parent)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_claim_spool_leaves_a_living_process_its_folder_and_sweeps_a_killed_one_s(tmp_path: Path) -> None:
    process, folder = holder(tmp_path)
    with process:
        first = claim_spool(tmp_path)
        assert (folder / "clip.mp4").exists()
        process.kill()
        process.wait()
        second = claim_spool(tmp_path)
    assert not folder.exists()
    assert first.is_dir()
    assert second.is_dir()
    assert first != second


def test_claim_spool_makes_a_folder_for_this_user_only(tmp_path: Path) -> None:
    folder = claim_spool(tmp_path / "new" / "spool")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert folder.parent.stat().st_mode & 0o777 == 0o700
