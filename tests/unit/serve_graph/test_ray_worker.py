"""The worker over handles that fail as Ray's do (ray/serve/handle.py and _private/router.py, 2.60)."""

from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import Metric
from ray.exceptions import ActorDiedError, GetTimeoutError, RayError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from schemas.errors import ModelNotReady
from schemas.requests import GenerationParameters
from serve_graph.ray_worker import SNAPSHOT_TIMEOUT_S, RayWorker

Snapshot = tuple[str, str, list[Metric]]

GONE = [
    TimeoutError("Timed out waiting for broadcast results."),
    GetTimeoutError("Get timed out"),
    DeploymentUnavailableError(DeploymentID("Generator", "wan")),
    ActorDiedError(),
    RayError("the cluster is going down"),
    RayServeException("the controller is gone"),
]


class FakeHandle:
    """A deployment's handle: `broadcast` gives the replicas' results, or raises at once or when awaited."""

    def __init__(self, *replicas: Any, fails: Exception | None = None, fails_at_once: bool = False) -> None:
        self._replicas = replicas
        self._fails = fails
        self._fails_at_once = fails_at_once

    def broadcast(self, method_name: str) -> "FakeHandle":
        assert method_name == "metrics_snapshot"
        if self._fails is not None and self._fails_at_once:
            raise self._fails
        return self

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        assert (timeout_s, return_exceptions) == (SNAPSHOT_TIMEOUT_S, True)
        if self._fails is not None:
            raise self._fails
        return list(self._replicas)


class FullHandle:
    """A handle whose deployment takes no more calls."""

    @property
    def check(self) -> "FullHandle":
        return self

    async def remote(self, parameters: GenerationParameters) -> None:
        raise BackPressureError(num_queued_requests=8, max_queued_requests=8)


def snapshot_of(deployment: str, replica: str = "a") -> Snapshot:
    return (deployment, replica, [Metric("wan_step_seconds", "a metric", "histogram")])


async def snapshots(preprocessor: FakeHandle, generator: FakeHandle) -> list[Snapshot]:
    worker: Any = RayWorker(preprocessor, generator)  # type: ignore[arg-type]  # fakes
    found: list[Snapshot] = await worker.snapshots()
    return found


async def test_snapshots_are_those_of_every_replica() -> None:
    expected = [snapshot_of("Preprocessor"), snapshot_of("Generator", "a"), snapshot_of("Generator", "b")]

    assert await snapshots(FakeHandle(expected[0]), FakeHandle(*expected[1:])) == expected


async def test_snapshots_are_of_the_caller_s_own_deployment_too_where_it_has_one() -> None:
    ingresses = [snapshot_of("Ingress", "a"), snapshot_of("Ingress", "b")]
    generator = snapshot_of("Generator")
    worker: Any = RayWorker(FakeHandle(), FakeHandle(generator), FakeHandle(*ingresses))  # type: ignore[arg-type]  # fakes

    assert await worker.snapshots() == [*ingresses, generator]


async def test_snapshots_leave_out_a_replica_that_fails() -> None:
    alive = snapshot_of("Generator", "b")

    assert await snapshots(FakeHandle(), FakeHandle(ActorDiedError(), alive, ValueError("broken"))) == [alive]


@pytest.mark.parametrize("at_once", [False, True], ids=["awaited", "at once"])
@pytest.mark.parametrize("error", GONE, ids=lambda error: type(error).__name__)
async def test_snapshots_leave_out_a_deployment_that_is_gone(error: Exception, at_once: bool) -> None:
    gone = FakeHandle(fails=error, fails_at_once=at_once)
    preprocessor, generator = snapshot_of("Preprocessor"), snapshot_of("Generator")

    assert await snapshots(FakeHandle(preprocessor), gone) == [preprocessor]
    assert await snapshots(gone, FakeHandle(generator)) == [generator]
    assert await snapshots(gone, gone) == []


async def test_snapshots_do_not_hide_a_bug() -> None:
    with pytest.raises(ValueError, match="a bug"):
        await snapshots(FakeHandle(), FakeHandle(fails=ValueError("a bug")))


async def test_a_deployment_that_takes_no_more_calls_is_a_model_that_is_not_ready(
    make_parameters: Callable[..., GenerationParameters],
) -> None:
    worker: Any = RayWorker(FullHandle(), FullHandle())  # type: ignore[arg-type]  # fakes
    with pytest.raises(ModelNotReady) as caught:
        await worker.check(make_parameters())

    assert caught.value.detail == "the model has more calls waiting than it takes"
    assert caught.value.retry_after_s >= 1
