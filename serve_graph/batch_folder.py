"""The folder that `wan-serve batch` fills. Owns what makes an interrupted run resumable; knows no HTTP.

folder/batch.json     which batch it is, and the Idempotency-Key; on the disk before anything is sent
folder/00000.mp4 …    the clips, in the order of the prompts
folder/results.jsonl  one `ItemOutcome` per prompt, once all of them have ended
"""

import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from schemas.clips import Clip
from schemas.errors import Problem
from schemas.jobs import JobState
from serve_graph.client.files import PART_SUFFIX, replacing
from serve_graph.prompt_files import PromptFile

_RECORD: Final = "batch.json"
_RESULTS: Final = "results.jsonl"


class FolderRefused(Exception):
    """The folder can't take this batch; the message says why, and what to do."""


class BatchRecord(BaseModel):
    """What `batch.json` holds. idempotency_key: of the folder and the file's content, so of this batch alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    url: str
    prompts: str
    prompts_sha256: str
    total: int
    folder_id: str
    idempotency_key: str
    batch_id: str | None = None


class ItemOutcome(BaseModel):
    """A line of `results.jsonl`. file: the clip's, in this folder; null with why in `error` or `download_error`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int
    prompt: str
    job_id: str
    state: JobState
    file: str | None = None
    clip: Clip | None = None
    error: Problem | None = None
    download_error: str | None = None


class BatchFolder:
    """A folder that this process has for itself, with its record on the disk."""

    def __init__(self, path: Path, record: BatchRecord) -> None:
        self.path = path
        self.record = record

    @property
    def results_path(self) -> Path:
        return self.path / _RESULTS

    def clip_path(self, index: int) -> Path:
        """Where the clip of a prompt goes. index: from 0."""
        return self.path / f"{index:05d}.mp4"

    def save(self, **changes: str) -> None:
        """Change the record, on the disk first."""
        record = self.record.model_copy(update=changes)
        with replacing(self.path / _RECORD) as file:
            file.write(record.model_dump_json(indent=2).encode() + b"\n")
        self.record = record

    def write_results(self, outcomes: Sequence[ItemOutcome]) -> None:
        """Write `results.jsonl`."""
        with replacing(self.results_path) as file:
            for outcome in outcomes:
                file.write(outcome.model_dump_json(exclude_none=True).encode() + b"\n")


@contextmanager
def batch_folder(path: Path, url: str, prompts: PromptFile) -> Iterator[BatchFolder]:
    """Make the folder, or take up the one of an earlier run, for this process alone.

    Raises FolderRefused; OSError where nothing can be written.
    """
    path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderRefused(f"another wan-serve batch is filling {path}: wait for it, or stop it first") from error
        for part in path.glob(f".*{PART_SUFFIX}"):  # of a run that was killed
            part.unlink()
        record = _read(path)
        if record is None:
            folder = BatchFolder(path, _new_record(path, url, prompts))
            folder.save()
        else:
            _check(path, record, url, prompts)
            folder = BatchFolder(path, record)
        yield folder
    finally:
        os.close(descriptor)  # and the lock with it, as when the process is killed


def _read(path: Path) -> BatchRecord | None:
    try:
        return BatchRecord.model_validate_json((path / _RECORD).read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise FolderRefused(f"{path / _RECORD} is none that this version wrote: use another folder") from error


def _new_record(path: Path, url: str, prompts: PromptFile) -> BatchRecord:
    if (path / _RESULTS).exists() or any(path.glob("[0-9]" * 5 + ".mp4")):
        raise FolderRefused(f"{path} holds clips, but no {_RECORD} that says which: use another folder")
    folder_id = secrets.token_hex(16)
    key = hashlib.sha256(f"{folder_id} {prompts.sha256}".encode()).hexdigest()
    return BatchRecord(
        url=url,
        prompts=prompts.path.name,
        prompts_sha256=prompts.sha256,
        total=len(prompts.requests),
        folder_id=folder_id,
        idempotency_key=key,
    )


def _check(path: Path, record: BatchRecord, url: str, prompts: PromptFile) -> None:
    if record.prompts_sha256 != prompts.sha256:
        raise FolderRefused(
            f"{path} belongs to {record.prompts} as it was: {prompts.path} has other content; put it back to resume, "
            "or use another folder"
        )
    if record.batch_id is None and record.url != url:
        raise FolderRefused(f"{path} was begun with {record.url}: go on there (--url), or use another folder")
