"""The registries of the three deployments, their bounded labels, and the one exposition made from them."""

import multiprocessing
import pickle
import re
import shutil
import subprocess
from collections.abc import Callable
from typing import get_args

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Metric
from prometheus_client.parser import text_string_to_metric_families

import schemas.errors
from schemas.clips import Timings
from schemas.errors import OutOfMemory, RenderFailed, StoreFull
from schemas.jobs import JobState
from schemas.webhooks import WebhookState
from serve_graph.metrics import (
    CONTENT_TYPE,
    MAX_ROUTES,
    PROBLEMS,
    WEBHOOK_OUTCOMES,
    GeneratorMetrics,
    IngressMetrics,
    PreprocessorMetrics,
    describe,
    error_label,
    merge,
    method_label,
    new_registry,
    snapshot,
)

ReadValue = Callable[..., float | None]

TIMINGS = Timings(queued=1, preprocess=2, denoise=300, decode=20, encode=5, upload=0.5, total=328.5)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def value(registry: CollectorRegistry) -> ReadValue:
    """Reads one sample of `registry`; None where it is absent."""
    return lambda name, **labels: registry.get_sample_value(name, labels)


def ingress_snapshot() -> list[Metric]:
    registry = new_registry()
    metrics = IngressMetrics(registry)
    metrics.request_answered("/generate", "POST", 200, 61.0)
    metrics.request_answered(None, "GET", 404, 0.002)
    metrics.job_ended(JobState.SUCCEEDED, 328.5, timings=TIMINGS)
    metrics.job_ended(JobState.FAILED, 3.0, error=OutOfMemory.name)
    metrics.set_queue(waiting=2, running=1, capacity=32)
    metrics.container_started("fresh")
    return snapshot(registry)


def preprocessor_snapshot() -> list[Metric]:
    registry = new_registry()
    metrics = PreprocessorMetrics(registry)
    metrics.batch_encoded(1.5, batch_size=2)
    metrics.cache_hit()
    metrics.cache_miss()
    metrics.set_cache_bytes(4096)
    metrics.prompt_tokenized(17)
    return snapshot(registry)


def generator_snapshot() -> list[Metric]:
    registry = new_registry()
    metrics = GeneratorMetrics(registry)
    metrics.step_done(0.4, batch_size=3)
    metrics.forward_done("cond")
    metrics.set_jobs_in_flight(3)
    metrics.steps_wasted(7)
    metrics.clip_uploaded(123_456)
    metrics.upload_failed(StoreFull.name)
    metrics.set_model("wan2.1-t2v-1.3b", 'a "quoted"\\ revision\n', "bfloat16", "cuda:0")
    metrics.set_device_memory_used(8 << 30)
    return snapshot(registry)


def whole_service() -> list[tuple[str, str, list[Metric]]]:
    return [
        ("Generator", "g2", generator_snapshot()),
        ("Ingress", "i1", ingress_snapshot()),
        ("Generator", "g1", generator_snapshot()),
        ("Preprocessor", "p1", preprocessor_snapshot()),
    ]


def families_of(exposition: bytes) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(exposition.decode())}


def complaints_of_promtool(exposition: bytes) -> str:
    """What `promtool check metrics` says; "" where Debian's prometheus package is not installed."""
    promtool = shutil.which("promtool")
    if promtool is None:
        return ""
    done = subprocess.run([promtool, "check", "metrics"], input=exposition, capture_output=True, check=False)
    return (done.stdout + done.stderr).decode() + ("" if done.returncode == 0 else f"rc {done.returncode}")


def test_ingress_counts_requests_by_route_method_and_status(registry: CollectorRegistry, value: ReadValue) -> None:
    metrics = IngressMetrics(registry)
    metrics.request_answered("/jobs/{job_id}", "GET", 200, 0.02)
    metrics.request_answered("/jobs/{job_id}", "GET", 200, 0.02)
    assert value("wan_http_requests_total", route="/jobs/{job_id}", method="GET", status="200") == 2
    assert value("wan_http_request_duration_seconds_sum", route="/jobs/{job_id}") == pytest.approx(0.04)


def test_ingress_labels_a_request_without_a_route_unmatched(registry: CollectorRegistry, value: ReadValue) -> None:
    IngressMetrics(registry).request_answered(None, "GET", 404, 0.001)
    assert value("wan_http_requests_total", route="unmatched", method="GET", status="404") == 1


