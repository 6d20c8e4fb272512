"""Shows a job's progress to a person."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from schemas.jobs import Job
from serve_graph.cli_client import seconds

_COLUMNS: Final = (
    TextColumn("{task.description:<9}"),
    BarColumn(),
    TextColumn("{task.completed:.0f}/{task.total:.0f}"),
    TextColumn("{task.fields[left]}"),
    TimeElapsedColumn(),
)


@contextmanager
def job_progress(console: Console) -> Iterator[Callable[[Job], None]]:
    """Shows a job: a bar on a terminal; elsewhere a line per state."""
    told = ""
    with Progress(*_COLUMNS, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("queued", total=1, left="")

        def show(job: Job) -> None:
            nonlocal told
            if not console.is_terminal and job.state.value != told:
                told = job.state.value
                console.print(f"{job.job_id} {told}", soft_wrap=True)
            left = seconds(job.seconds_left)
            bars.update(bar, description=job.state.value, left=left and f"{left} left")
            if job.progress is not None:
                bars.update(bar, description=job.progress.stage, completed=job.progress.step, total=job.progress.steps)

        yield show
