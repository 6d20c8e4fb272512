"""The README's receiver takes what the sender sends, and refuses what anybody else does."""

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx
from prometheus_client import CollectorRegistry

import schemas
from schemas.webhooks import WebhookEvent, WebhookSubject
from serve_graph.metrics import IngressMetrics
from serve_graph.open_ports import free_port
from serve_graph.webhooks.policy import WebhookPolicy
from serve_graph.webhooks.sender import WebhookSender
from serve_graph.webhooks.signing import WebhookSigner

README = Path(schemas.__file__).parents[1] / "README.md"
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OTHER_SECRET = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"
EVENT = WebhookEvent(
    type="video.failed",
    timestamp=datetime(2026, 11, 25, tzinfo=UTC),
    data=WebhookSubject(id="job_1", state="failed", request_id="r1"),
)


def receiver_of_the_readme() -> str:
    section = README.read_text().split("### Webhooks", 1)[1].split("\n### ", 1)[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return str(code)


@asynccontextmanager
async def running(code: str, port: int) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code.replace("9000", str(port))),
        env={"WAN_WEBHOOK_SECRET": SECRET},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        for _ in range(200):
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
            else:
                writer.close()
                break
        yield process
    finally:
        process.kill()
        await process.communicate()


async def test_the_readmes_receiver_verifies_what_we_send_and_nothing_else() -> None:
    port = free_port()
    policy, metrics = WebhookPolicy(allow_http=True, allow_private_addresses=True), IngressMetrics(CollectorRegistry())
    url = f"http://127.0.0.1:{port}/"
    async with running(receiver_of_the_readme(), port) as process:
        ours = await WebhookSender(policy, WebhookSigner(SECRET), metrics).deliver(url, "msg_job_1", EVENT)
        rotated = f"{OTHER_SECRET} {SECRET}"
        both = await WebhookSender(policy, WebhookSigner(rotated), metrics).deliver(url, "msg_job_2", EVENT)
        forged = await WebhookSender(policy, WebhookSigner(OTHER_SECRET), metrics).deliver(url, "msg_job_3", EVENT)
        async with httpx.AsyncClient(trust_env=False) as client:
            unsigned = await client.post(url, json={})
            garbled = await client.post(url, json={}, headers=dict.fromkeys(["webhook-id", "webhook-signature"], "x"))
        assert process.stdout is not None
        lines = [(await process.stdout.readline()).decode().split() for _ in range(2)]

    assert (ours.status, both.status, forged.status) == (204, 204, 400)
    assert (unsigned.status_code, garbled.status_code) == (400, 400)
    assert lines == [["msg_job_1", "video.failed", "job_1"], ["msg_job_2", "video.failed", "job_1"]]
