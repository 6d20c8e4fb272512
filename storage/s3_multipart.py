"""Large files in parts: begin, upload, complete, and abort when it fails, so that no parts stay.

An upload that can't be aborted, since the server is away, is aborted behind the next one that succeeds. A process
that dies in between leaves parts that nobody sees; our lifecycle rule (`storage.s3_lifecycle`) removes them after
a day.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from typing import BinaryIO, Final
from xml.etree import ElementTree

from schemas.errors import StoreUnavailable
from storage.s3_client import S3Client
from storage.s3_xml import parse_xml, required_text
from storage.store import ObjectNotFound

_COMPLETED: Final = "CompleteMultipartUploadResult"


def upload_parts(
    client: S3Client,
    name: str,
    file: BinaryIO,
    *,
    part_size_bytes: int,
    headers: Mapping[str, str],
    condition: Mapping[str, str],
    unaborted: deque[tuple[str, str]],
) -> None:
    """Write the file, from where it stands to its end, as one object.

    Args:
        client: sends the requests, one after another.
        name: the object's name in the bucket.
        file: has at least one byte left.
        part_size_bytes: of each part but the last; one part is in memory at a time.
        headers: of the object.
        condition: If-None-Match or nothing; some servers (Ceph 16) ignore it here.
        unaborted: names and upload ids of earlier failures that are still to be aborted; this one's may join them.

    Raises:
        ObjectNotFound: the upload is gone: it was completed already, or somebody aborted it.
        PreconditionFailed, StoreUnavailable, StoreFull, OSError.
    """
    upload_id = _begin(client, name, headers)
    with ExitStack() as undo:
        undo.callback(_abort, client, name, upload_id, unaborted)
        etags = [
            _upload(client, name, upload_id, number, part)
            for number, part in enumerate(_parts(file, part_size_bytes), start=1)
        ]
        try:
            _complete(client, name, upload_id, etags, condition)
        except StoreUnavailable:
            # The server may be at it still, and an abort could tear the object. The lifecycle rule cleans up.
            undo.pop_all()
            raise
        undo.pop_all()
    for _ in range(len(unaborted)):
        with suppress(IndexError):  # another thread aborts it
            _abort(client, *unaborted.popleft(), unaborted)


def _begin(client: S3Client, name: str, headers: Mapping[str, str]) -> str:
    answer = client.send("POST", name, query={"uploads": ""}, headers=headers)
    return required_text(parse_xml(answer.body), "UploadId")


def _parts(file: BinaryIO, part_size_bytes: int) -> Iterator[bytes]:
    while part := file.read(part_size_bytes):
        yield part


def _upload(client: S3Client, name: str, upload_id: str, number: int, part: bytes) -> str:
    query = {"partNumber": str(number), "uploadId": upload_id}
    return client.send("PUT", name, query=query, body=part).headers.get("etag", "")


def _complete(client: S3Client, name: str, upload_id: str, etags: list[str], condition: Mapping[str, str]) -> None:
    root = ElementTree.Element("CompleteMultipartUpload")
    for number, etag in enumerate(etags, start=1):
        part = ElementTree.SubElement(root, "Part")
        ElementTree.SubElement(part, "PartNumber").text = str(number)
        ElementTree.SubElement(part, "ETag").text = etag
    headers = {"Content-Type": "application/xml", **condition}
    body = ElementTree.tostring(root)
    answer = client.send("POST", name, query={"uploadId": upload_id}, headers=headers, body=body)
    if parse_xml(answer.body).tag != _COMPLETED:  # S3 says 200 at once, and in the body whether it worked
        raise StoreUnavailable("the object store could not put the clip together")


def _abort(client: S3Client, name: str, upload_id: str, unaborted: deque[tuple[str, str]]) -> None:
    try:
        client.send("DELETE", name, query={"uploadId": upload_id})
    except ObjectNotFound:
        return
    except StoreUnavailable:  # what made the upload fail is the news
        unaborted.append((name, upload_id))
