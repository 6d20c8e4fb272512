"""POST /generate?dry_run=true: what a request would take, and that nothing is made of it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from answers import problem_of
from api_under_test import Api, ScriptedProbe, open_api
from support import LogLines

from schemas.errors import ModelNotReady, PromptTooLong
from schemas.estimates import Estimate
from schemas.health import GpuHealth
from schemas.official_profiles import WAN_14B
from serve_graph.api.auth import Authenticator
from serve_graph.api_keys import ApiKeys, Role, new_key
from serve_graph.plan import GPUS

PROMPT = "a red circle moving left"
DRY = {"dry_run": "true"}


async def estimate(api: Api, **fields: object) -> Estimate:
    answer = await api.http.post("/generate", params=DRY, json={"prompt": PROMPT, **fields})
    assert answer.status_code == 200, answer.text
    return Estimate.model_validate_json(answer.content)


async def submit(api: Api) -> str:
    answer = await api.http.post("/generate", json={"prompt": PROMPT}, headers={"prefer": "respond-async"})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["job_id"])


@asynccontextmanager
async def on_gpu(folder: Path, log: LogLines, name: str, memory_bytes: int) -> AsyncIterator[Api]:
    """A service of the 14B model on a GPU."""
    async with open_api(folder, log, profile=WAN_14B) as api:
        gpu = GpuHealth(name=name, memory_total_bytes=memory_bytes, memory_used_bytes=0)
        api.probe.health_now = ScriptedProbe().health_now.model_copy(update={"gpu": gpu})
        yield api


async def test_dry_run_answers_the_effective_parameters_and_the_work(api: Api) -> None:
    found = await estimate(api, seed=7, num_frames=33, num_inference_steps=10, guidance_scale=3)

    assert (found.parameters.seed, found.parameters.width, found.parameters.fps) == (7, 64, 16)
    assert (found.work.steps, found.work.forwards, found.work.tokens) == (10, 20, 9 * 4 * 4)
    assert (found.seconds, found.seconds_until_done, found.device) == (None, None, None)
    assert found.position == 0


async def test_dry_run_without_guidance_takes_half_the_forwards(api: Api) -> None:
    assert (await estimate(api, num_inference_steps=10, guidance_scale=1)).work.forwards == 10


async def test_dry_run_of_a_preset_counts_the_forwards_that_it_takes(api: Api) -> None:
    found = await estimate(api, preset="fast")

    guided = found.parameters.guided_steps
    assert 0 < guided < found.work.steps == 6
    assert found.work.forwards == 6 + guided


async def test_dry_run_leaves_nothing_behind(api: Api) -> None:
    headers = {"idempotency-key": "once"}
    dry = await api.http.post("/generate", params=DRY, json={"prompt": PROMPT}, headers=headers)
    assert dry.status_code == 200

    assert api.jobs.job_records() == []
    assert api.jobs.worker.tasks == []
    assert (await api.http.get("/jobs")).json()["jobs"] == []
    assert api.jobs.service.queue().waiting == 0
    other = await api.http.post("/generate", json={"prompt": "something else"}, headers=headers)
    assert other.status_code == 200, "the key would be taken, had the dry run used it"


async def test_dry_run_does_not_wait_and_holds_no_place(api: Api) -> None:
    api.jobs.worker.gates["running"].close()
    for _ in range(10):  # the service takes 3
        await estimate(api)

    job_id = await submit(api)
    api.jobs.worker.gates["running"].open()
    await api.jobs.service.wait(job_id)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": PROMPT, "num_frames": 80},
        {"prompt": PROMPT, "resolution": "1p"},
        {"prompt": "  "},
        {"prompt": PROMPT, "unknown": 1},
        {"prompt": PROMPT, "webhook_url": "ftp://example.com"},
        {},
    ],
)
async def test_dry_run_refuses_as_the_request_would_be(api: Api, body: dict[str, Any]) -> None:
    dry = problem_of(await api.http.post("/generate", params=DRY, json=body), 422, "invalid-request")
    wet = problem_of(await api.http.post("/generate", json=body), 422, "invalid-request")

    assert dry.errors == wet.errors
    assert dry.detail == wet.detail


async def test_dry_run_counts_the_tokens_of_a_long_prompt(api: Api) -> None:
    api.jobs.worker.failures["check"] = PromptTooLong("prompt", 600, 128)
    answer = await api.http.post("/generate", params=DRY, json={"prompt": "word " * 300})

    problem_of(answer, 422, "prompt-too-long")


async def test_dry_run_is_told_when_there_is_no_room(api: Api) -> None:
    api.jobs.worker.gates["queued"].close()
    ids = [await submit(api) for _ in range(3)]

    problem_of(await api.http.post("/generate", params=DRY, json={"prompt": PROMPT}), 429, "queue-full")
    api.jobs.worker.gates["queued"].open()
    await asyncio.gather(*map(api.jobs.service.wait, ids))


async def test_dry_run_is_told_when_the_model_is_not_ready(api: Api) -> None:
    api.probe.problem = ModelNotReady("the model is loading")

    problem_of(await api.http.post("/generate", params=DRY, json={"prompt": PROMPT}), 503, "model-not-ready")


async def test_dry_run_refuses_what_is_no_boolean(api: Api) -> None:
    answer = await api.http.post("/generate", params={"dry_run": "perhaps"}, json={"prompt": PROMPT})

    problem_of(answer, 422, "invalid-request")
    assert api.jobs.job_records() == []


async def test_dry_run_knows_its_place_and_its_seconds_once_a_job_was_made(api: Api) -> None:
    api.jobs.worker.device_s = 3.0, 0.6
    await api.jobs.service.wait(await submit(api))
    gate = api.jobs.worker.gates["running"]
    gate.close()
    running = await submit(api)
    await gate.reached()

    found = await estimate(api)
    assert found.seconds == pytest.approx(3.6)
    assert found.position == 1
    assert found.seconds_until_done is not None
    assert found.seconds_until_done > found.seconds
    assert (await estimate(api, priority="high")).position == 0
    assert (await estimate(api, num_inference_steps=3)).seconds == pytest.approx(3 * 3.0 / 12 + 0.6)
    gate.open()
    await api.jobs.service.wait(running)


async def test_dry_run_counts_as_a_request_of_its_key_and_needs_one(tmp_path: Path, log: LogLines) -> None:
    key, line = new_key("alice", Role.GENERATE, None, 2)
    async with open_api(tmp_path, log, authenticator=Authenticator(ApiKeys(line), protect_monitoring=False)) as api:
        headers = {"authorization": f"Bearer {key}"}
        sent = [
            await api.http.post("/generate", params=DRY, json={"prompt": PROMPT}, headers=headers) for _ in range(3)
        ]
        problem_of(await api.http.post("/generate", params=DRY, json={"prompt": PROMPT}), 401, "unauthorized")

    assert [answer.status_code for answer in sent] == [200, 200, 429]


async def test_dry_run_answers_the_plan_s_estimate_where_the_gpu_is_known(tmp_path: Path, log: LogLines) -> None:
    card = GPUS["H100"]
    async with on_gpu(tmp_path, log, "NVIDIA H100 80GB HBM3", card.memory_bytes) as api:
        found = await estimate(api, resolution="720p")

    assert found.work.teraflop is not None
    assert found.device is not None
    assert found.device.floor_s is not None
    assert found.device.expected_s == found.device.floor_s / found.device.efficiency
    assert found.device.floor_s == pytest.approx(found.work.teraflop * 1e12 / card.flops, rel=0.01)
    assert found.device.peak_memory_bytes < found.device.memory_total_bytes


async def test_what_does_not_fit_is_refused_with_the_nearest_that_does(tmp_path: Path, log: LogLines) -> None:
    async with on_gpu(tmp_path, log, "NVIDIA A100-SXM4-40GB", GPUS["A100-40GB"].memory_bytes) as api:
        for params in ({}, DRY):
            answer = await api.http.post("/generate", params=params, json={"prompt": PROMPT, "resolution": "720p"})
            (error,) = problem_of(answer, 422, "invalid-request").errors or ()
            assert (error.field, error.nearest) == ("resolution", ("480p",))
            assert "1280x720 does not fit into this device" in error.message
        assert api.jobs.job_records() == []
        assert (await estimate(api, resolution="480p")).device is not None
