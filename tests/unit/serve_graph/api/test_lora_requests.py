"""LoRA adapters on the wire: what `GET /models` lists may be asked for, and comes back with what was made."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from answers import problem_of
from api_under_test import Api, open_api
from random_wan import RANDOM_WAN
from support import PATIENCE_S, LogLines

from schemas.loras import Lora

PROMPT = "a red circle moving left"
PROFILE = RANDOM_WAN.model_copy(
    update={"loras": {"style": Lora(description="Ink on paper.", weight=0.8), "motion": Lora()}}
)
ASKED = [{"name": "style"}, {"name": "motion", "weight": 0.5}]
EFFECTIVE = [{"name": "motion", "weight": 0.5}, {"name": "style", "weight": 0.8}]


@pytest.fixture
async def api(tmp_path: Path, log: LogLines) -> AsyncIterator[Api]:
    async with open_api(tmp_path / "store", log, profile=PROFILE) as opened:
        yield opened


async def test_models_lists_each_adapter_with_what_it_does(api: Api) -> None:
    (model,) = (await api.http.get("/models")).json()

    assert {name: lora["description"] for name, lora in model["loras"].items()} == {
        "style": "Ink on paper.",
        "motion": "",
    }


async def test_generate_takes_adapters_and_tells_them_in_every_answer(api: Api) -> None:
    clip = (await api.http.post("/generate", json={"prompt": PROMPT, "loras": ASKED})).json()
    job = (await api.http.get(f"/jobs/{clip['job_id']}")).json()

    assert clip["loras"] == job["parameters"]["loras"] == job["clip"]["loras"] == EFFECTIVE
    record = api.jobs.record(clip["job_id"])
    assert [lora.model_dump() for lora in record.parameters.loras] == EFFECTIVE
    assert [task.parameters for task in api.jobs.worker.tasks] == [record.parameters]


async def test_generate_refuses_an_adapter_that_is_not_listed_with_those_that_are(api: Api) -> None:
    answer = await api.http.post("/generate", json={"prompt": PROMPT, "loras": [{"name": "other"}]})

    problem = problem_of(answer, 422, "invalid-request")
    (error,) = problem.errors or ()
    assert error.field == "loras"
    assert "up to 4 of style, motion" in error.message
    assert api.jobs.job_records() == []


async def test_a_dry_run_tells_the_effective_adapters(api: Api) -> None:
    answer = await api.http.post("/generate", params={"dry_run": "true"}, json={"prompt": PROMPT, "loras": ASKED})

    assert answer.json()["parameters"]["loras"] == EFFECTIVE


async def test_an_idempotency_key_is_for_one_choice_of_adapters(api: Api) -> None:
    headers = {"idempotency-key": "once"}
    first, again, other = [
        await api.http.post("/generate", json={"prompt": PROMPT, "loras": loras}, headers=headers)
        for loras in (ASKED, ASKED, ASKED[:1])
    ]

    assert first.json()["job_id"] == again.json()["job_id"]
    problem_of(other, 422, "idempotency-mismatch")


async def test_a_batch_s_items_and_defaults_take_adapters(api: Api) -> None:
    body = {"requests": [{"prompt": PROMPT}, {"prompt": PROMPT, "loras": []}], "defaults": {"loras": ASKED}}
    batch_id = (await api.http.post("/batches", json=body)).json()["batch_id"]
    async with asyncio.timeout(PATIENCE_S):
        while True:
            if (await api.http.get(f"/batches/{batch_id}")).json()["state"] == "ended":
                break
            await asyncio.sleep(0.01)

    lines = (await api.http.get(f"/batches/{batch_id}/results")).text.splitlines()
    assert [json.loads(line)["clip"]["loras"] for line in lines] == [EFFECTIVE, []]
    refused = await api.http.post("/batches", json={"requests": [{"prompt": PROMPT, "loras": [{"name": "other"}]}]})
    (error,) = problem_of(refused, 422, "invalid-request").errors or ()
    assert error.field == "requests.0.loras"


@pytest.mark.parametrize("form", [False, True], ids=["json", "form"])
async def test_videos_take_adapters_and_tell_them(api: Api, form: bool) -> None:
    fields: dict[str, Any] = {"prompt": PROMPT, "loras": ASKED}
    if form:
        files = {"prompt": (None, PROMPT), "loras": (None, json.dumps(ASKED))}
        answer = await api.http.post("/v1/videos", files=files)
    else:
        answer = await api.http.post("/v1/videos", json=fields)

    assert answer.status_code == 200, answer.text
    assert answer.json()["loras"] == EFFECTIVE
