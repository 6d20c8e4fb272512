"""The error tree and its wire form (RFC 9457). Knows nothing of HTTP frameworks, stores or models.

    WanError
    ├── InvalidRequest          422  invalid-request      a field is missing, malformed or not legal
    ├── PromptTooLong           422  prompt-too-long      more tokens than the text encoder takes
    ├── Unauthorized            401  unauthorized         no API key, or an unknown one; WWW-Authenticate
    ├── Forbidden               403  forbidden            the API key's role doesn't allow this
    ├── RouteNotFound           404  route-not-found
    ├── MethodNotAllowed        405  method-not-allowed
    ├── ClipNotFound            404  clip-not-found
    ├── JobNotFound             404  job-not-found
    ├── BatchNotFound           404  batch-not-found
    ├── ClipGone                410  clip-gone            deleted, or past its retention
    ├── JobGone                 410  job-gone             deleted, or past its retention
    ├── BatchGone               410  batch-gone           past its retention
    ├── JobNotEnded             409  job-not-ended        only an ended job can be deleted
    ├── IdempotencyMismatch     422  idempotency-mismatch  the Idempotency-Key was used for another request
    ├── BodyTooLarge            413  body-too-large
    ├── UrlInvalid              403  url-invalid          signature missing, tampered or not ours
    ├── UrlExpired              403  url-expired
    ├── RangeNotSatisfiable     416  range-not-satisfiable
    ├── QueueFull               429  queue-full           Retry-After
    ├── QuotaExceeded           429  quota-exceeded       as many jobs or batches of this API key as may; Retry-After
    ├── RateLimited             429  rate-limited         this API key's requests per minute; Retry-After
    ├── JobCancelled            409  job-cancelled
    ├── Unavailable             503  unavailable
    │   ├── ModelNotReady       503  model-not-ready      Retry-After
    │   ├── ShuttingDown        503  shutting-down        Retry-After
    │   ├── StoreUnavailable    503  store-unavailable    Retry-After
    │   └── WorkerLost          503  worker-lost          the process that rendered it went away; Retry-After
    ├── DeadlineExceeded        504  deadline-exceeded    not done when the request's own deadline came
    ├── StoreFull               507  store-full
    ├── RunTimeExceeded         504  run-time-exceeded    the job ran for longer than a job may
    ├── OutOfMemory             500  out-of-memory        this job alone did not fit
    ├── RenderFailed            500  render-failed        the model or the encoder failed on this job
    ├── InternalError           500  internal-error       anything else; the log has it under the request id
    └── RecordedFailure     500                       a job's problem, read back: answers as what was recorded

Every constructor passes its arguments positionally to `Exception.__init__`, so that an error survives
pickling over a Ray handle. `detail` is shown to clients: it never names a path, a key or a prompt.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

PROBLEM_MEDIA_TYPE = "application/problem+json"
PROBLEM_TYPE_PREFIX = "urn:wan-serve:problem:"

MAX_MISTAKES_IN_DETAIL = 32
"""A batch can have thousands; `errors` has all of them."""


class FieldError(BaseModel):
    """One field that was refused, and what would have been accepted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    field: str = Field(description="The field's name in the request body; `body` for the whole of it.")
    message: str
    legal: str | None = Field(default=None, description="What the field may hold.")
    nearest: tuple[float | int | str, ...] | None = Field(
        default=None, description="The legal values nearest to the one that was sent."
    )


