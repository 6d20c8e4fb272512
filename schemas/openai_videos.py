"""The OpenAI Videos wire format: what `/v1/videos` takes and answers, over the jobs that everything else is about.

Field names, types and the four statuses are those that the `openai` SDK reads (`openai.types.video`). Fields
beyond them are the ones that other servers of this format share. Knows no HTTP framework.
"""

import re
from datetime import datetime, timedelta
from typing import Annotated, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic.json_schema import SkipJsonSchema

from schemas.errors import FieldError, InvalidRequest, Problem
from schemas.jobs import Job, JobState, Progress
from schemas.loras import AppliedLora
from schemas.model_profile import ModelProfile
from schemas.presets import PresetName
from schemas.requests import MAX_SEED, Float, GenerateRequest, Int, Loras, Prompt, Text

VideoStatus = Literal["queued", "in_progress", "completed", "failed"]
"""All there are: the SDK's `poll()` returns at any other."""

STATUS_OF: Final[dict[JobState, VideoStatus]] = {
    JobState.QUEUED: "queued",
    JobState.PREPARING: "queued",
    JobState.RUNNING: "in_progress",
    JobState.SUCCEEDED: "completed",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "failed",
    JobState.DELETED: "failed",
}

DENOISED_PERCENT: Final = 90
"""`progress` once the last step is done. The rest is the decode's."""

STATUS_FOR: Final[dict[int, int]] = {422: 400, 410: 404}
"""OpenAI refuses fields with 400 (the SDK's BadRequestError) and answers 404 for a deleted video."""

VIDEO_NUMBERS: Final = frozenset(
    {"num_inference_steps", "guidance_scale", "flow_shift", "seed", "fps", "num_frames", "width", "height"}
)
"""The fields of `VideoCreate` that are numbers, for forms, which have text only."""

_SECONDS: Final = re.compile(r"[0-9]{1,4}(\.[0-9]{1,6})?")


def _no_image(value: object) -> object:
    if value is not None:
        raise ValueError("is not taken: the model makes videos from text only")
    return value


Word = Annotated[str, Field(strict=True), WithJsonSchema({"type": "string"})]
NoImage = Annotated[None, BeforeValidator(_no_image)]


class VideoCreate(BaseModel):
    """What `POST /v1/videos` takes, as JSON or as the fields of a form."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    prompt: Prompt = Field(description="What to show.", examples=["a red circle moving left"])
    model: Word | None = Field(default=None, description="The served profile's name, where it is given.")
    seconds: Word | None = Field(default=None, description='Such as "1"; (num_frames - 1) / fps.', examples=["1"])
    size: Word | None = Field(default=None, description='Width x height, such as "832x480".')
    input_reference: SkipJsonSchema[NoImage] = None
    negative_prompt: Text | None = Field(default=None, description="What to avoid; the model's own when absent.")
    num_inference_steps: Int | None = Field(default=None, ge=1)
    guidance_scale: Float | None = Field(default=None, description="1 turns guidance off.")
    flow_shift: Float | None = Field(default=None)
    seed: Int | None = Field(default=None, ge=0, le=MAX_SEED, description="Drawn and reported when absent.")
    fps: Int | None = Field(default=None, ge=1)
    num_frames: Int | None = Field(default=None, ge=1, description="Instead of `seconds`; 4k+1.")
    width: Int | None = Field(default=None, ge=1, description="Pixels, with `height`, instead of `size`.")
    height: Int | None = Field(default=None, ge=1, description="Pixels, with `width`.")

    preset: PresetName | None = Field(default=None, description="As `POST /generate` takes it.")
    loras: Loras | None = Field(default=None, description="As `POST /generate` takes them; in a form, as JSON text.")

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> "VideoCreate":
        if self.seconds is not None and self.num_frames is not None:
            raise ValueError("give seconds or num_frames, not both")
        if (self.width is None) != (self.height is None):
            raise ValueError("width and height go together")
        if self.size is not None and self.width is not None:
            raise ValueError("give size, or width and height, not both")
        return self

    def request(self, profile: ModelProfile) -> GenerateRequest:
        """The same in our words. Raises InvalidRequest for a model, size or length that isn't the profile's.

        Everything else is left to `ModelProfile.resolve`.
        """
        mistakes: list[FieldError] = []
        if self.model not in (None, profile.name):
            legal = f"{profile.name}, or nothing"
            mistakes.append(FieldError(field="model", message=f"is not served here; legal: {legal}", legal=legal))
        width, height = _pixels(self.size, profile, mistakes) if self.size is not None else (self.width, self.height)
        duration = None
        if self.seconds is not None:
            duration = _duration(self.seconds, self.fps or profile.defaults.fps, profile, mistakes)
        if mistakes:
            raise InvalidRequest(mistakes)
        return GenerateRequest(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            duration=duration,
            num_frames=self.num_frames,
            width=width,
            height=height,
            fps=self.fps,
            seed=self.seed,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            flow_shift=self.flow_shift,
            preset=self.preset,
            loras=self.loras,
        )


def _pixels(size: str, profile: ModelProfile, mistakes: list[FieldError]) -> tuple[int | None, int | None]:
    sizes = {f"{known.width}x{known.height}": (known.width, known.height) for known in profile.resolutions}
    if size in sizes:
        return sizes[size]
    legal = "one of " + ", ".join(sizes)
    mistakes.append(FieldError(field="size", message=f"is not a size of {profile.name}; legal: {legal}", legal=legal))
    return None, None


def _duration(text: str, fps: int, profile: ModelProfile, mistakes: list[FieldError]) -> float | None:
    """Seconds as a number. With an `fps` that is not legal any will do: the profile refuses that."""
    counts = profile.frame_counts()
    if _SECONDS.fullmatch(text):
        seconds = float(text)
        if fps not in profile.fps or any(abs(count - (seconds * fps + 1)) < 1e-6 for count in counts):
            return seconds
    whole = [str(seconds) for seconds in range(1, counts[-1] // fps + 1) if seconds * fps + 1 in counts]
    legal = ", ".join([*whole, f"(num_frames - 1) / {fps} with num_frames {profile.legal('num_frames')}"])
    message = f"is not a legal length at {fps} fps; legal: {legal}"
    mistakes.append(FieldError(field="seconds", message=message, legal=legal))
    return None


class VideoError(BaseModel):
    """Why a video failed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    code: str = Field(description="A problem's name with underscores, such as `job_cancelled`.")
    message: str


