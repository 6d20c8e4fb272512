"""What the command of every benchmark does around its measuring."""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

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


def at_least(lowest: int) -> Callable[[str], int]:
    """What reads an option's number. It raises argparse.ArgumentTypeError, ValueError."""

    def number(text: str) -> int:
        if (value := int(text)) < lowest:
            raise argparse.ArgumentTypeError(f"must be at least {lowest:,}")
        return value

    return number


positive = at_least(1)


def progress(console: Console) -> Progress:
    """Bars: what is being done, how much of it, and for how long."""
    columns = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)
