"""Memory that tensors gave back stays with the process, so that the next step need not fault its pages in again."""

import json
import os
import platform
import subprocess
import sys

import pytest

MIB = 2**20
NUM_TENSORS = 32
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "131072"}
"""Every tensor is mapped and unmapped, as glibc may by itself when its heaps lie badly."""

PROGRAM = f"""
import json, os, sys
import torch
from serve_graph.engine.malloc import keep_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

def work():
    found["told"] = keep_freed_memory() if sys.argv[1] == "keep" else None
    for _ in range(3):
        kept = [torch.ones({8 * MIB // 4}) for _ in range({NUM_TENSORS})]
        found["used"] = resident()
        del kept
    found["left"] = resident()

found = {{}}
work()
print(json.dumps(found))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_memory_of_freed_tensors_stays() -> None:
    kept, returned = (_run(mode) for mode in ("keep", "default"))

    assert kept["told"] is True
    assert kept["used"] - kept["left"] < NUM_TENSORS * MIB
    assert returned["used"] - returned["left"] > 4 * NUM_TENSORS * MIB


def _run(mode: str) -> dict[str, int]:
    command = [sys.executable, "-c", PROGRAM, mode]
    done = subprocess.run(command, env=os.environ | RETURNING, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found