class Video(BaseModel):
    """A job as OpenAI's clients see it; those behind `error` are fields beyond OpenAI's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    object: Literal["video"] = "video"
    model: str
    status: VideoStatus
    progress: int = Field(description="Percent.")
    created_at: int = Field(description="Unix seconds, like the other two.")
    completed_at: int | None = Field(description="When it ended.")
    expires_at: int | None = Field(description="When its files are deleted; null: never, or not known yet.")
    prompt: str
    seconds: str
    size: str
    remixed_from_video_id: None = None
    error: VideoError | None = Field(description="Once it failed.")
    negative_prompt: str
    num_frames: int
    fps: int
    seed: int
    num_inference_steps: int
    guidance_scale: float
    flow_shift: float
    preset: PresetName
    loras: tuple[AppliedLora, ...]
    inference_time_s: float | None = Field(description="Text encoding, denoising and decoding, once it is completed.")

    @classmethod
    def of(cls, job: Job, clip_retention: timedelta | None = None) -> "Video":
        """The job in this format. clip_retention: how long clips are kept; None: for ever."""
        parameters = job.parameters
        ended_at = job.at[job.state] if job.state.is_terminal else None
        expires_at = None
        if ended_at is not None and job.state is JobState.SUCCEEDED and clip_retention is not None:
            expires_at = _unix(ended_at + clip_retention)
        timings = None if job.clip is None else job.clip.timings
        return cls(
            id=job.job_id,
            model=job.model,
            status=STATUS_OF[job.state],
            progress=_percent(job.state, job.progress),
            created_at=_unix(job.created_at),
            completed_at=None if ended_at is None else _unix(ended_at),
            expires_at=expires_at,
            seconds=f"{parameters.duration:g}",
            size=f"{parameters.width}x{parameters.height}",
            error=None if job.error is None else VideoError(code=_code(job.error.name), message=job.error.detail),
            inference_time_s=None if timings is None else timings.preprocess + timings.denoise + timings.decode,
            **parameters.model_dump(include=_ECHOED),
        )


_ECHOED: Final = {
    *("prompt", "negative_prompt", "num_frames", "fps", "seed"),
    *("num_inference_steps", "guidance_scale", "flow_shift", "preset", "loras"),
}


class VideoList(BaseModel):
    """One page of videos, newest first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    object: Literal["list"] = "list"
    data: tuple[Video, ...]
    first_id: str | None
    last_id: str | None = Field(description="`after` of the next page.")
    has_more: bool


class VideoDeleted(BaseModel):
    """The answer to a delete."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class ErrorDetail(BaseModel):
    """What is wrong, in OpenAI's words."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    message: str
    type: str = Field(description="The kind of error: `invalid_request_error`, `server_error` …")
    param: str | None = Field(description="The first field that was refused.")
    code: str | None = Field(description="A problem's name with underscores.")


class ErrorAnswer(BaseModel):
    """Every error under `/v1/`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    error: ErrorDetail

    @classmethod
    def of(cls, problem: Problem) -> "ErrorAnswer":
        """A problem in this format; `STATUS_FOR` has the statuses that differ."""
        fields = [_name(error.field) for error in problem.errors or ()]
        message = problem.detail
        if problem.name == InvalidRequest.name and problem.errors:
            message = "; ".join(f"{name}: {error.message}" for name, error in zip(fields, problem.errors, strict=True))
        param = fields[0] if fields and fields[0] != "body" else None
        code = None if problem.name == problem.type else _code(problem.name)
        return cls(error=ErrorDetail(message=message, type=_type(problem.status), param=param, code=code))


def _unix(moment: datetime) -> int:
    return int(moment.timestamp())


def _percent(state: JobState, progress: Progress | None) -> int:
    """0 until it runs; denoising up to `DENOISED_PERCENT`, decoding up to 99, and 100 for what is completed."""
    if state is JobState.SUCCEEDED:
        return 100
    if state is not JobState.RUNNING or progress is None:
        return 0
    done = min(1.0, progress.step / max(1, progress.steps))
    if progress.stage == "denoise":
        return int(DENOISED_PERCENT * done)
    return DENOISED_PERCENT + int((99 - DENOISED_PERCENT) * done)


def _code(name: str) -> str:
    return name.replace("-", "_")


def _name(field: str) -> str:
    """A field's name without the part of the request it was in."""
    return re.sub(r"^(query|path|header)\.", "", field)


def _type(status: int) -> str:
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    return kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
