"""Files that are there whole or not at all, and the download of a clip into one."""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from schemas.clips import Clip
from serve_graph.client.errors import ApiProblem, ClientError, ClipDamaged, ServiceUnreachable, UnexpectedAnswer
from serve_graph.client.http import Connection, problem_of, server_of

PART_SUFFIX: Final = ".part"
_RENEWABLE: Final = frozenset({400, 403, 404})
"""What stores answer where a URL has expired, or its signing credentials have."""

_RENEWALS: Final = 3
_READ_BYTES: Final = 1 << 20


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path` that takes its place, on the disk, when the block ends well."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART_SUFFIX}")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def holds(path: Path, clip: Clip) -> bool:
    """Whether a file has exactly the clip's bytes."""
    try:
        if path.stat().st_size != clip.size_bytes:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == clip.sha256
    except FileNotFoundError:
        return False


def download(connection: Connection, clip: Clip, path: Path) -> None:
    """Fetch a clip into `path`, whole, checked, and through a new URL where the old one has expired.

    Raises ApiProblem, ServiceUnreachable, ClipDamaged; OSError where the file can't be written.
    """
    url, renewals_left, pauses = clip.output_url, _RENEWALS, connection.pauses()
    while True:
        try:
            with connection.stored(url) as answer:
                if answer.is_success:
                    with replacing(path) as file:
                        _copy(answer.iter_bytes(_READ_BYTES), clip, file)
                    return
                answer.read()
            refused = ApiProblem(problem_of(answer))
            if answer.status_code >= 500:
                raise ServiceUnreachable(server_of(url), f"status {answer.status_code}")
            if answer.status_code not in _RENEWABLE or renewals_left == 0:
                raise refused
            renewals_left -= 1
            url = signed_url(connection, clip.clip_id)
        except ClientError as error:
            pauses.take(error)


def signed_url(connection: Connection, clip_id: str) -> str:
    """A freshly signed URL. Raises ApiProblem, ServiceUnreachable, UnexpectedAnswer."""
    answer = connection.send("GET", f"/outputs/{clip_id}")
    url: str | None = answer.headers.get("location")
    if answer.status_code != 307 or url is None:
        raise UnexpectedAnswer(connection.server, f"status {answer.status_code} and not a redirection")
    return url


def _copy(chunks: Iterator[bytes], clip: Clip, file: BinaryIO) -> None:
    """Raises ClipDamaged before more than the clip's size is written."""
    digest, left = hashlib.sha256(), clip.size_bytes
    for chunk in chunks:
        left -= len(chunk)
        if left < 0:
            break
        digest.update(chunk)
        file.write(chunk)
    if left != 0 or digest.hexdigest() != clip.sha256:
        raise ClipDamaged(clip.clip_id)
