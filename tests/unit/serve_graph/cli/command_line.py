"""How the tests run `wan-serve`."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import serve_graph

PROJECT = Path(serve_graph.__file__).parents[1]
COMMAND = [sys.executable, "-m", "serve_graph.cli"]

Run = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., subprocess.Popen[str]]


def error_of(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line that a command ended with."""
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("wan-serve: ")
    assert done.stderr.count("\n") == 1
    return done.stderr
