"""The key scheme: how objects are named, and which names there can be. Knows no store.

jobs/{job_id}.json                              a job's record, or its tombstone
clips/{clip_id}/{attempt_token}.mp4             the clip that one attempt at the job made
clips/{clip_id}/{attempt_token}.jpg             its first frame, once somebody has asked for it
active/{principal}/{time}-{id}                  a job or batch that somebody has to see to, until it is done
done/{principal}/{state}/{t}/{im}/{e}-{job_id}  a job that has ended, until it is forgotten
batches/{batch_id}/manifest.jsonl               what a batch is made of
batches/{batch_id}/done/{index}.{state}         a job of a batch that has ended
batches/{batch_id}/cancel.json                  that a batch was cancelled
batches/{batch_id}/summary.json                 how a batch has ended
batch-index/{principal}/{t}/{im}/{e}-{batch_id} a batch, from its creation until it is forgotten

`time` is the moment of creation counted down, so that ascending keys are newest first. In `done` and
`batch-index` its eleven digits are three segments, so that no folder of a local store grows with the history: the
last one holds four seconds.
"""

import re
from datetime import UTC, datetime
from typing import Final, NamedTuple

from schemas.jobs import BATCH_ID_PATTERN, ID_PATTERN, JobState
from storage.store import InvalidKey

MAX_KEY_CHARS: Final = 512
MAX_SEGMENT_CHARS: Final = 255

INSTANCES: Final = "instances/"
"""NAME_MAX of the usual file systems; S3 has no such bound."""

_SEGMENT = r"[A-Za-z0-9_-][A-Za-z0-9._-]*"
_KEY: Final = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})*")
_JOB_ID: Final = re.compile(rf"job_{ID_PATTERN}")
_CLIP: Final = re.compile(rf"clips/(clip_{ID_PATTERN})/([A-Za-z0-9_-]{{1,64}})\.mp4")
_OUTPUT: Final = re.compile(rf"clips/(clip_{ID_PATTERN})/([A-Za-z0-9_-]{{1,64}}\.(?:mp4|jpg))")
_INSTANCE: Final = re.compile(r"[0-9a-f]{16}")
_BATCH_ID: Final = re.compile(BATCH_ID_PATTERN)
_ENTRY: Final = re.compile(rf"[0-9a-f]{{11}}-(?:job_{ID_PATTERN}|{BATCH_ID_PATTERN})")
_ITEM_RECORD: Final = re.compile(r"jobs/job_[0-9a-f]{32}-([0-9]{5})\.json")
_DONE_ITEM: Final = re.compile(r".*/([0-9]{5})\.([a-z]+)")

_LAST_MS: Final = 16**11 - 1


class ClipName(NamedTuple):
    """What a clip's key says."""

    clip_id: str
    attempt_token: str


class OutputName(NamedTuple):
    """What the key of a clip, or of what lies beside it, says. name: the key's last segment."""

    clip_id: str
    name: str


def check_key(key: str) -> str:
    """Return `key`. Raises InvalidKey.

    A key is at most 512 characters: segments of ASCII letters, digits, `_`, `-` and, not in front, `.`,
    joined by `/`. So it has no empty or hidden segment and no `..`, and joined to a folder it stays inside.
    """
    if len(key) > MAX_KEY_CHARS or not _KEY.fullmatch(key) or ".." in key:
        raise InvalidKey
    if any(len(segment) > MAX_SEGMENT_CHARS for segment in key.split("/")):
        raise InvalidKey
    return key


def job_key(job_id: str) -> str:
    """The key of a job's record. Raises InvalidKey for anything but `job_` and 32 hex digits."""
    if not _JOB_ID.fullmatch(job_id):
        raise InvalidKey
    return f"jobs/{job_id}.json"


def clip_key(clip_id: str, attempt_token: str) -> str:
    """The key of a clip. Raises InvalidKey unless `parse_clip_key` would give back the same parts."""
    key = f"clips/{clip_id}/{attempt_token}.mp4"
    if parse_clip_key(key) != (clip_id, attempt_token):
        raise InvalidKey
    return key


def thumbnail_key(of_clip: str) -> str:
    """The key of the first frame of the clip under the key `of_clip`. Raises InvalidKey."""
    clip_id, attempt_token = parse_clip_key(of_clip)
    return f"clips/{clip_id}/{attempt_token}.jpg"


def output_key(clip_id: str, name: str) -> str:
    """The key of what clients may fetch under this name. Raises InvalidKey for anything but clips and thumbnails."""
    key = f"clips/{clip_id}/{name}"
    if parse_output_key(key) != (clip_id, name):
        raise InvalidKey
    return key


def parse_output_key(key: str) -> OutputName:
    """The parts of the key of a clip or a thumbnail. Raises InvalidKey."""
    match = _OUTPUT.fullmatch(key)
    if match is None:
        raise InvalidKey
    return OutputName(match[1], match[2])


def clip_prefix(clip_id: str, attempt_token: str | None = None) -> str:
    """What the keys of a clip begin with, of one attempt or of all of them."""
    return f"clips/{clip_id}/" if attempt_token is None else f"clips/{clip_id}/{attempt_token}."


