"""Clients that go away: a real uvicorn on a loopback port, and raw sockets that are closed."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn
from api_under_test import Api
from support import PATIENCE_S

from schemas.jobs import JobState

BODY = b'{"prompt": "a secret otter"}'
REQUEST = (
    b"POST /generate HTTP/1.1\r\nHost: wan.test\r\nX-Request-ID: request-1\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
)


@pytest.fixture
async def port(api: Api) -> AsyncIterator[int]:
    """Where a real server of the API listens: from before it starts, so nobody has to wait for it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(api.app, log_config=None, access_log=False))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        yield listener.getsockname()[1]
        server.should_exit = True
        await serving


@asynccontextmanager
async def connected(port: int, sent: bytes) -> AsyncIterator[asyncio.StreamReader]:
    """Send bytes, and close the connection at the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    await writer.drain()
    try:
        yield reader
    finally:
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("stage", ["prepare", "queued", "running"])
async def test_a_waiting_client_that_goes_away_cancels_its_job(api: Api, port: int, stage: str) -> None:
    gate = api.jobs.worker.gates[stage]
    gate.close()
    async with connected(port, REQUEST % len(BODY) + BODY):
        await gate.reached()

    line = await api.log.wait_for("request")
    await api.jobs.service.drain(PATIENCE_S)
    (key,) = api.jobs.job_records()
    record = api.jobs.record(key.removeprefix("jobs/").removesuffix(".json"))
    assert record.state is JobState.CANCELLED
    assert (line["status"], line["job_id"]) == (499, record.job_id)
    assert [job["state"] for job in api.log.of("job")] == ["cancelled"]
    assert api.jobs.worker.rendered == []


async def test_a_client_that_goes_away_leaves_the_jobs_of_others_alone(api: Api, port: int) -> None:
    gate = api.jobs.worker.gates["running"]
    gate.close()
    answer = await api.http.post("/generate", json={"prompt": "a"}, headers={"prefer": "respond-async"})
    await gate.reached()
    api.jobs.store.hold(JobState.QUEUED)
    async with connected(port, REQUEST % len(BODY) + BODY):
        await api.jobs.store.reached(JobState.QUEUED)
        api.jobs.store.release(JobState.QUEUED)
    gate.open()

    clip = await api.jobs.service.wait(answer.json()["job_id"])
    assert clip.job_id == answer.json()["job_id"]
    await api.jobs.service.drain(PATIENCE_S)
    assert api.jobs.worker.rendered == [clip.job_id]


async def test_a_client_that_asked_for_the_job_only_may_go_away(api: Api, port: int) -> None:
    gate = api.jobs.worker.gates["running"]
    gate.close()
    asking = REQUEST.replace(b"Host:", b"Prefer: respond-async\r\nHost:")
    async with connected(port, asking % len(BODY) + BODY) as reader:
        assert b" 202 " in await reader.readline()
        await gate.reached()
    gate.open()

    await api.jobs.service.drain(PATIENCE_S)
    assert len(api.jobs.worker.rendered) == 1


async def test_a_client_that_goes_away_in_the_middle_of_its_body_makes_no_job(api: Api, port: int) -> None:
    async with connected(port, REQUEST % len(BODY) + BODY[:5]):
        pass

    line = await api.log.wait_for("request")
    assert (line["status"], line["route"]) == (499, "/generate")
    assert line.get("error") is None
    assert api.jobs.job_records() == []
    assert api.log.of("request_failed") == []


async def test_a_large_body_is_refused_over_a_real_connection(api: Api, port: int) -> None:
    async with connected(port, REQUEST % 10_000_000 + b" " * 1_000) as reader:
        async with asyncio.timeout(PATIENCE_S):
            head = await reader.readuntil(b"\r\n\r\n")

    assert b" 413 " in head
    assert b"application/problem+json" in head


async def test_a_chunked_body_that_is_too_large_is_refused_over_a_real_connection(api: Api, port: int) -> None:
    head = REQUEST.replace(b"Content-Length: %d", b"Transfer-Encoding: chunked")
    chunk = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
    async with connected(port, head + chunk * 3) as reader:
        async with asyncio.timeout(PATIENCE_S):
            answer = await reader.readuntil(b"\r\n\r\n")

    assert b" 413 " in answer


async def test_a_waiting_client_with_a_key_that_goes_away_leaves_its_job(api: Api, port: int) -> None:
    """It may come back for it."""
    gate = api.jobs.worker.gates["running"]
    gate.close()
    keyed = REQUEST.replace(b"Host:", b"Idempotency-Key: order-66\r\nHost:")
    async with connected(port, keyed % len(BODY) + BODY):
        await gate.reached()
    line = await api.log.wait_for("request")
    gate.open()

    await api.jobs.service.drain(PATIENCE_S)
    assert line["status"] == 499
    assert api.jobs.record(line["job_id"]).state is JobState.SUCCEEDED


async def test_a_client_that_goes_away_from_an_event_stream_leaves_nothing(api: Api, port: int) -> None:
    gate = api.jobs.worker.gates["running"]
    gate.close()
    answer = await api.http.post("/generate", json={"prompt": "a"}, headers={"prefer": "respond-async"})
    await gate.reached()
    job_id = answer.json()["job_id"]
    live = api.jobs.service._running.live(job_id)
    assert live is not None
    async with connected(port, b"GET /jobs/%s/events HTTP/1.1\r\nHost: wan.test\r\n\r\n" % job_id.encode()) as reader:
        await reader.readuntil(b"event: job")
        assert len(live.listeners) == 1
    async with asyncio.timeout(PATIENCE_S):
        while live.listeners:  # noqa: ASYNC110  # the server has no event for it
            await asyncio.sleep(0.01)
    gate.open()

    assert (await api.jobs.service.wait(job_id)).job_id == job_id
