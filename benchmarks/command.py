"""What the command of every benchmark does around its measuring."""

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from rich.console import Console

from serve_graph.settings import ENV_PREFIX

RESULTS = Path(__file__).parent / "results"
_FAILED, _INTERRUPTED = 1, 130


class _Report(Protocol):
    @property
    def passed(self) -> bool: ...


R = TypeVar("R", bound=_Report)


def run_command(
    measure: Callable[[Path, Console], R],
    tell: Callable[[R, Console], None],
    *,
    failures: tuple[type[Exception], ...] = (),
    check: bool,
) -> int:
    """Measure in an empty folder, with the defaults of every setting; then `tell`, which writes the results.

    failures: what `measure` raises where it could not measure. check: a missed goal is a failure, too.
    Returns the exit code. SIGTERM ends it like Ctrl-C: with everything put away and nothing written.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for name in [name for name in os.environ if name.upper().startswith(ENV_PREFIX)]:
        del os.environ[name]  # the defaults are measured, whatever this shell exports
    console = Console()
    try:
        with tempfile.TemporaryDirectory(prefix="wan-bench-", ignore_cleanup_errors=True) as scratch:
            report = measure(Path(scratch), console)
    except KeyboardInterrupt:
        console.print("interrupted; nothing was written")
        return _INTERRUPTED
    except failures as error:
        print(error, file=sys.stderr)
        return _FAILED
    tell(report, console)
    return _FAILED if check and not report.passed else 0
