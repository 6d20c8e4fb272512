"""Every metric of the service: names, units, labels, buckets. Knows nothing of Ray, HTTP or models.

Each replica has a registry of its own (`new_registry`) and one class below that records into it; the ingress
takes a `snapshot` of every replica and `merge`s them into one exposition, in which each sample also carries
the labels `deployment` and `replica`. Labels are bounded here, whatever callers pass: routes are templates,
errors are names of the error tree, methods are HTTP's own.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from schemas.clips import Timings
from schemas.errors import (
    InternalError,
    ModelNotReady,
    ShuttingDown,
    StoreFull,
    StoreUnavailable,
    Unavailable,
    WanError,
    WorkerLost,
)
from schemas.jobs import JobState
from schemas.webhooks import WebhookState
from serve_graph.logs import UNMATCHED

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4
"""Of what `merge` returns. All names are legacy names, so every Prometheus reads this version."""

OTHER: Final = "OTHER"
"""The method label of a request whose method is none of HTTP's."""

METHODS: Final = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})
"""Source: RFC 9110, section 9, and RFC 5789."""

MAX_ROUTES: Final = 100
"""Far more templates than the API has; beyond it something passes raw paths, and those count as unmatched."""

WEBHOOK_OUTCOMES: Final[dict[WebhookState, str]] = {
    "delivered": "delivered",
    "waiting": "failed",
    "given_up": "given_up",
}
"""What an attempt was, by the state that it left its delivery in."""

STAGES: Final = tuple(name for name in Timings.model_fields if name != "total")

MetricType = Literal["counter", "gauge", "histogram"]

_SHORT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120)
"""Seconds of one model call: milliseconds for the tiny model, most of a minute for 14B at 720p."""

_LONG_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 900, 1200, 1800, 2700, 3600)
"""Seconds of whatever may hold a whole video: up to an hour."""

_BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_TOKENS = (4, 8, 16, 32, 64, 128, 256, 384, 512)


@dataclass(frozen=True)
class Family:
    """One metric: `name` as it is exposed (a counter's with `_total`), and its own labels."""

    name: str
    type: MetricType
    help: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...] = ()

    def counter(self, registry: CollectorRegistry) -> Counter:
        """This family as a counter of `registry`."""
        return Counter(self.name, self.help, self.labels, registry=registry)

    def gauge(self, registry: CollectorRegistry) -> Gauge:
        """This family as a gauge of `registry`."""
        return Gauge(self.name, self.help, self.labels, registry=registry)

    def histogram(self, registry: CollectorRegistry) -> Histogram:
        """This family as a histogram of `registry`."""
        return Histogram(self.name, self.help, self.labels, registry=registry, buckets=self.buckets)


def _counter(name: str, documentation: str, *labels: str) -> Family:
    return Family(name, "counter", documentation, labels)


def _gauge(name: str, documentation: str, *labels: str) -> Family:
    return Family(name, "gauge", documentation, labels)


def _histogram(name: str, buckets: tuple[float, ...], documentation: str, *labels: str) -> Family:
    return Family(name, "histogram", documentation, labels, buckets)


_HTTP_REQUESTS = _counter("wan_http_requests_total", "HTTP requests answered.", "route", "method", "status")
_HTTP_DURATION = _histogram(
    "wan_http_request_duration_seconds", _LONG_S, "Seconds until a request's answer was complete.", "route"
)
_JOBS = _counter("wan_jobs_total", "Jobs that ended; error is the problem's name.", "outcome", "error")
_JOB_DURATION = _histogram("wan_job_duration_seconds", _LONG_S, "Seconds from a job's creation to its end.", "outcome")
_JOB_STAGE = _histogram("wan_job_stage_seconds", _LONG_S, "Seconds a job that succeeded spent in a stage.", "stage")
_JOB_RETRIES = _counter("wan_job_retries_total", "Attempts begun anew since the last one's worker was lost.", "error")
_JOBS_WAITING = _gauge("wan_jobs_waiting", "Jobs that wait for a slot of the generator.")
_JOBS_RUNNING = _gauge("wan_jobs_running", "Jobs that hold a slot of the generator.")
_QUEUE_CAPACITY = _gauge("wan_queue_capacity", "Jobs that may wait before requests get a 429.")
_WEBHOOKS = _counter(
    "wan_webhook_deliveries_total",
    "Attempts to deliver a webhook: delivered, failed (another follows) or given_up.",
    "outcome",
)

