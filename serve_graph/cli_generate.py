"""`wan-serve generate`: one clip, with a progress bar; Ctrl-C cancels it."""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from pydantic import ValidationError

from schemas.clips import Clip
from schemas.jobs import Job
from schemas.requests import GenerateRequest
from serve_graph.cli_client import (
    INTERRUPTED,
    PATIENCE_S,
    WRONG_USAGE,
    AsJson,
    Patience,
    Url,
    UrlDefault,
    client_of,
    fail,
    in_one_line,
    print_json,
    seconds,
    stderr,
)
from serve_graph.client import ClientError, WanClient
from serve_graph.client.wan_client import clip_of, new_idempotency_key
from serve_graph.job_progress import job_progress

STDOUT: Final = "-"
_CANCEL_PATIENCE_S: Final = 10.0


def generate(
    prompt: Annotated[str, typer.Argument(help="What to show.")],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="The MP4; `-`: stdout. Else JOB_ID.mp4.", metavar="FILE")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE.")] = False,
    negative_prompt: Annotated[str | None, typer.Option(help="What to avoid.")] = None,
    duration: Annotated[float | None, typer.Option(help="Seconds: (num_frames - 1) / fps.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Instead of --duration; 4k+1.")] = None,
    resolution: Annotated[str | None, typer.Option(help="Such as 480p.")] = None,
    aspect_ratio: Annotated[str | None, typer.Option(help="With --resolution, such as 16:9.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, with --height, instead of --resolution.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, with --width.")] = None,
    fps: Annotated[int | None, typer.Option(help="Playback rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Drawn when absent.")] = None,
    num_inference_steps: Annotated[int | None, typer.Option("--steps", "--num-inference-steps")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 turns guidance off.")] = None,
    flow_shift: Annotated[float | None, typer.Option()] = None,
    preset: Annotated[str | None, typer.Option(help="exact, balanced or fast.")] = None,
    loras: Annotated[
        list[str] | None,
        typer.Option("--lora", help="An adapter that `models` lists; again for more.", metavar="NAME[=WEIGHT]"),
    ] = None,
    reproducible: Annotated[bool, typer.Option("--reproducible", help="The same bytes for the same request.")] = False,
    priority: Annotated[str | None, typer.Option(help="low, normal or high.")] = None,
    deadline_s: Annotated[float | None, typer.Option("--deadline", help="Seconds to be done in, or to fail.")] = None,
    url_ttl_s: Annotated[int | None, typer.Option("--url-ttl", help="Seconds that the clip's URL works.")] = None,
    webhook_url: Annotated[str | None, typer.Option(help="Told when the job has ended.")] = None,
    patience: Patience = PATIENCE_S,
    url: Url = UrlDefault,
    as_json: AsJson = False,
) -> None:
    """Make one clip and save it. Ctrl-C cancels the job."""
    given: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "duration": duration,
        "num_frames": num_frames,
        "resolution": resolution,
        "aspect_ratio": aspect_ratio,
        "width": width,
        "height": height,
        "fps": fps,
        "seed": seed,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "flow_shift": flow_shift,
        "preset": preset,
        "loras": [_lora(named) for named in loras] if loras else None,
        "reproducible": reproducible or None,
        "priority": priority,
        "deadline_s": deadline_s,
        "url_ttl_s": url_ttl_s,
        "webhook_url": webhook_url,
    }
    request = _request(given, as_json)
    _check_output(output, force, as_json)
    with client_of(url, as_json, patience) as client:
        client.ping()  # a service that isn't there is told now, not after `patience`
        job = _finished(client, request, as_json)
        clip = clip_of(job)
        if output == STDOUT:
            _stream(client, clip)
            return
        path = client.download(clip, Path(f"{job.job_id}.mp4" if output is None else output))
    if as_json:
        print_json({"path": str(path), "clip": clip})
    else:
        size = f"{clip.width}x{clip.height}, {clip.num_frames} frames, seed {clip.seed}"
        print(f"{path}  ({size}, {seconds(clip.timings.total)})")


def _request(given: dict[str, Any], as_json: bool) -> GenerateRequest:
    try:
        return GenerateRequest.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        mistakes = (
            ": ".join([*map(str, mistake["loc"]), mistake["msg"].removeprefix("Value error, ")])
            for mistake in error.errors()
        )
        fail("; ".join(mistakes), WRONG_USAGE, as_json)


def _lora(named: str) -> dict[str, Any]:
    """`name=0.5`. What is no number is left for the schema to refuse."""
    name, given, weight = named.partition("=")
    try:
        return {"name": name, "weight": float(weight)} if given else {"name": name}
    except ValueError:
        return {"name": name, "weight": weight}


def _check_output(output: str | None, force: bool, as_json: bool) -> None:
    """Told before anything is rendered."""
    if output is None:
        return
    if output == STDOUT:
        if as_json:
            fail("--json and -o - both want stdout: take one of the two", WRONG_USAGE)
        if sys.stdout.isatty():
            fail("-o - would write an MP4 to the terminal: pipe it, or name a file", WRONG_USAGE)
        return
    path = Path(output)
    if path.is_dir() or not path.parent.is_dir():
        fail(f"{path} can't be a file: it is a folder, or its folder is missing", WRONG_USAGE, as_json)
    if path.exists() and not force:
        fail(f"{path} exists: choose another name, or replace it with --force", WRONG_USAGE, as_json)


def _finished(client: WanClient, request: GenerateRequest, as_json: bool) -> Job:
    """Submit and follow to the end; an interruption cancels the job and ends the command."""
    key = new_idempotency_key()
    job: Job | None = None
    try:
        job = client.submit(request, key)
        with job_progress(stderr()) as show:
            return client.wait(job.job_id, show)
    except KeyboardInterrupt:
        client.set_patience(_CANCEL_PATIENCE_S)
        try:
            if job is None:
                job = client.submit(request, key)  # whether or not it had arrived: the same job
            job = client.cancel(job.job_id)
        except ClientError as error:
            fail(f"interrupted, but not cancelled: {in_one_line(error)}", INTERRUPTED, as_json)
        fail(f"interrupted: {job.job_id} is {_fate(job)}", INTERRUPTED, as_json)


def _fate(job: Job) -> str:
    return job.state.value if job.state.is_terminal else "being cancelled"


def _stream(client: WanClient, clip: Clip) -> None:
    """The clip's bytes to stdout, once all of them are there and right."""
    with tempfile.TemporaryDirectory() as folder:
        with client.download(clip, Path(folder) / "clip.mp4").open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
        sys.stdout.buffer.flush()