def test_ingress_stops_making_routes_when_raw_paths_are_passed(registry: CollectorRegistry, value: ReadValue) -> None:
    metrics = IngressMetrics(registry)
    for index in range(MAX_ROUTES + 50):
        metrics.request_answered(f"/jobs/job_{index}", "GET", 200, 0.001)
    metrics.request_answered("/jobs/job_0", "GET", 200, 0.001)
    assert value("wan_http_requests_total", route="unmatched", method="GET", status="200") == 50
    assert value("wan_http_requests_total", route="/jobs/job_0", method="GET", status="200") == 2


@pytest.mark.parametrize(("method", "label"), [("POST", "POST"), ("BREW", "OTHER"), ("get", "OTHER"), ("", "OTHER")])
def test_method_label_is_one_of_https_methods(method: str, label: str) -> None:
    assert method_label(method) == label


def test_ingress_bounds_the_status(registry: CollectorRegistry, value: ReadValue) -> None:
    IngressMetrics(registry).request_answered("/health", "GET", 1234, 0.001)
    assert value("wan_http_requests_total", route="/health", method="GET", status="OTHER") == 1


def test_ingress_counts_jobs_by_outcome_and_error(registry: CollectorRegistry, value: ReadValue) -> None:
    metrics = IngressMetrics(registry)
    metrics.job_ended(JobState.FAILED, 4.0, error=RenderFailed.name)
    metrics.job_ended(JobState.CANCELLED, 1.0, error="job-cancelled")
    assert value("wan_jobs_total", outcome="failed", error="render-failed") == 1
    assert value("wan_jobs_total", outcome="cancelled", error="job-cancelled") == 1
    assert value("wan_job_duration_seconds_sum", outcome="failed") == 4.0


def test_ingress_never_uses_an_unknown_error_as_a_label(registry: CollectorRegistry, value: ReadValue) -> None:
    IngressMetrics(registry).job_ended(JobState.FAILED, 4.0, error="CUDA error at 0x7f21")
    assert value("wan_jobs_total", outcome="failed", error="internal-error") == 1


def test_ingress_refuses_a_state_that_ends_nothing(registry: CollectorRegistry) -> None:
    with pytest.raises(ValueError, match="running"):
        IngressMetrics(registry).job_ended(JobState.RUNNING, 1.0)


def test_ingress_records_each_stage_of_a_success_but_not_their_total(
    registry: CollectorRegistry, value: ReadValue
) -> None:
    IngressMetrics(registry).job_ended(JobState.SUCCEEDED, 328.5, timings=TIMINGS)
    stages = ("queued", "preprocess", "denoise", "decode", "encode", "upload")
    assert [value("wan_job_stage_seconds_sum", stage=s) for s in stages] == [1, 2, 300, 20, 5, 0.5]
    assert value("wan_job_stage_seconds_sum", stage="total") is None


def test_ingress_sets_the_queue(registry: CollectorRegistry, value: ReadValue) -> None:
    IngressMetrics(registry).set_queue(waiting=4, running=2, capacity=32)
    names = ("wan_jobs_waiting", "wan_jobs_running", "wan_queue_capacity")
    assert [value(name) for name in names] == [4, 2, 32]


def test_ingress_counts_webhooks_by_what_became_of_them(registry: CollectorRegistry, value: ReadValue) -> None:
    metrics = IngressMetrics(registry)
    for state in get_args(WebhookState):
        assert value("wan_webhook_deliveries_total", outcome=WEBHOOK_OUTCOMES[state]) == 0
        metrics.webhook_attempted(state)

    for outcome in ("delivered", "failed", "given_up"):
        assert value("wan_webhook_deliveries_total", outcome=outcome) == 1


def test_ingress_exposes_failures_before_the_first_one(registry: CollectorRegistry, value: ReadValue) -> None:
    IngressMetrics(registry)
    assert value("wan_jobs_total", outcome="failed", error="out-of-memory") == 0
    assert value("wan_jobs_total", outcome="failed", error="invalid-request") is None


@pytest.mark.parametrize("seconds", [0.3, 45.0, 700.0, 3500.0])
def test_job_duration_has_a_bucket_near_every_length_up_to_an_hour(registry: CollectorRegistry, seconds: float) -> None:
    IngressMetrics(registry).job_ended(JobState.SUCCEEDED, seconds)
    (family,) = (m for m in registry.collect() if m.name == "wan_job_duration_seconds")
    holding = [float(s.labels["le"]) for s in family.samples if s.name.endswith("_bucket") and s.value == 1]
    assert min(holding) <= 2.5 * seconds


