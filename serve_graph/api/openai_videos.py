"""`/v1/videos`: OpenAI's Videos API over the job service. A video's id is its job's."""

import json
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from schemas.errors import ClipGone, ClipNotFound, FieldError, InvalidRequest, WanError
from schemas.jobs import Job, JobState
from schemas.model_profile import ModelProfile
from schemas.openai_videos import VIDEO_NUMBERS, ErrorAnswer, Video, VideoCreate, VideoDeleted, VideoList
from serve_graph.api.auth import Authenticator
from serve_graph.api.context import context_of
from serve_graph.api.documented import API_KEY, RETRY_STATUSES, header
from serve_graph.api.prefer import IDEMPOTENCY_KEY, idempotency_key
from serve_graph.api.problems import field_errors
from serve_graph.health import HealthMonitor
from serve_graph.jobs import JobService
from serve_graph.jobs.service import MAX_PAGE

POLL_AFTER: Final = "openai-poll-after-ms"
MIN_POLL_MS: Final = 250
MAX_POLL_MS: Final = 5_000
UNKNOWN_POLL_MS: Final = 500

KEY_STATUSES: Final = (401, 403, 429)

_JSON_NUMBER: Final = re.compile(r"-?(?:0|[1-9][0-9]{0,17})(\.[0-9]{1,18})?([eE][+-]?[0-9]{1,3})?")

VideoId = Annotated[str, Path(examples=["job_" + "0" * 32])]


