"""`wan-serve batch`: a file of prompts into a folder of clips, with a live table; run again, it goes on."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar

from schemas.batches import Batch
from serve_graph.batch_folder import BatchFolder, FolderRefused, ItemOutcome, batch_folder
from serve_graph.batch_run import OnBatch, ended, finished, submitted, watched
from serve_graph.cli_client import (
    FAILED,
    INTERRUPTED,
    PATIENCE_S,
    WRONG_USAGE,
    AsJson,
    Patience,
    Url,
    UrlDefault,
    add_row,
    client_of,
    end,
    excerpt,
    fail,
    print_json,
    seconds,
    stderr,
    table,
)
from serve_graph.client import ApiProblem, WanClient
from serve_graph.prompt_files import PromptFile, PromptFileError, read_prompt_file

_FAILURES_TOLD: Final = 10
_LINE_EVERY_S: Final = 5.0
_BAR_WIDTH: Final = 60


def batch(
    prompts: Annotated[Path, typer.Argument(help="A prompt per line (.txt), or a JSON request per line (.jsonl).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for the clips.", metavar="FOLDER")],
    patience: Patience = PATIENCE_S,
    url: Url = UrlDefault,
    as_json: AsJson = False,
) -> None:
    """Make a clip of every prompt. Run the same command again to go on after an interruption."""
    try:
        read = read_prompt_file(prompts)
        with batch_folder(output, url, read) as folder, client_of(url, as_json, patience) as client:
            outcomes = finished(folder) or _outcomes(client, folder, read, as_json)
    except (PromptFileError, FolderRefused) as error:
        fail(str(error), WRONG_USAGE, as_json)
    except OSError as error:
        fail(f"{error.filename or output}: {error.strerror or error}", FAILED, as_json)
    _tell(folder, outcomes, as_json)
    if any(outcome.file is None for outcome in outcomes):
        raise typer.Exit(FAILED)


def _outcomes(client: WanClient, folder: BatchFolder, prompts: PromptFile, as_json: bool) -> list[ItemOutcome]:
    try:
        with _table(folder) as show:
            return watched(client, folder, prompts, _submitted(client, folder, prompts, as_json), show)
    except KeyboardInterrupt:
        again = f"wan-serve batch {prompts.path} -o {folder.path}"
        stop = f"; stop it: wan-serve cancel {folder.record.batch_id}" if folder.record.batch_id else ""
        fail(f"interrupted; the batch goes on. Fetch the rest: {again}{stop}", INTERRUPTED, as_json)


def _submitted(client: WanClient, folder: BatchFolder, prompts: PromptFile, as_json: bool) -> Batch:
    try:
        return submitted(client, folder, prompts)
    except ApiProblem as error:
        problem = error.problem
        if problem.name in {"batch-not-found", "batch-gone"}:
            batch_id = folder.record.batch_id
            fail(
                f"the service does not know {batch_id} of {folder.path}: is it another service (--url), or its records "
                "are gone; for a new batch use another folder",
                FAILED,
                as_json,
                problem,
            )
        if problem.errors:
            fail(prompts.refusal([prompts.located(one) for one in problem.errors]), WRONG_USAGE, as_json, problem)
        end(error, as_json)


@contextmanager
def _table(folder: BatchFolder) -> Iterator[OnBatch]:
    """A live table on a terminal; elsewhere a line now and then."""
    console = stderr()
    if not console.is_terminal:
        yield _lines(console)
        return
    with Live(console=console, transient=True, auto_refresh=True) as live:

        def show(batch: Batch, fetched: int) -> None:
            live.update(_rows(batch, fetched, folder), refresh=True)

        yield show


def _lines(console: Console) -> Callable[[Batch, int], None]:
    told: tuple[int, int] | None = None
    next_at = 0.0

    def show(batch: Batch, fetched: int) -> None:
        nonlocal told, next_at
        now, news = time.monotonic(), (ended(batch), fetched)
        last = batch.state == "ended" and fetched >= batch.counts.succeeded
        if news != told and (now >= next_at or last):
            told, next_at = news, now + _LINE_EVERY_S
            left = f", {seconds(batch.seconds_left)} left" if batch.seconds_left is not None else ""
            console.print(
                f"{batch.batch_id}: {ended(batch)} of {batch.total} ended, {batch.counts.failed} failed, "
                f"{fetched} fetched{left}",
                soft_wrap=True,
            )

    return show


def _rows(batch: Batch, fetched: int, folder: BatchFolder) -> Group:
    counts = batch.counts
    rows = table("state", "queued", "running", "succeeded", "failed", "cancelled", "fetched", "left")
    numbers = (counts.queued, counts.running, counts.succeeded, counts.failed, counts.cancelled, fetched)
    add_row(rows, batch.state, *map(str, numbers), seconds(batch.seconds_left))
    bar = ProgressBar(total=batch.total, completed=ended(batch), width=_BAR_WIDTH)
    return Group(f"{batch.batch_id}  {batch.total} prompts  → {folder.path}/", bar, rows)


def _tell(folder: BatchFolder, outcomes: Sequence[ItemOutcome], as_json: bool) -> None:
    """The summary."""
    without = [outcome for outcome in outcomes if outcome.file is None]
    if as_json:
        summary: dict[str, Any] = {
            "batch_id": folder.record.batch_id,
            "folder": str(folder.path),
            "results": str(folder.results_path),
            "total": len(outcomes),
            "clips": len(outcomes) - len(without),
            "failed": [outcome.model_dump(mode="json", exclude_none=True) for outcome in without],
        }
        print_json(summary)
        return
    for outcome in without[:_FAILURES_TOLD]:
        told = outcome.download_error or (outcome.error.detail if outcome.error else outcome.state.value)
        print(f'{outcome.index:05d}  {outcome.job_id}  "{excerpt(outcome.prompt)}": {told}')
    failed = f", {len(without)} without a clip" if without else ""
    print(f"{len(outcomes) - len(without)} clips in {folder.path}/{failed}; all about them: {folder.results_path}")