def test_preprocessor_records_batches_tokens_and_its_cache(registry: CollectorRegistry, value: ReadValue) -> None:
    metrics = PreprocessorMetrics(registry)
    metrics.batch_encoded(1.5, batch_size=2)
    metrics.prompt_tokenized(17)
    metrics.cache_hit()
    metrics.cache_miss()
    metrics.cache_miss()
    metrics.set_cache_bytes(4096)
    assert value("wan_prompt_encode_seconds_sum") == 1.5
    assert value("wan_prompt_encode_batch_size_sum") == 2
    assert value("wan_prompt_tokens_sum") == 17
    assert value("wan_embedding_cache_hits_total") == 1
    assert value("wan_embedding_cache_misses_total") == 2
    assert value("wan_embedding_cache_bytes") == 4096


def test_generator_records_steps_forwards_and_uploads(registry: CollectorRegistry, value: ReadValue) -> None:
    metrics = GeneratorMetrics(registry)
    metrics.step_done(0.4, batch_size=3)
    metrics.forward_done("uncond")
    metrics.set_jobs_in_flight(3)
    metrics.device_worked(2.5)
    metrics.device_waited(0.5)
    metrics.steps_wasted(7)
    metrics.clip_uploaded(1000)
    metrics.set_device_memory_used(5)
    assert value("wan_step_seconds_sum") == 0.4
    assert value("wan_step_batch_size_sum") == 3
    assert [value("wan_forwards_total", kind=kind) for kind in ("cond", "uncond")] == [0, 1]
    assert value("wan_jobs_in_flight") == 3
    assert value("wan_device_busy_seconds_total") == 2.5
    assert value("wan_device_blocked_seconds_total") == 0.5
    assert value("wan_wasted_steps_total") == 7
    assert value("wan_upload_bytes_total") == 1000
    assert value("wan_device_memory_used_bytes") == 5


@pytest.mark.parametrize(
    ("error", "label"),
    [("store-full", "store-full"), ("disk on fire", "internal-error"), ("", "internal-error")],
)
def test_generator_counts_upload_errors_by_problem(
    registry: CollectorRegistry, value: ReadValue, error: str, label: str
) -> None:
    GeneratorMetrics(registry).upload_failed(error)
    assert value("wan_upload_errors_total", error=label) == 1


def test_generator_says_one_model_only(registry: CollectorRegistry, value: ReadValue) -> None:
    metrics = GeneratorMetrics(registry)
    metrics.set_model("wan-random", None, "float32", "cpu")
    metrics.set_model("wan2.1-t2v-14b", "abc", "bfloat16", "cuda:0")
    assert value("wan_model_info", profile="wan-random", revision="", dtype="float32", device="cpu") is None
    loaded = {"profile": "wan2.1-t2v-14b", "revision": "abc", "dtype": "bfloat16", "device": "cuda:0"}
    assert value("wan_model_info", **loaded) == 1


def test_problems_are_those_of_the_drawn_error_tree() -> None:
    drawn = re.findall(r"── \w+ +(\d{3})  (\S+)", schemas.errors.__doc__ or "")
    drawn.remove(("503", "unavailable"))  # only its subclasses are ever raised
    assert len(drawn) >= 15
    missing = {name: int(status) for status, name in drawn if PROBLEMS.get(name) != int(status)}
    assert missing == {}
    assert all(error_label(name) == name for _, name in drawn)


def test_metrics_never_touch_the_global_registry() -> None:
    before = {metric.name for metric in REGISTRY.collect()}
    whole_service()
    assert {metric.name for metric in REGISTRY.collect()} == before


def test_describe_lists_exactly_the_metrics_that_the_deployments_expose(registry: CollectorRegistry) -> None:
    for deployment in (IngressMetrics, PreprocessorMetrics, GeneratorMetrics):
        deployment(registry)
    exposed = {
        (m.name + ("_total" if m.type == "counter" else ""), m.type, m.documentation) for m in registry.collect()
    }
    assert {(name, type_, text) for name, type_, _, text in describe()} == exposed


def test_describe_names_the_labels_that_samples_carry() -> None:
    own = {name.removesuffix("_total"): set(labels) for name, _, labels, _ in describe()}
    families = families_of(merge(whole_service()))
    assert own.keys() <= families.keys()
    for name, labels in own.items():
        carried = {label for sample in families[name].samples for label in sample.labels}
        assert carried - {"le"} == labels | {"deployment", "replica"}, name