def parse_clip_key(key: str) -> ClipName:
    """The parts of a clip's key: `clip_` and 32 hex digits, and a token of 1 to 64 letters, digits, `_`, `-`.

    Raises InvalidKey.
    """
    match = _CLIP.fullmatch(key)
    if match is None:
        raise InvalidKey
    return ClipName(match[1], match[2])


def index_entry(created_at: datetime, job_or_batch_id: str) -> str:
    """The name under which an index lists a job or batch: `{time}-{id}`; it sorts the newest first."""
    return f"{time_before(created_at)}-{job_or_batch_id}"


def time_before(moment: datetime) -> str:
    """The `time` of what was created at `moment`. An entry behind it is that old, or older."""
    milliseconds = int((moment - datetime.fromtimestamp(0, UTC)).total_seconds() * 1000)
    return f"{min(_LAST_MS, max(0, _LAST_MS - milliseconds)):011x}"


def entry_id(entry: str) -> str:
    """The id in an index entry. Raises InvalidKey for anything that `index_entry` doesn't make."""
    if not _ENTRY.fullmatch(entry):
        raise InvalidKey
    return entry.partition("-")[2]


def active_prefix(principal: str) -> str:
    """Where the active index has what belongs to one principal."""
    return f"active/{_principal_segment(principal)}/"


def active_key(principal: str, entry: str) -> str:
    """The key of an entry of the active index."""
    return active_prefix(principal) + entry


def done_prefix(principal: str, state: JobState) -> str:
    """Where the index has one principal's ended jobs in one state."""
    return f"done/{_principal_segment(principal)}/{state.value}/"


def done_key(principal: str, state: JobState, entry: str) -> str:
    """The key of an entry of the index of ended jobs."""
    return done_prefix(principal, state) + _in_folders(entry)


def batch_index_prefix(principal: str) -> str:
    """Where one principal's batches are listed."""
    return f"batch-index/{_principal_segment(principal)}/"


def batch_index_key(principal: str, entry: str) -> str:
    """The key of an entry of the index of batches."""
    return batch_index_prefix(principal) + _in_folders(entry)


def entry_of_key(key: str) -> str:
    """The entry that a key of one of the three indexes names. Raises InvalidKey."""
    first, *rest = key.split("/")
    entry = "".join(rest[2:]) if first == "done" else "".join(rest[1:])
    entry_id(entry)
    return entry


def _in_folders(entry: str) -> str:
    return f"{entry[:5]}/{entry[5:8]}/{entry[8:]}"


def start_after_entry(prefix: str, entry: str) -> str:
    """The `start_after` that begins a list of an index behind `entry`."""
    return prefix + (entry if prefix.startswith("active/") else _in_folders(entry))


def principal_of_key(key: str) -> str:
    """Whose an index entry is."""
    return key.split("/")[1].replace("D", ".")


def _principal_segment(principal: str) -> str:
    """An API key's name (a-z 0-9 . _ -) as a segment, which begins with no dot and holds no two."""
    return principal.replace(".", "D")


def instance_key(instance: str) -> str:
    """What a process says of itself. Raises InvalidKey for an id that is not 16 hex digits."""
    if not _INSTANCE.fullmatch(instance):
        raise InvalidKey("no instance has this id")
    return f"{INSTANCES}{instance}.json"


def batch_manifest_key(batch_id: str) -> str:
    """The key of a batch's manifest. Raises InvalidKey for anything but `batch_` and 32 hex digits."""
    return f"batches/{_checked_batch(batch_id)}/manifest.jsonl"


def batch_cancel_key(batch_id: str) -> str:
    """The key of the object that says that a batch was cancelled. Raises InvalidKey."""
    return f"batches/{_checked_batch(batch_id)}/cancel.json"


def batch_summary_key(batch_id: str) -> str:
    """The key of the object that says how a batch has ended. Raises InvalidKey."""
    return f"batches/{_checked_batch(batch_id)}/summary.json"


def item_records_prefix(batch_id: str) -> str:
    """What the keys of the records of a batch's jobs begin with. Raises InvalidKey."""
    return f"jobs/job_{_checked_batch(batch_id).removeprefix('batch_')}-"


def item_clips_prefix(batch_id: str) -> str:
    """What the keys of the clips of a batch's jobs begin with. Raises InvalidKey."""
    return f"clips/clip_{_checked_batch(batch_id).removeprefix('batch_')}-"


def index_of_record_key(key: str) -> int:
    """The place in its batch of the job whose record lies here. Raises InvalidKey."""
    match = _ITEM_RECORD.fullmatch(key)
    if match is None:
        raise InvalidKey
    return int(match[1])


def batch_done_prefix(batch_id: str) -> str:
    """Where a batch's ended jobs are listed, in the order of submission. Raises InvalidKey."""
    return f"batches/{_checked_batch(batch_id)}/done/"


def batch_done_key(batch_id: str, index: int, state: JobState) -> str:
    """The key that tells how one job of a batch ended."""
    return f"{batch_done_prefix(batch_id)}{index:05d}.{state.value}"


def parse_batch_done_key(key: str) -> tuple[int, JobState]:
    """The place in its batch and the end of a job. Raises InvalidKey."""
    match = _DONE_ITEM.fullmatch(key)
    if match is None:
        raise InvalidKey
    return int(match[1]), JobState(match[2])


def _checked_batch(batch_id: str) -> str:
    if not _BATCH_ID.fullmatch(batch_id):
        raise InvalidKey
    return batch_id