_BATCHES = _counter("wan_batches_total", "Batches that ended.", "outcome")
_BATCHES_RUNNING = _gauge("wan_batches_running", "Batches that have not ended.")
_BATCH_JOBS_WAITING = _gauge("wan_batch_jobs_waiting", "Jobs of batches that have not begun.")
_CONTAINER_STARTS = _counter(
    "wan_container_starts_total", "Starts of a container's graph: fresh, restored, or rebuilt after a restore.", "start"
)
_ENCODE = _histogram("wan_prompt_encode_seconds", _SHORT_S, "Seconds the text encoder took for one batch.")
_ENCODE_BATCH = _histogram("wan_prompt_encode_batch_size", _BATCH_SIZES, "Texts in one text encoder batch.")
_CACHE_HITS = _counter("wan_embedding_cache_hits_total", "Texts whose embedding was in the cache.")
_CACHE_MISSES = _counter("wan_embedding_cache_misses_total", "Texts whose embedding was not in the cache.")
_CACHE_BYTES = _gauge("wan_embedding_cache_bytes", "Bytes that the cached embeddings take.")
_PROMPT_TOKENS = _histogram("wan_prompt_tokens", _TOKENS, "Tokens of a cleaned prompt.")

_STEP = _histogram("wan_step_seconds", _SHORT_S, "Seconds one denoising step of one step batch took.")
_STEP_BATCH = _histogram("wan_step_batch_size", _BATCH_SIZES, "Jobs that shared one denoising step.")
_FORWARDS = _counter(
    "wan_forwards_total", "Forwards of the transformer, with the prompt (cond) or without (uncond).", "kind"
)
_IN_FLIGHT = _gauge("wan_jobs_in_flight", "Jobs that the engine holds.")
_DEVICE_BUSY = _counter(
    "wan_device_busy_seconds_total", "Seconds in which the device's thread worked on jobs; the rest is its idle time."
)
_DEVICE_BLOCKED = _counter(
    "wan_device_blocked_seconds_total", "Seconds in which the device's thread waited for the encoder to take frames."
)
_WASTED_STEPS = _counter("wan_wasted_steps_total", "Steps of jobs that were then cancelled or failed.")
_UPLOAD_BYTES = _counter("wan_upload_bytes_total", "Bytes of clips that reached the store.")
_UPLOAD_ERRORS = _counter("wan_upload_errors_total", "Clips that did not reach the store.", "error")
_MODEL_INFO = _gauge("wan_model_info", "1 for the loaded model.", "profile", "revision", "dtype", "device")
_DEVICE_MEMORY = _gauge("wan_device_memory_used_bytes", "Bytes of the accelerator's memory in use.")

FAMILIES: Final = (
    *(_HTTP_REQUESTS, _HTTP_DURATION, _JOBS, _JOB_DURATION, _JOB_STAGE, _JOB_RETRIES),
    *(_JOBS_WAITING, _JOBS_RUNNING, _QUEUE_CAPACITY, _WEBHOOKS),
    *(_BATCHES, _BATCHES_RUNNING, _BATCH_JOBS_WAITING, _CONTAINER_STARTS),
    *(_ENCODE, _ENCODE_BATCH, _CACHE_HITS, _CACHE_MISSES, _CACHE_BYTES, _PROMPT_TOKENS),
    *(_STEP, _STEP_BATCH, _FORWARDS, _IN_FLIGHT, _DEVICE_BUSY, _DEVICE_BLOCKED, _WASTED_STEPS),
    *(_UPLOAD_BYTES, _UPLOAD_ERRORS, _MODEL_INFO, _DEVICE_MEMORY),
)


