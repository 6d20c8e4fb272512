"""`wan-serve jobs`, `status`, `cancel`, `models`, `health`: what a service has and how it is."""

import time
from itertools import islice
from typing import Annotated, Any

import typer

from schemas.batches import Batch
from schemas.jobs import Job, JobState
from serve_graph.cli_client import (
    FAILED,
    PATIENCE_S,
    WRONG_USAGE,
    AsJson,
    Patience,
    Url,
    UrlDefault,
    add_row,
    age,
    client_of,
    excerpt,
    fail,
    print_json,
    printable,
    seconds,
    stdout,
    table,
)
from serve_graph.client import WanClient

WATCH_POLL_S = 1.0

Id = Annotated[str, typer.Argument(metavar="ID", help="job_… or batch_…")]


def jobs(
    state: Annotated[JobState | None, typer.Option(help="Only those in this state.")] = None,
    batch: Annotated[str | None, typer.Option(metavar="BATCH_ID", help="Those of a batch.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    everything: Annotated[bool, typer.Option("--all", help="Without a limit.")] = False,
    url: Url = UrlDefault,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first; without --batch, those that are part of none."""
    with client_of(url, as_json) as client:
        found = list(islice(client.jobs(state=state, batch_id=batch), None if everything else limit))
    if as_json:
        print_json({"jobs": found})
        return
    rows = table("job", "state", "age", "left", "prompt")
    for job in found:
        add_row(rows, job.job_id, _state(job), age(job.created_at), seconds(job.seconds_left), _prompt(job))
    stdout().print(rows)


def status(
    job_or_batch: Id,
    watch: Annotated[
        bool, typer.Option("--watch", help="Follow it to its end; exit code 1 unless it succeeds.")
    ] = False,
    patience: Patience = PATIENCE_S,
    url: Url = UrlDefault,
    as_json: AsJson = False,
) -> None:
    """Show a job or a batch."""
    _check_id(job_or_batch, as_json)
    with client_of(url, as_json, patience if watch else 0.0) as client:
        if job_or_batch.startswith("batch_"):
            succeeded = _show_batch(client, job_or_batch, watch, as_json)
        else:
            succeeded = _show_job(client, job_or_batch, watch, as_json)
    if watch and not succeeded:
        raise typer.Exit(FAILED)


def cancel(job_or_batch: Id, url: Url = UrlDefault, as_json: AsJson = False) -> None:
    """Cancel a job, or what has not ended of a batch."""
    _check_id(job_or_batch, as_json)
    with client_of(url, as_json) as client:
        if job_or_batch.startswith("batch_"):
            _print_batch(client.cancel_batch(job_or_batch), as_json)
        else:
            _print_job(client.cancel(job_or_batch), as_json)


def models(url: Url = UrlDefault, as_json: AsJson = False) -> None:
    """Show the models, and what may be asked for."""
    with client_of(url, as_json) as client:
        profiles = client.models()
    if as_json:
        print_json({"models": profiles})
        return
    for profile in profiles:
        defaults = profile.defaults
        print(profile.name)
        rows = table("field", "legal", "default")
        for field, default in (
            ("resolution", defaults.resolution),
            ("aspect_ratio", defaults.aspect_ratio),
            ("width", ""),
            ("num_frames", str(defaults.num_frames)),
            ("fps", str(defaults.fps)),
            ("num_inference_steps", str(defaults.num_inference_steps)),
            ("guidance_scale", f"{defaults.guidance_scale:g}"),
            ("flow_shift", f"{defaults.flow_shift:g}"),
            ("preset", "exact"),
            ("loras", ", ".join(f"{lora.name}={lora.weight:g}" for lora in defaults.loras)),
        ):
            add_row(rows, field, profile.legal(field) or "", default)
        stdout().print(rows)


def health(url: Url = UrlDefault, as_json: AsJson = False) -> None:
    """Show the service's state; exit code 1 while it can't render."""
    with client_of(url, as_json) as client:
        found = client.health()
    if as_json:
        print_json(found)
    else:
        gpu = found.gpu
        print(f"status   {found.status}{'' if found.reason is None else ': ' + printable(found.reason)}")
        print(f"model    {found.model.profile}{'' if found.model.loaded else ', not loaded'}, {found.model.device}")
        print(f"gpu      {'none' if gpu is None else f'{gpu.name}, {_gib(gpu.memory_used_bytes)} of '}", end="")
        print("" if gpu is None else f"{_gib(gpu.memory_total_bytes)} in use")
        print(f"queue    {found.queue.waiting} wait, {found.queue.running} run; room for {found.queue.capacity}")
        print(f"storage  {found.storage.kind}, {'reachable' if found.storage.reachable else 'not reachable'}")
        print(f"up       {seconds(found.uptime_s)}")
    if found.status != "ok":
        raise typer.Exit(FAILED)


def _check_id(job_or_batch: str, as_json: bool) -> None:
    if not job_or_batch.startswith(("job_", "batch_")) or "/" in job_or_batch:
        fail(f"{job_or_batch} is no id: one begins with job_ or batch_", WRONG_USAGE, as_json)


def _show_job(client: WanClient, job_id: str, watch: bool, as_json: bool) -> bool:
    if not watch:
        job = client.job(job_id)
        _print_job(job, as_json)
    else:
        job = client.wait(job_id, lambda job: _print_job(job, as_json))
    return job.state is JobState.SUCCEEDED


def _show_batch(client: WanClient, batch_id: str, watch: bool, as_json: bool) -> bool:
    batch = client.batch(batch_id)
    _print_batch(batch, as_json)
    while watch and batch.state != "ended":
        time.sleep(WATCH_POLL_S)  # between looks over HTTP; a batch has no event stream
        before, batch = batch, client.batch(batch_id)
        if (batch.state, batch.counts) != (before.state, before.counts):
            _print_batch(batch, as_json)
    return batch.state == "ended" and batch.counts.succeeded == batch.total


def _print_job(job: Job, as_json: bool) -> None:
    if as_json:
        print_json(job)
        return
    said: list[Any] = [job.job_id, _state(job)]
    if job.position is not None and job.state is JobState.QUEUED:
        said.append(f"behind {job.position}")
    if job.progress is not None:
        said.append(f"{job.progress.stage} {job.progress.step}/{job.progress.steps}")
    if job.seconds_left is not None:
        said.append(f"{seconds(job.seconds_left)} left")
    if job.clip is not None:
        said.append(job.clip.output_url)
    if job.error is not None:
        said.append(printable(job.error.detail))
    print("  ".join(said), flush=True)


def _print_batch(batch: Batch, as_json: bool) -> None:
    if as_json:
        print_json(batch)
        return
    counts = batch.counts.model_dump()
    said = [f"{count} {name}" for name, count in counts.items() if count]
    left = [] if batch.seconds_left is None else [f"{seconds(batch.seconds_left)} left"]
    print("  ".join([batch.batch_id, batch.state, f"{batch.total} prompts", *said, *left]), flush=True)


def _state(job: Job) -> str:
    ending = job.cancel_requested and not job.state.is_terminal
    return f"{job.state.value} (cancelling)" if ending else job.state.value


def _prompt(job: Job) -> str:
    return excerpt(job.parameters.prompt)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
