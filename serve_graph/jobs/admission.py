"""Which requests become jobs: what the model can't serve, and what there is no room for, is refused. Writes nothing."""

from datetime import timedelta

from schemas.errors import (
    FieldError,
    InvalidRequest,
    QueueFull,
    QuotaExceeded,
)
from schemas.model_profile import ModelProfile
from schemas.requests import GenerateRequest, GenerationParameters, url_ttl
from serve_graph.api_keys import Principal
from serve_graph.jobs.limits import QueueLimits
from serve_graph.jobs.running import Running
from serve_graph.prompts import clean_prompt, surely_fits
from serve_graph.service_plan import ServicePlan
from serve_graph.webhooks.policy import WebhookPolicy, check_webhook_url

MAX_RETRY_AFTER_S = 600


class Admission:
    """default_url_ttl, clip_retention: a URL never outlives its clip. plan: what fits into the device's memory."""

    def __init__(
        self,
        running: Running,
        profile: ModelProfile,
        limits: QueueLimits,
        webhook_policy: WebhookPolicy,
        *,
        default_url_ttl: timedelta,
        clip_retention: timedelta | None,
        plan: ServicePlan,
    ) -> None:
        self._running = running
        self._profile = profile
        self._limits = limits
        self._webhook_policy = webhook_policy
        self._default_url_ttl = default_url_ttl
        self._clip_retention = clip_retention
        self._plan = plan

    def check(self, request: GenerateRequest) -> tuple[GenerationParameters, bool]:
        """Everything the output depends on, and whether no text can be too long. Raises InvalidRequest."""
        parameters = self._profile.resolve(request)
        if request.webhook_url is not None:
            check_webhook_url(request.webhook_url, self._webhook_policy)
        self._refuse_url_beyond_clip(request)
        self._refuse_beyond_memory(parameters)
        cleaned = clean_prompt(parameters.prompt)
        if not cleaned:
            raise InvalidRequest([FieldError(field="prompt", message="is blank once it is cleaned as Wan does")])
        return parameters, self._surely_fits(cleaned, parameters)

    def _refuse_beyond_memory(self, parameters: GenerationParameters) -> None:
        fitting, frame = self._limits.max_clip_pixels, parameters.width * parameters.height
        if fitting is None:
            self._plan.refuse_what_does_not_fit(parameters)
            return
        if frame * parameters.num_frames <= fitting:
            return
        legal = f"at most {fitting // frame} frames of {parameters.width}x{parameters.height} fit into this device"
        raise InvalidRequest([FieldError(field="num_frames", message=f"too many; {legal}", legal=legal)])

    def _refuse_url_beyond_clip(self, request: GenerateRequest) -> None:
        kept = self._clip_retention
        if kept is not None and url_ttl(request, self._default_url_ttl) > kept:
            legal = f"up to {int(kept.total_seconds())}"
            mistake = FieldError(field="url_ttl_s", message=f"clips are deleted sooner; legal: {legal}", legal=legal)
            raise InvalidRequest([mistake])

    def admit(self, principal: Principal) -> None:
        waiting, allowed = self._running.queue().waiting, self._limits.max_waiting_jobs
        if waiting >= allowed:
            raise QueueFull(allowed, self._seconds_for(waiting))
        allowed = principal.max_waiting_jobs or allowed
        mine = self._running.census.waiting_of(principal.name)
        if mine >= allowed:
            raise QuotaExceeded(allowed, self._seconds_for(mine))

    def _seconds_for(self, num_jobs: int) -> int:
        seconds = self._running.line.seconds_for(num_jobs) if self._running.line.is_calibrated else num_jobs
        return min(MAX_RETRY_AFTER_S, max(1, round(seconds)))

    def _surely_fits(self, cleaned: str, parameters: GenerationParameters) -> bool:
        """Whether no text can be too long, so that the preprocessor need not be asked first."""
        limit = self._profile.max_sequence_length
        negative = parameters.negative_prompt
        return surely_fits(cleaned, limit) and (
            not parameters.does_guidance
            or negative == self._profile.defaults.negative_prompt
            or surely_fits(clean_prompt(negative), limit)
        )