class Problem(BaseModel):
    """An RFC 9457 problem document (`application/problem+json`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: str = Field(examples=[PROBLEM_TYPE_PREFIX + "invalid-request"])
    title: str = Field(examples=["The request is not valid"])
    status: int = Field(examples=[422])
    detail: str
    request_id: str | None = None
    job_id: str | None = None
    errors: tuple[FieldError, ...] | None = None
    retry_after_s: int | None = None

    @property
    def name(self) -> str:
        """The type without its prefix: a bounded label for logs and metrics."""
        return self.type.removeprefix(PROBLEM_TYPE_PREFIX)


class WanError(Exception):
    """The root. Subclasses set `name`, `title` and `status`; `args[0]` is the detail unless they say otherwise."""

    name: ClassVar[str] = "internal-error"
    title: ClassVar[str] = "Internal error"
    status: ClassVar[int] = 500

    def __init__(self, detail: str, *args: Any) -> None:
        super().__init__(detail, *args)

    @property
    def detail(self) -> str:
        return str(self.args[0])

    @property
    def errors(self) -> tuple[FieldError, ...] | None:
        return None

    @property
    def retry_after_s(self) -> int | None:
        return None

    def __str__(self) -> str:
        return self.detail

    def problem(self, request_id: str | None = None, job_id: str | None = None) -> Problem:
        """The wire form of this error."""
        return Problem(
            type=PROBLEM_TYPE_PREFIX + self.name,
            title=self.title,
            status=self.status,
            detail=self.detail,
            request_id=request_id,
            job_id=job_id,
            errors=self.errors,
            retry_after_s=self.retry_after_s,
        )


class InvalidRequest(WanError):
    """One or more fields were refused. `args[0]` holds the `FieldError`s."""

    name = "invalid-request"
    title = "The request is not valid"
    status = 422

    def __init__(self, errors: Sequence[FieldError]) -> None:
        Exception.__init__(self, tuple(errors))

    @property
    def errors(self) -> tuple[FieldError, ...]:
        return self.args[0]  # type: ignore[no-any-return]  # set by __init__ above

    @property
    def detail(self) -> str:
        told = "; ".join(f"{error.field}: {error.message}" for error in self.errors[:MAX_MISTAKES_IN_DETAIL])
        more = len(self.errors) - MAX_MISTAKES_IN_DETAIL
        return f"{told}; and {more} more" if more > 0 else told


class PromptTooLong(WanError):
    """The prompt has more tokens than the text encoder takes; it is refused, never cut."""

    name = "prompt-too-long"
    title = "The prompt has too many tokens"
    status = 422

    def __init__(self, field: str, num_tokens: int, max_tokens: int) -> None:
        Exception.__init__(self, field, num_tokens, max_tokens)

    @property
    def detail(self) -> str:
        field, num_tokens, max_tokens = self.args
        return f"{field} has {num_tokens} tokens; this model takes at most {max_tokens}"

    @property
    def errors(self) -> tuple[FieldError, ...]:
        field, num_tokens, max_tokens = self.args
        return (FieldError(field=field, message=f"{num_tokens} tokens", legal=f"at most {max_tokens} tokens"),)


class Unauthorized(WanError):
    name = "unauthorized"
    title = "An API key is needed"
    status = 401

    def __init__(self, detail: str = "send an API key: Authorization: Bearer <key>") -> None:
        super().__init__(detail)


class Forbidden(WanError):
    name = "forbidden"
    title = "This API key may not do that"
    status = 403

    def __init__(self, detail: str = "this API key may read health, metrics and the models only") -> None:
        super().__init__(detail)


class RouteNotFound(WanError):
    name = "route-not-found"
    title = "No such route"
    status = 404


class MethodNotAllowed(WanError):
    name = "method-not-allowed"
    title = "Method not allowed"
    status = 405


class ClipNotFound(WanError):
    name = "clip-not-found"
    title = "No such clip"
    status = 404

    def __init__(self, detail: str = "there is no clip with this id") -> None:
        super().__init__(detail)


class JobNotFound(WanError):
    name = "job-not-found"
    title = "No such job"
    status = 404

    def __init__(self, detail: str = "there is no job with this id") -> None:
        super().__init__(detail)


class BatchNotFound(WanError):
    name = "batch-not-found"
    title = "No such batch"
    status = 404

    def __init__(self, detail: str = "there is no batch with this id") -> None:
        super().__init__(detail)


class ClipGone(WanError):
    name = "clip-gone"
    title = "The clip was deleted"
    status = 410

    def __init__(self, detail: str = "this clip was deleted, or its time is over") -> None:
        super().__init__(detail)


class JobGone(WanError):
    name = "job-gone"
    title = "The job was deleted"
    status = 410

    def __init__(self, detail: str = "this job was deleted, or its time is over") -> None:
        super().__init__(detail)


class BatchGone(WanError):
    name = "batch-gone"
    title = "The batch was deleted"
    status = 410

    def __init__(self, detail: str = "this batch was deleted, or its time is over") -> None:
        super().__init__(detail)


class JobNotEnded(WanError):
    name = "job-not-ended"
    title = "The job has not ended"
    status = 409

    def __init__(self, detail: str = "cancel the job first: only one that has ended can be deleted") -> None:
        super().__init__(detail)


class IdempotencyMismatch(WanError):
    name = "idempotency-mismatch"
    title = "The Idempotency-Key was used for another request"
    status = 422

    def __init__(self, detail: str = "this Idempotency-Key came with another body before: use a new key") -> None:
        super().__init__(detail)


class BodyTooLarge(WanError):
    name = "body-too-large"
    title = "The request body is too large"
    status = 413

    def __init__(self, max_bytes: int) -> None:
        Exception.__init__(self, max_bytes)

    @property
    def detail(self) -> str:
        return f"the request body may hold at most {self.args[0]} bytes"


class UrlInvalid(WanError):
    name = "url-invalid"
    title = "The URL's signature is not valid"
    status = 403

    def __init__(self, detail: str = "ask GET /outputs/{clip_id} for a new URL") -> None:
        super().__init__(detail)


class UrlExpired(WanError):
    name = "url-expired"
    title = "The URL has expired"
    status = 403

    def __init__(self, detail: str = "ask GET /outputs/{clip_id} for a new URL") -> None:
        super().__init__(detail)


class RangeNotSatisfiable(WanError):
    """The Range header asks for bytes behind the end."""

    name = "range-not-satisfiable"
    title = "The range is not satisfiable"
    status = 416

    def __init__(self, size_bytes: int) -> None:
        Exception.__init__(self, size_bytes)

    @property
    def size_bytes(self) -> int:
        return int(self.args[0])

    @property
    def detail(self) -> str:
        return f"the clip has {self.size_bytes} bytes"


class QueueFull(WanError):
    """Admission control: as many jobs wait as may."""

    name = "queue-full"
    title = "Too many jobs are waiting"
    status = 429

    def __init__(self, max_waiting_jobs: int, retry_after_s: int) -> None:
        Exception.__init__(self, max_waiting_jobs, retry_after_s)

    @property
    def detail(self) -> str:
        return f"{self.args[0]} jobs are waiting already; try again in {self.args[1]} s"

    @property
    def retry_after_s(self) -> int:
        return int(self.args[1])


class QuotaExceeded(WanError):
    """As many jobs, or batches, of one API key wait as may."""

    name = "quota-exceeded"
    title = "Too much of this API key is waiting"
    status = 429

    def __init__(self, allowed: int, retry_after_s: int, what: str = "jobs") -> None:
        Exception.__init__(self, allowed, retry_after_s, what)

    @property
    def retry_after_s(self) -> int:
        return int(self.args[1])

    @property
    def detail(self) -> str:
        allowed, seconds, what = self.args
        return f"{allowed} {what} of this API key are waiting already; try again in {seconds} s"


class RateLimited(WanError):
    """More requests of one API key within a minute than it may send."""

    name = "rate-limited"
    title = "Too many requests of this API key"
    status = 429

    def __init__(self, requests_per_minute: int, retry_after_s: int) -> None:
        Exception.__init__(self, requests_per_minute, retry_after_s)

    @property
    def detail(self) -> str:
        return f"this API key may send {self.args[0]} requests per minute; try again in {self.args[1]} s"

    @property
    def retry_after_s(self) -> int:
        return int(self.args[1])


class JobCancelled(WanError):
    name = "job-cancelled"
    title = "The job was cancelled"
    status = 409

    def __init__(self, detail: str = "the job was cancelled before it finished") -> None:
        super().__init__(detail)


class Unavailable(WanError):
    """Not now; the same request may work later. `args[1]` is Retry-After in seconds."""

    name = "unavailable"
    title = "Unavailable for now"
    status = 503

    def __init__(self, detail: str, retry_after_s: int = 5) -> None:
        super().__init__(detail, retry_after_s)

    @property
    def retry_after_s(self) -> int:
        return int(self.args[1])


class ModelNotReady(Unavailable):
    name = "model-not-ready"
    title = "The model is not ready"


class ShuttingDown(Unavailable):
    name = "shutting-down"
    title = "The service is shutting down"


class StoreUnavailable(Unavailable):
    name = "store-unavailable"
    title = "The object store does not answer"


class WorkerLost(Unavailable):
    name = "worker-lost"
    title = "The worker that rendered this job went away"


class DeadlineExceeded(WanError):
    """The request said after how many seconds its clip would be of no use."""

    name = "deadline-exceeded"
    title = "The job missed its deadline"
    status = 504

    def __init__(self, deadline_s: float) -> None:
        Exception.__init__(self, deadline_s)

    @property
    def detail(self) -> str:
        return f"the clip was not done within the request's deadline_s of {self.args[0]:g}"


class StoreFull(WanError):
    name = "store-full"
    title = "The object store is full"
    status = 507

    def __init__(self, detail: str = "there is no space left for the clip") -> None:
        super().__init__(detail)


class RunTimeExceeded(WanError):
    name = "run-time-exceeded"
    title = "The job ran for too long"
    status = 504

    def __init__(self, max_run_time_s: float) -> None:
        Exception.__init__(self, max_run_time_s)

    @property
    def detail(self) -> str:
        return f"a job may run for {self.args[0]:g} s"


class OutOfMemory(WanError):
    name = "out-of-memory"
    title = "The job does not fit into memory"
    status = 500

    def __init__(self, detail: str = "ask for fewer frames or a smaller resolution") -> None:
        super().__init__(detail)


class RenderFailed(WanError):
    name = "render-failed"
    title = "Rendering failed"
    status = 500


class InternalError(WanError):
    name = "internal-error"
    title = "Internal error"
    status = 500

    def __init__(self, detail: str = "something went wrong here; the log has it under this request id") -> None:
        super().__init__(detail)


class RecordedFailure(WanError):
    """A job's failure, read back from its record: answers with the problem that was recorded."""

    def __init__(self, recorded: Problem) -> None:
        Exception.__init__(self, recorded)

    @property
    def detail(self) -> str:
        return self.recorded.detail

    @property
    def recorded(self) -> Problem:
        return self.args[0]  # type: ignore[no-any-return]  # set by __init__ above

    def problem(self, request_id: str | None = None, job_id: str | None = None) -> Problem:
        return self.recorded.model_copy(update={"request_id": request_id, "job_id": job_id or self.recorded.job_id})
