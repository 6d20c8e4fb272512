"""Webhooks by the records of what has ended: over the real job service, store and sender, to a real receiver."""

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path

import pytest
from standardwebhooks import Webhook
from support import PATIENCE_S, Jobs, open_jobs
from webhook_receiver import Receiver, receiving, status

from schemas.errors import InvalidRequest, RenderFailed
from schemas.requests import GenerateRequest
from serve_graph.jobs.batch_intake import Sent
from serve_graph.metrics import IngressMetrics
from serve_graph.webhooks.policy import WebhookPolicy
from serve_graph.webhooks.sender import WebhookSender
from serve_graph.webhooks.signing import WebhookSigner

SECRET = "whsec_" + "QUJDREVGR0hJSktMTU5PUFFSU1RVVldY"
POLICY = WebhookPolicy(allow_http=True, allow_private_addresses=True)


def sender(metrics: IngressMetrics) -> WebhookSender:
    return WebhookSender(POLICY, WebhookSigner(SECRET), metrics)


def request_to(receiver: Receiver) -> GenerateRequest:
    return GenerateRequest(prompt="a red circle", webhook_url=f"http://127.0.0.1:{receiver.port}/hook")


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not what():  # noqa: ASYNC110  # a store and a receiver have no event
            await asyncio.sleep(0.01)


def active(jobs: Jobs) -> list[str]:
    return [entry.id for entry in jobs.records.active()]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause before another attempt; the schedule has tests of its own."""
    monkeypatch.setattr("serve_graph.jobs.outbox.pause_before", lambda delivery, now: timedelta(0))


async def test_the_end_of_a_job_is_told_and_recorded(tmp_path: Path) -> None:
    async with receiving() as receiver:
        with open_jobs(tmp_path, webhooks=sender) as jobs:
            record = await jobs.service.submit(request_to(receiver), "request-1")
            await jobs.service.wait(record.job_id)
            await until(lambda: not active(jobs))
            assert (await jobs.service.job(record.job_id)).webhook == "delivered"
    told = Webhook(SECRET).verify(receiver.bodies[0], receiver.headers[0])
    assert told["type"] == "video.completed"
    assert told["data"] == {"id": record.job_id, "state": "succeeded", "request_id": "request-1"}


async def test_a_failure_is_told_as_one(tmp_path: Path) -> None:
    async with receiving() as receiver:
        with open_jobs(tmp_path, webhooks=sender) as jobs:
            jobs.worker.failures["running"] = RenderFailed("the model failed on this job")
            await jobs.service.submit(request_to(receiver), "request-1")
            await until(lambda: bool(receiver.bodies) and not active(jobs))
    assert b'"video.failed"' in receiver.bodies[0]


async def test_what_was_not_told_is_told_after_a_restart_under_the_same_id(tmp_path: Path) -> None:
    async with receiving(status(500)) as broken:
        with open_jobs(tmp_path, webhooks=sender) as jobs:
            record = await jobs.service.submit(request_to(broken), "request-1")
            await jobs.service.wait(record.job_id)
            await until(lambda: (r := jobs.record(record.job_id).webhook) is not None and r.attempts == 1)
            await jobs.service.drain(0)
            assert active(jobs) == [record.job_id]
            stored = jobs.record(record.job_id)
            assert stored.lease is None
    async with receiving(port=broken.port) as mended:
        with open_jobs(tmp_path, webhooks=sender) as jobs:
            jobs.service.start()
            await until(lambda: not active(jobs))
            delivery = jobs.record(record.job_id).webhook
            await jobs.service.drain(0)
    assert delivery is not None
    assert (delivery.state, delivery.attempts, delivery.last_status) == ("delivered", 2, 204)
    assert mended.headers[0]["webhook-id"] == broken.headers[0]["webhook-id"]
    assert mended.bodies == broken.bodies


async def test_two_services_tell_it_once(tmp_path: Path) -> None:
    async with receiving(status(500)) as broken:
        with open_jobs(tmp_path, webhooks=sender) as jobs:
            record = await jobs.service.submit(request_to(broken), "request-1")
            await jobs.service.wait(record.job_id)
            await until(lambda: (r := jobs.record(record.job_id).webhook) is not None and r.attempts == 1)
            await jobs.service.drain(0)
    async with receiving(port=broken.port) as mended:
        with open_jobs(tmp_path, webhooks=sender) as first, open_jobs(tmp_path, webhooks=sender) as second:
            first.service.start()
            second.service.start()
            await until(lambda: not active(first))
            await first.service.drain(0)
            await second.service.drain(0)
    assert len(mended.bodies) == 1


async def test_a_service_that_can_not_sign_leaves_it_waiting(tmp_path: Path) -> None:
    async with receiving() as receiver:
        with open_jobs(tmp_path, webhooks=sender) as jobs:
            jobs.worker.gates["running"].close()
            record = await jobs.service.submit(request_to(receiver), "request-1")
            await jobs.worker.gates["running"].reached()
            await jobs.service.drain(0)
        with open_jobs(tmp_path) as jobs:
            jobs.service.start()
            await jobs.service.wait(record.job_id)
            await jobs.service.drain(0)
            assert active(jobs) == [record.job_id]
            assert jobs.record(record.job_id).awaits_webhook
    assert receiver.bodies == []


async def test_a_url_that_is_not_allowed_makes_no_job(tmp_path: Path) -> None:
    with open_jobs(tmp_path, webhooks=sender) as jobs:
        with pytest.raises(InvalidRequest, match="webhook_url"):
            await jobs.service.submit(
                GenerateRequest(prompt="x", webhook_url="http://169.254.169.254/latest"), "request-1"
            )
        assert jobs.job_records() == []


async def test_the_end_of_a_batch_is_told_once_and_of_its_jobs_where_asked(tmp_path: Path) -> None:
    async with receiving() as receiver:
        url = f"http://127.0.0.1:{receiver.port}/batch"
        with open_jobs(tmp_path, webhooks=sender) as jobs:

            async def requests() -> AsyncIterator[Sent]:
                yield GenerateRequest(prompt="one")
                yield request_to(receiver)

            batch = await jobs.service.submit_batch(requests(), "request-1", webhook_url=url)
            await until(lambda: len(receiver.bodies) == 2 and not active(jobs))
            await jobs.service.drain(0)
    types = {target: body for target, body in zip(receiver.targets, receiver.bodies, strict=True)}
    assert b'"batch.completed"' in types["/batch"]
    assert batch.batch_id.encode() in types["/batch"]
    assert b'"video.completed"' in types["/hook"]
