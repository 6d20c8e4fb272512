"""GET /health, /health/live, /health/ready."""

import pytest
from answers import assert_nothing_of_the_inside, problem_of
from api_under_test import Api

from schemas.errors import ModelNotReady, StoreUnavailable
from schemas.health import Health


async def health(api: Api, status: int) -> Health:
    answer = await api.http.get("/health")
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert_nothing_of_the_inside(answer, api.jobs.store.folder)
    return Health.model_validate_json(answer.content)


async def test_health_says_everything_when_all_is_well(api: Api) -> None:
    found = await health(api, 200)

    assert (found.status, found.reason) == ("ok", None)
    assert found.model == api.probe.health_now.model
    assert found.gpu is None
    assert (found.queue.waiting, found.queue.running, found.queue.capacity) == (0, 0, 3)
    assert (found.storage.kind, found.storage.reachable) == ("local", True)
    assert found.last_error is None
    assert found.uptime_s >= 0
    assert {"python", "wan-serve", "ray", "torch", "diffusers", "transformers"} == found.versions.keys()


async def test_health_counts_the_queue(api: Api) -> None:
    gate = api.jobs.worker.gates["running"]
    gate.close()
    for _ in range(2):
        await api.http.post("/generate", json={"prompt": "a"}, headers={"prefer": "respond-async"})
    await gate.reached()

    found = await health(api, 200)
    assert (found.queue.waiting, found.queue.running) == (1, 1)
    gate.open()
    await api.jobs.service.drain(20)


async def test_health_says_why_the_model_is_not_ready(api: Api) -> None:
    api.probe.problem = ModelNotReady("the model is loading")

    found = await health(api, 503)
    assert (found.status, found.reason) == ("unavailable", "the model is loading")
    assert not found.model.loaded
    assert found.model.profile == "wan-tiny"
    problem = problem_of(await api.http.get("/health/ready"), 503, "model-not-ready")
    assert problem.detail == "the model is loading"
    assert problem.retry_after_s == 5


async def test_health_says_that_the_store_does_not_answer(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise StoreUnavailable("the storage folder is gone")

    monkeypatch.setattr(api.jobs.store, "check", fail)
    found = await health(api, 503)

    assert found.reason == "the storage folder is gone"
    assert not found.storage.reachable
    assert found.model.loaded
    problem_of(await api.http.get("/health/ready"), 503, "store-unavailable")


async def test_health_says_that_the_service_shuts_down(api: Api) -> None:
    api.monitor.draining = True

    assert (await health(api, 503)).reason == "the service is shutting down"
    problem_of(await api.http.get("/health/ready"), 503, "shutting-down")
    problem_of(await api.http.post("/generate", json={"prompt": "a"}), 503, "shutting-down")


async def test_live_answers_whatever_the_model_does(api: Api) -> None:
    api.probe.problem = ModelNotReady("the model is loading")
    answer = await api.http.get("/health/live")

    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


async def test_ready_answers_when_a_request_would_be_rendered(api: Api) -> None:
    answer = await api.http.get("/health/ready")

    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