def test_describe_keeps_the_names_of_the_merged_labels_free() -> None:
    assert not {label for _, _, labels, _ in describe() for label in labels} & {"deployment", "replica", "le"}


def test_snapshot_has_no_created_series_though_they_are_on() -> None:
    registry = new_registry()
    GeneratorMetrics(registry).forward_done("cond")
    raw = {sample.name for metric in registry.collect() for sample in metric.samples}
    taken = {sample.name for metric in snapshot(registry) for sample in metric.samples}
    assert raw - taken == {name for name in raw if name.endswith("_created")} != set()


def test_snapshot_survives_pickling() -> None:
    taken = generator_snapshot()
    assert pickle.loads(pickle.dumps(taken)) == taken  # noqa: S301  # our own bytes


def test_snapshot_does_not_change_with_its_registry(registry: CollectorRegistry) -> None:
    metrics = GeneratorMetrics(registry)
    taken = snapshot(registry)
    before = merge([("Generator", "g1", taken)])
    metrics.steps_wasted(5)
    assert merge([("Generator", "g1", taken)]) == before


def test_snapshot_from_another_process_merges_with_its_own_process_metrics() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        remote = pool.apply(generator_snapshot)
    families = families_of(merge([("Generator", "g1", remote), ("Ingress", "i1", ingress_snapshot())]))
    started = {s.labels["deployment"]: s.value for s in families["process_start_time_seconds"].samples}
    assert started["Generator"] > started["Ingress"]


def test_merge_labels_every_sample_with_its_deployment_and_replica() -> None:
    families = families_of(merge(whole_service()))
    wasted = {(s.labels["deployment"], s.labels["replica"]): s.value for s in families["wan_wasted_steps"].samples}
    assert wasted == {("Generator", "g1"): 7, ("Generator", "g2"): 7}
    assert all({"deployment", "replica"} <= s.labels.keys() for f in families.values() for s in f.samples)


def test_merge_passes_the_parser_and_promtool() -> None:
    exposition = merge(whole_service())
    assert families_of(exposition)["wan_model_info"].samples[0].labels["revision"] == 'a "quoted"\\ revision\n'
    assert complaints_of_promtool(exposition) == ""


def test_merge_has_one_help_and_type_per_family() -> None:
    text = merge(whole_service()).decode()
    for kind in ("HELP", "TYPE"):
        names = re.findall(rf"^# {kind} (\S+)", text, flags=re.MULTILINE)
        assert len(names) == len(set(names)) > len(describe())


def test_merge_gives_the_same_bytes_in_any_order_of_replicas_and_events() -> None:
    def exposition(routes: list[str], replicas: list[str]) -> bytes:
        registry = CollectorRegistry()
        metrics = IngressMetrics(registry)
        for route in routes:
            metrics.request_answered(route, "GET", 200, 0.01)
        return merge(("Ingress", replica, snapshot(registry)) for replica in replicas)

    assert exposition(["/a", "/b"], ["1", "2"]) == exposition(["/b", "/a"], ["2", "1"])


def test_merge_keeps_the_buckets_of_a_series_together_and_ascending() -> None:
    text = merge([("Ingress", "i1", ingress_snapshot())]).decode()
    bounds = re.findall(r'wan_job_stage_seconds_bucket\{.*le="([^"]+)".*stage="denoise"', text)
    assert [float(b) for b in bounds] == sorted(float(b) for b in bounds)
    assert len(bounds) > 10


def test_merge_drops_samples_of_another_type_when_releases_disagree() -> None:
    old, new = (Metric("wan_jobs_waiting", f"{kind} help", kind) for kind in ("unknown", "gauge"))
    old.add_sample("wan_jobs_waiting", {}, 9)
    new.add_sample("wan_jobs_waiting", {}, 1)
    family = families_of(merge([("Ingress", "b", [old]), ("Ingress", "a", [new])]))["wan_jobs_waiting"]
    assert (family.type, family.documentation) == ("gauge", "gauge help")
    assert [s.labels["replica"] for s in family.samples] == ["a"]


def test_merge_refuses_one_replica_twice() -> None:
    with pytest.raises(ValueError, match="same deployment and replica"):
        merge([("Generator", "g1", []), ("Generator", "g1", [])])


def test_merge_of_nothing_is_empty() -> None:
    assert merge([]) == b""


def test_content_type_is_the_text_format_that_merge_writes() -> None:
    assert CONTENT_TYPE.startswith("text/plain; version=0.0.4")