def openai_routes(
    jobs: JobService,
    health: HealthMonitor,
    profile: ModelProfile,
    authenticator: Authenticator,
    clip_retention: timedelta | None,
) -> APIRouter:
    """Everything under `/v1/videos`. clip_retention: how long clips are kept; None: for ever."""
    router = APIRouter(prefix="/v1/videos", tags=["OpenAI"])
    hint = {POLL_AFTER: header("When to look again, in milliseconds.", "integer", required=False)}

    def key_on(route: str) -> list[Any]:
        return API_KEY if authenticator.asks_on("/v1/videos" + route) else []

    def answer(job: Job, response: Response) -> Video:
        if not job.state.is_terminal:
            response.headers[POLL_AFTER] = str(poll_after_ms(job))
        return Video.of(job, clip_retention)

    @router.post(
        "",
        response_model=Video,
        responses={200: {"headers": hint}, **errors(*KEY_STATUSES, 400, 404, 413, 500, 503, 507)},
        openapi_extra={"parameters": [IDEMPOTENCY_KEY], "requestBody": _request_body()},
        dependencies=key_on(""),
    )
    async def create_video(request: Request, response: Response) -> Video:
        """Make a video: a job, answered at once."""
        context = context_of(request.scope)
        key, wanted = idempotency_key(request), await _wanted(request, profile)
        await health.require_ready()
        record = await jobs.submit(wanted.request(profile), context.request_id, context.principal, idempotency_key=key)
        context.job_id = record.job_id
        context.prompt_hash = record.prompt_hash
        context.parameters = record.parameters
        return answer(await jobs.job(record.job_id, context.principal), response)

    @router.get(
        "", response_model=VideoList, responses=errors(*KEY_STATUSES, 400, 404, 500, 503), dependencies=key_on("")
    )
    async def list_videos(
        request: Request,
        after: Annotated[str | None, Query(description="`last_id` of the page before.")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 20,
        order: Annotated[Literal["asc", "desc"], Query(description="`desc` only: newest first.")] = "desc",
    ) -> VideoList:
        """This API key's videos, newest first; those of batches are not among them."""
        if order == "asc":
            message = "videos are listed newest first; legal: desc"
            raise InvalidRequest([FieldError(field="order", message=message, legal="desc")])
        page = await jobs.jobs(context_of(request.scope).principal, limit=limit, after_job=after)
        videos = tuple(Video.of(job, clip_retention) for job in page.jobs)
        ids = [video.id for video in videos]
        return VideoList(
            data=videos,
            first_id=ids[0] if ids else None,
            last_id=ids[-1] if ids else None,
            has_more=page.next_cursor is not None,
        )

    @router.get(
        "/{video_id}",
        response_model=Video,
        responses={200: {"headers": hint}, **errors(*KEY_STATUSES, 400, 404, 500, 503)},
        dependencies=key_on("/{video_id}"),
    )
    async def get_video(request: Request, response: Response, video_id: VideoId) -> Video:
        """How a video is doing. One that failed is a 200 whose status says so."""
        return answer(await jobs.job(video_id, context_of(request.scope).principal), response)

    @router.delete(
        "/{video_id}",
        response_model=VideoDeleted,
        responses=errors(*KEY_STATUSES, 400, 404, 409, 500, 503),
        dependencies=key_on("/{video_id}"),
    )
    async def delete_video(request: Request, video_id: VideoId) -> VideoDeleted:
        """Delete a video that is completed or failed, and its files."""
        await jobs.delete(video_id, context_of(request.scope).principal)
        return VideoDeleted(id=video_id)

    @router.get(
        "/{video_id}/content",
        status_code=302,
        response_class=Response,
        responses={
            302: {"description": "To a freshly signed URL.", "headers": {"Location": header("The signed URL.")}},
            **errors(*KEY_STATUSES, 400, 404, 500, 503, 507),
        },
        dependencies=key_on("/{video_id}/content"),
    )
    async def get_content(
        request: Request,
        video_id: VideoId,
        variant: Annotated[
            Literal["video", "thumbnail", "spritesheet"], Query(description="`video` (MP4) or `thumbnail` (JPEG).")
        ] = "video",
    ) -> Response:
        """Redirect to the video, or to its first frame."""
        if variant == "spritesheet":
            message = "no spritesheet is made here; legal: video, thumbnail"
            raise InvalidRequest([FieldError(field="variant", message=message, legal="video, thumbnail")])
        principal = context_of(request.scope).principal
        job = await jobs.job(video_id, principal)
        if job.clip is None:
            raise _without_content(job)
        url = job.clip.output_url
        if variant == "thumbnail":
            url = (await jobs.thumbnail_url(video_id, principal)).url
        return RedirectResponse(url, status_code=302, headers={"Cache-Control": "no-store"})

    return router


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entries for the errors that a route under `/v1/` may answer with."""
    retry = {"headers": {"Retry-After": header("Seconds to wait.", "integer")}}
    return {
        status: {"model": ErrorAnswer, "description": "An error", **(retry if status in RETRY_STATUSES else {})}
        for status in statuses
    }


def poll_after_ms(job: Job) -> int:
    """When to look at a job again: after a tenth of what is left, since the SDK keeps the first hint that it gets."""
    if job.seconds_left is None:
        return UNKNOWN_POLL_MS
    return round(min(MAX_POLL_MS, max(MIN_POLL_MS, job.seconds_left * 100)))


def _without_content(job: Job) -> WanError:
    if job.state is JobState.SUCCEEDED:
        return ClipGone()
    if job.state.is_terminal:
        return ClipNotFound("the video failed, so it has no content")
    return ClipNotFound("the video is not ready yet; GET /v1/videos/{video_id} tells its status")


def _request_body() -> dict[str, Any]:
    """For the OpenAPI document: one route takes both forms of the same fields."""
    schema = VideoCreate.model_json_schema()
    forms = ("multipart/form-data", "application/json")
    return {"required": True, "content": {media_type: {"schema": schema} for media_type in forms}}


async def _wanted(request: Request, profile: ModelProfile) -> VideoCreate:
    """The request's fields, from JSON or a form. Raises InvalidRequest."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if media_type == "application/json":
            return VideoCreate.model_validate_json(await request.body())
        if media_type == "multipart/form-data":
            return VideoCreate.model_validate(await _form(request))
    except ValidationError as error:
        mistakes = error.errors(include_url=False, include_context=False, include_input=False)
        raise InvalidRequest(field_errors(mistakes, profile)) from None  # what it quotes is private
    raise _bad_body("must be sent as multipart/form-data or application/json")


async def _form(request: Request) -> Mapping[str, Any]:
    """A form's fields, those that are numbers as numbers. Raises InvalidRequest."""
    body = await request.body()
    fields: dict[str, Any] = {}
    try:
        async with request.form() as form:
            for name, value in form.multi_items():
                if name in fields:
                    raise InvalidRequest([FieldError(field=name[:64], message="is given twice")])
                if isinstance(value, UploadFile) and name != "input_reference":
                    raise InvalidRequest([FieldError(field=name[:64], message="must be text, not a file")])
                fields[name] = _field(name, value) if isinstance(value, str) else value
        body.decode()  # Starlette would read other bytes as Latin-1
    except HTTPException:
        raise _bad_body("is not valid multipart/form-data") from None
    except UnicodeDecodeError:
        if "input_reference" not in fields:
            raise _bad_body("is not valid UTF-8") from None
    return fields


def _field(name: str, text: str) -> Any:
    """A form's text as what JSON would have there; where it is no such thing, as it is, to be refused."""
    if name == "loras":
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    return _number(text) if name in VIDEO_NUMBERS else text


def _number(text: str) -> int | float | str:
    """A number as JSON writes it; any other text as it is, to be refused."""
    match = _JSON_NUMBER.fullmatch(text)
    if match is None:
        return text
    return int(text) if match[1] is None and match[2] is None else float(text)


def _bad_body(message: str) -> InvalidRequest:
    return InvalidRequest([FieldError(field="body", message=message)])
