"""Takes a folder's batch to its end: submits it once, watches it, fetches its clips as they finish."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from pydantic import ValidationError

from schemas.batches import Batch, BatchResult
from serve_graph.batch_folder import BatchFolder, ItemOutcome
from serve_graph.client import ApiProblem, ClipDamaged, WanClient
from serve_graph.client.files import holds
from serve_graph.client.http import retry_after_s
from serve_graph.prompt_files import PromptFile

DOWNLOADS: Final = 4
POLL_S: Final = 0.5
_RESULTS_SHARE: Final = 4
"""Reading the results of a large batch takes a while: it may take one part in so many of the time."""

OnBatch = Callable[[Batch, int], None]
"""Told the batch's state and how many of its clips are in the folder."""


def submitted(client: WanClient, folder: BatchFolder, prompts: PromptFile) -> Batch:
    """The folder's batch: found again, or submitted with the folder's key, which makes it once however often it is
    sent. Raises ClientError."""
    if folder.record.batch_id is not None:
        return client.batch(folder.record.batch_id)
    batch = client.submit_batch(prompts.requests, folder.record.idempotency_key)
    folder.save(batch_id=batch.batch_id)
    return batch


def watched(
    client: WanClient, folder: BatchFolder, prompts: PromptFile, batch: Batch, on_change: OnBatch
) -> list[ItemOutcome]:
    """Follow a batch until all of it has ended and every clip is in the folder; writes `results.jsonl`.

    Raises ClientError where the service is away for longer than the client's patience, OSError where a clip can't be
    written. What has been fetched stays, and the next run goes on behind it.
    """

    def fetch(result: BatchResult) -> ItemOutcome:
        return _fetch(client, folder, result, prompts.requests[result.index].prompt)

    pool = ThreadPoolExecutor(DOWNLOADS, thread_name_prefix="download")
    fetching: dict[int, Future[ItemOutcome]] = {}
    try:
        while True:
            pause_s = POLL_S
            if ended(batch) > len(fetching) or (batch.state == "ended" and len(fetching) < batch.total):
                began = time.monotonic()
                for result in client.batch_results(batch.batch_id):
                    if result.state.is_terminal and result.index not in fetching:
                        fetching[result.index] = pool.submit(fetch, result)
                pause_s = max(POLL_S, _RESULTS_SHARE * (time.monotonic() - began))
            done = [future.result() for future in fetching.values() if future.done()]
            on_change(batch, sum(outcome.file is not None for outcome in done))
            if len(done) == batch.total:
                outcomes = sorted(done, key=lambda outcome: outcome.index)
                folder.write_results(outcomes)
                return outcomes
            time.sleep(pause_s)  # between looks over HTTP; a batch has no event stream
            if batch.state != "ended":
                batch = client.batch(batch.batch_id)
    finally:
        pool.shutdown(cancel_futures=True)


def ended(batch: Batch) -> int:
    """How many of a batch's jobs have ended."""
    return batch.counts.succeeded + batch.counts.failed + batch.counts.cancelled


def finished(folder: BatchFolder) -> list[ItemOutcome] | None:
    """The outcomes of a run that had come to its end, if every clip is still there; None where it is not so."""
    try:
        lines = folder.results_path.read_bytes().splitlines()
        outcomes = [ItemOutcome.model_validate_json(line) for line in lines]
    except (FileNotFoundError, ValidationError):  # of a version that wrote it otherwise: the service knows as well
        return None
    whole = all(o.clip is None or (o.file is not None and holds(folder.path / o.file, o.clip)) for o in outcomes)
    return outcomes if whole and len(outcomes) == folder.record.total else None


def _fetch(client: WanClient, folder: BatchFolder, result: BatchResult, prompt: str) -> ItemOutcome:
    outcome = ItemOutcome(
        index=result.index,
        prompt=prompt,
        job_id=result.job_id,
        state=result.state,
        clip=result.clip,
        error=result.error,
    )
    if result.clip is None:
        return outcome
    path = folder.clip_path(result.index)
    try:
        if not holds(path, result.clip):
            client.download(result.clip, path)
    except (ApiProblem, ClipDamaged) as error:
        if retry_after_s(error) is not None:  # the service's trouble: not this clip's own
            raise
        return outcome.model_copy(update={"download_error": str(error)})
    return outcome.model_copy(update={"file": path.name})