def _tree(root: type[WanError]) -> Iterator[type[WanError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


PROBLEMS: Final = {cls.name: cls.status for cls in _tree(WanError) if cls is not Unavailable}
"""The error tree's names, and their HTTP status: the only values of an `error` label but "".

`Unavailable`'s is left out: only its subclasses are raised.
"""


def error_label(name: str) -> str:
    """`name` where the error tree has it (or it is "", no error), else `internal-error`."""
    return name if name == "" or name in PROBLEMS else InternalError.name


def method_label(method: str) -> str:
    """`method` where it is one of HTTP's, else `OTHER`."""
    return method if method in METHODS else OTHER


class IngressMetrics:
    """What the ingress sees: requests, the ends of jobs, the queue, webhooks."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = _HTTP_REQUESTS.counter(registry)
        self._request_duration = _HTTP_DURATION.histogram(registry)
        self._jobs = _JOBS.counter(registry)
        self._job_duration = _JOB_DURATION.histogram(registry)
        self._stage = _JOB_STAGE.histogram(registry)
        self._retries = _JOB_RETRIES.counter(registry)
        self._waiting = _JOBS_WAITING.gauge(registry)
        self._running = _JOBS_RUNNING.gauge(registry)
        self._capacity = _QUEUE_CAPACITY.gauge(registry)
        self._webhooks = _WEBHOOKS.counter(registry)
        self._batches = _BATCHES.counter(registry)
        self._batches_running = _BATCHES_RUNNING.gauge(registry)
        self._batch_jobs_waiting = _BATCH_JOBS_WAITING.gauge(registry)
        self._container_starts = _CONTAINER_STARTS.counter(registry)
        self._routes: set[str] = set()
        self._start_at_zero()

    def request_answered(self, route: str | None, method: str, status: int, duration_s: float) -> None:
        """Record one answer. route: the template (`/jobs/{job_id}`), None when no route matched."""
        label = self._route_label(route)
        self._requests.labels(label, method_label(method), _status_label(status)).inc()
        self._request_duration.labels(label).observe(duration_s)

    def job_ended(self, outcome: JobState, duration_s: float, error: str = "", timings: Timings | None = None) -> None:
        """Record one job's end. error: the problem's name, "" for a success; timings: of a success.

        Raises: ValueError for a state that ends nothing.
        """
        if not outcome.is_terminal:
            raise ValueError(f"{outcome.value} is not the end of a job")
        self._jobs.labels(outcome.value, error_label(error)).inc()
        self._job_duration.labels(outcome.value).observe(duration_s)
        if timings is not None:
            for stage in STAGES:
                self._stage.labels(stage).observe(getattr(timings, stage))

    def job_retried(self, error: str) -> None:
        """Record one attempt that takes the place of a lost one. error: the name of what lost it."""
        self._retries.labels(error_label(error)).inc()

    def webhook_attempted(self, state: WebhookState) -> None:
        """Record one attempt to deliver a webhook. state: the delivery's, after it."""
        self._webhooks.labels(WEBHOOK_OUTCOMES[state]).inc()

    def set_queue(self, waiting: int, running: int, capacity: int) -> None:
        """Set the three gauges of the queue, in jobs."""
        self._waiting.set(waiting)
        self._running.set(running)
        self._capacity.set(capacity)

    def set_batches(self, running: int, jobs_waiting: int) -> None:
        """Set how many batches have not ended, and how many of their jobs have not begun."""
        self._batches_running.set(running)
        self._batch_jobs_waiting.set(jobs_waiting)

    def batch_ended(self, *, cancelled: bool) -> None:
        """Record one batch's end."""
        self._batches.labels("cancelled" if cancelled else "completed").inc()

    def container_started(self, start: str) -> None:
        """Record how a platform's container came up."""
        self._container_starts.labels(start).inc()

    def _route_label(self, route: str | None) -> str:
        if route is None or (route not in self._routes and len(self._routes) >= MAX_ROUTES):
            return UNMATCHED
        self._routes.add(route)
        return route

    def _start_at_zero(self) -> None:
        """Expose the failures worth an alert before the first one, or `increase()` never sees that one."""
        self._jobs.labels(JobState.SUCCEEDED.value, "")
        for outcome in ("completed", "cancelled"):
            self._batches.labels(outcome)
        for name, status in PROBLEMS.items():
            if status >= 500:
                self._jobs.labels(JobState.FAILED.value, name)
        for error in (WorkerLost, ModelNotReady, ShuttingDown):
            self._retries.labels(error.name)
        for outcome in WEBHOOK_OUTCOMES.values():
            self._webhooks.labels(outcome)


class PreprocessorMetrics:
    """What the prompt preprocessor sees: text encoding and its cache."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._encode = _ENCODE.histogram(registry)
        self._encode_batch = _ENCODE_BATCH.histogram(registry)
        self._hits = _CACHE_HITS.counter(registry)
        self._misses = _CACHE_MISSES.counter(registry)
        self._cache_bytes = _CACHE_BYTES.gauge(registry)
        self._tokens = _PROMPT_TOKENS.histogram(registry)

    def batch_encoded(self, duration_s: float, batch_size: int) -> None:
        """Record one call of the text encoder. batch_size: texts in it."""
        self._encode.observe(duration_s)
        self._encode_batch.observe(batch_size)

    def cache_hit(self) -> None:
        """Record one text whose embedding was there."""
        self._hits.inc()

    def cache_miss(self) -> None:
        """Record one text whose embedding was not there."""
        self._misses.inc()

    def set_cache_bytes(self, size_bytes: int) -> None:
        """Set how much the cached embeddings take."""
        self._cache_bytes.set(size_bytes)

    def prompt_tokenized(self, num_tokens: int) -> None:
        """Record one prompt's length in tokens."""
        self._tokens.observe(num_tokens)


class GeneratorMetrics:
    """What the engine sees: steps, forwards, uploads, the model and its device."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._step = _STEP.histogram(registry)
        self._step_batch = _STEP_BATCH.histogram(registry)
        self._forwards = _FORWARDS.counter(registry)
        self._in_flight = _IN_FLIGHT.gauge(registry)
        self._device_busy = _DEVICE_BUSY.counter(registry)
        self._device_blocked = _DEVICE_BLOCKED.counter(registry)
        self._wasted_steps = _WASTED_STEPS.counter(registry)
        self._upload_bytes = _UPLOAD_BYTES.counter(registry)
        self._upload_errors = _UPLOAD_ERRORS.counter(registry)
        self._model_info = _MODEL_INFO.gauge(registry)
        self._device_memory = _DEVICE_MEMORY.gauge(registry)
        self._start_at_zero()

    def step_done(self, duration_s: float, batch_size: int) -> None:
        """Record one denoising step. batch_size: jobs that shared it."""
        self._step.observe(duration_s)
        self._step_batch.observe(batch_size)

    def forward_done(self, kind: Literal["cond", "uncond"]) -> None:
        """Record one call of the transformer."""
        self._forwards.labels(kind).inc()

    def set_jobs_in_flight(self, num_jobs: int) -> None:
        """Set how many jobs the engine holds."""
        self._in_flight.set(num_jobs)

    def device_worked(self, duration_s: float) -> None:
        """Record one unit of work of the device's thread, whatever came of it."""
        self._device_busy.inc(duration_s)

    def device_waited(self, duration_s: float) -> None:
        """Record how long the device's thread waited until a job's encoder took its frames."""
        self._device_blocked.inc(duration_s)

    def steps_wasted(self, num_steps: int) -> None:
        """Record the steps of a job that was then cancelled or failed."""
        self._wasted_steps.inc(num_steps)

    def clip_uploaded(self, size_bytes: int) -> None:
        """Record one clip that reached the store."""
        self._upload_bytes.inc(size_bytes)

    def upload_failed(self, error: str) -> None:
        """Record one clip that did not reach the store. error: the problem's name."""
        self._upload_errors.labels(error_label(error) or InternalError.name).inc()

    def set_model(self, profile: str, revision: str | None, dtype: str, device: str) -> None:
        """Say which model is loaded; it replaces the one that was said before."""
        self._model_info.clear()
        self._model_info.labels(profile, revision or "", dtype, device).set(1)

    def set_device_memory_used(self, size_bytes: int) -> None:
        """Set how much of the accelerator's memory is in use."""
        self._device_memory.set(size_bytes)

    def _start_at_zero(self) -> None:
        """As in `IngressMetrics`: an alert has to see the first failure, too."""
        for kind in ("cond", "uncond"):
            self._forwards.labels(kind)
        for error in (InternalError, StoreFull, StoreUnavailable):
            self._upload_errors.labels(error.name)


def new_registry() -> CollectorRegistry:
    """A replica's own registry, with the process's CPU, memory and file descriptors (on Linux) in it."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


def snapshot(registry: CollectorRegistry) -> list[Metric]:
    """A picklable copy of everything in `registry`, as it crosses a Ray handle to the ingress.

    `_created` samples are left out here, not with `disable_created_metrics()`, which is global to a process.
    """
    return [_copy(metric, _without_created(metric)) for metric in registry.collect()]


def merge(snapshots: Iterable[tuple[str, str, Sequence[Metric]]]) -> bytes:
    """One exposition (text format 0.0.4) from (deployment, replica, snapshot) triples, in a fixed order.

    Where replicas of two releases disagree about a family's type or help, the first replica's word holds and
    samples of another type are left out, since a scrape with both would be refused as a whole.

    Raises: ValueError when a replica is there twice: its samples would be, too.
    """
    ordered = sorted(snapshots, key=lambda item: item[:2])
    names = [item[:2] for item in ordered]
    if len(set(names)) != len(names):
        raise ValueError("two snapshots have the same deployment and replica")
    families: dict[str, Metric] = {}
    for deployment, replica, metrics in ordered:
        for metric in metrics:
            family = families.setdefault(metric.name, _copy(metric, ()))
            if family.type == metric.type:
                family.samples += _labelled(metric.samples, deployment, replica)
    registry = CollectorRegistry()
    registry.register(_Families([families[name] for name in sorted(families)]))
    return generate_latest(registry)


def merge_instances(pages: Mapping[str, str]) -> bytes:
    """One exposition from those of several instances, each sample with an `instance` label. As `merge` otherwise."""
    families: dict[str, Metric] = {}
    for instance, page in sorted(pages.items()):
        for metric in text_string_to_metric_families(page):
            family = families.setdefault(metric.name, _copy(metric, ()))
            if family.type == metric.type:
                family.samples += [s._replace(labels={**s.labels, "instance": instance}) for s in metric.samples]
    registry = CollectorRegistry()
    registry.register(_Families([families[name] for name in sorted(families)]))
    return generate_latest(registry)


def describe() -> list[tuple[str, MetricType, tuple[str, ...], str]]:
    """(name, type, labels, help) of every metric that this module defines.

    `deployment` and `replica`, which every sample gains in `merge`, are not repeated in the labels.
    """
    return [(f.name, f.type, f.labels, f.help) for f in FAMILIES]


class _Families(Collector):
    """Hands families that are already collected to the text writer, which only takes a registry."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


def _status_label(status: int) -> str:
    return str(status) if 100 <= status <= 599 else OTHER


def _copy(metric: Metric, samples: Iterable[Sample]) -> Metric:
    """`metric` with other samples, as the plain base class."""
    copy = Metric(metric.name, metric.documentation, metric.type, metric.unit)
    copy.samples = list(samples)
    return copy


def _without_created(metric: Metric) -> Iterator[Sample]:
    return (sample for sample in metric.samples if sample.name != f"{metric.name}_created")


def _labelled(samples: Iterable[Sample], deployment: str, replica: str) -> list[Sample]:
    """The samples with the two labels, series by series; within one the order (of its buckets) is kept."""
    ordered = sorted(samples, key=_series)
    return [s._replace(labels={**s.labels, "deployment": deployment, "replica": replica}) for s in ordered]


def _series(sample: Sample) -> list[tuple[str, str]]:
    return sorted((name, value) for name, value in sample.labels.items() if name != "le")
