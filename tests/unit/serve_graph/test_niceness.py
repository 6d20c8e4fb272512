"""A process that steps back does so with every thread, also those it starts later, and never twice the same thread."""

import json
import subprocess
import sys

import pytest

from serve_graph.niceness import STEP_BACK

PROGRAM = """
import json, os, threading
from serve_graph.niceness import step_back

def niceness(): return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

waiting, go = threading.Event(), threading.Event()
seen = {"before": niceness()}
def early():
    waiting.set(); go.wait(); seen["early thread"] = niceness()
thread = threading.Thread(target=early); thread.start(); waiting.wait()
step_back()
go.set(); thread.join()
seen["main thread"] = niceness()
later = threading.Thread(target=lambda: seen.update({"later thread": niceness()})); later.start(); later.join()
print(json.dumps(seen))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a niceness of their own on Linux only")
def test_every_thread_steps_back() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)

    seen = json.loads(done.stdout)
    expected = min(seen.pop("before") + STEP_BACK, 19)
    assert seen == dict.fromkeys(["early thread", "main thread", "later thread"], expected)
