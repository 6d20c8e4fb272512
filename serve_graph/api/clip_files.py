"""The bytes behind the local store's presigned URLs. An S3 store answers its own, and this route isn't there."""

import asyncio
import re
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Annotated

from fastapi import APIRouter, Path, Request
from fastapi.responses import FileResponse, Response

from schemas.errors import ClipNotFound, RangeNotSatisfiable
from serve_graph.api.documented import problems
from serve_graph.stores import LocalFiles
from storage.keys import output_key
from storage.store import InvalidKey, ObjectNotFound, ObjectStat, content_type

MEDIA_TYPES: dict[str, dict[str, str]] = {"video/mp4": {}, "image/jpeg": {}}

_RANGE = re.compile(r"bytes=(?:([0-9]{1,18})-([0-9]{0,18})|-([0-9]{1,18}))")


@dataclass(frozen=True)
class SignedClips:
    """The local store, what checks its URLs, and the pool for its blocking calls."""

    local: LocalFiles
    executor: Executor


def clip_file_routes(clips: SignedClips) -> APIRouter:
    """`GET` and `HEAD` of `/outputs/{clip_id}/{name}`."""
    router = APIRouter()

    @router.get(
        "/outputs/{clip_id}/{name}",
        response_class=Response,
        responses={
            200: {"content": MEDIA_TYPES, "description": "The clip, or its thumbnail."},
            206: {"content": MEDIA_TYPES, "description": "The part of it that `Range` asks for."},
            304: {"description": "`If-None-Match` names this clip."},
            **problems(403, 404, 416, 422, 500, 503),
        },
    )
    @router.api_route("/outputs/{clip_id}/{name}", methods=["GET", "HEAD"], include_in_schema=False)  # serves both
    async def get_clip_file(
        request: Request,
        clip_id: Annotated[str, Path(examples=["clip_" + "0" * 32])],
        name: Annotated[str, Path(examples=["0123456789abcdef.mp4"])],
    ) -> Response:
        """The bytes of a clip, for whoever has a URL that was signed for them and has not expired."""
        try:
            key = output_key(clip_id, name)
        except InvalidKey as error:
            raise ClipNotFound from error
        disposition = clips.local.presigner.verify(request.method, key, request.query_params.multi_items())
        stat, path = await _find(clips, key)
        etag = f'"{stat.etag}"'
        headers = {
            "ETag": etag,
            "Cache-Control": "private, no-transform",
            "X-Content-Type-Options": "nosniff",
        }
        if disposition is not None:
            headers["Content-Disposition"] = disposition
        known = request.headers.get("if-none-match", "")
        if known.strip() == "*" or etag in known:
            return Response(status_code=304, headers=headers)
        _tidy_range(request, stat.size_bytes)
        return FileResponse(path, media_type=content_type(key), headers=headers)

    return router


async def _find(clips: SignedClips, key: str) -> tuple[ObjectStat, FilePath]:
    def find() -> tuple[ObjectStat, FilePath]:
        return clips.local.store.stat(key), clips.local.store.path(key)

    try:
        return await asyncio.get_running_loop().run_in_executor(clips.executor, find)
    except ObjectNotFound as error:
        raise ClipNotFound from error


def _tidy_range(request: Request, size_bytes: int) -> None:
    """Leave only a single range that can be answered; RFC 9110 lets a server ignore any other.

    Raises RangeNotSatisfiable for a single range behind the end.
    """
    sent = request.headers.get("range")
    if sent is None:
        return
    match = _RANGE.fullmatch(sent)
    first, last, suffix = match.groups(default="") if match else ("", "", "")
    reversed_range = bool(first and last) and int(last) < int(first)
    if match is None or reversed_range:
        request.scope["headers"] = [(k, v) for k, v in request.scope["headers"] if k != b"range"]
    elif (first and int(first) >= size_bytes) or (suffix and int(suffix) == 0):
        raise RangeNotSatisfiable(size_bytes)
