"""Our replicas' log lines, as Ray's log monitor hands them to the driver: to stderr, whole, and nothing of Ray's own.

The monitor reads files that are being written to, so a line may come in two pieces, one after the other.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any, Final

_BEGINS: Final = '{"time": '


class ReplicaLines:
    """Takes batches of `ray_print_logs`: `lines` of the process `pid`, of its stderr where `is_err`."""

    def __init__(self) -> None:
        self._begun: dict[tuple[Any, Any], str] = {}

    def __call__(self, batch: Mapping[str, Any]) -> None:
        """Write what is ours and whole; keep a piece for the next batch."""
        source = (batch.get("pid"), batch.get("is_err"))
        for piece in batch.get("lines", ()):
            line = piece if piece.startswith(_BEGINS) else self._begun.pop(source, "") + piece
            if not line or not _BEGINS.startswith(line[: len(_BEGINS)]):
                continue
            if _is_whole(line):
                print(line, file=sys.stderr, flush=True)
            else:
                self._begun[source] = line


def _is_whole(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
