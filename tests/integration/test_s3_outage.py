"""The bucket goes away in the middle of twenty requests and comes back. `-s` shows the figures."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from polling import until
from pydantic import SecretStr
from s3_servers.ministack import BUCKETS, Ministack

from storage.job_records import JobRecords
from storage.s3 import S3Store
from storage.s3_client import S3Client
from storage.s3_credentials import static_credentials
from storage.s3_options import S3Options
from storage.s3_xml import parse_xml
from tests.integration.load import BODY, Outcome, report, run
from tests.integration.service import RunningService

BUCKET = f"{BUCKETS}outage"
OUTAGE_S = float(os.environ.get("OUTAGE_S", "8"))


@contextmanager
def watched_readiness(service: RunningService) -> Iterator[list[tuple[float, int]]]:
    """The changes of /health/ready while the block runs: (time, status)."""
    changes: list[tuple[float, int]] = []
    over = threading.Event()

    def watch() -> None:
        with service.client() as http:
            while not over.wait(0.1):
                status = http.get("/health/ready").status_code
                if not changes or changes[-1][1] != status:
                    changes.append((time.monotonic(), status))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield changes
    finally:
        over.set()
        watcher.join()


@pytest.mark.timeout(400)
def test_every_request_ends_well_when_the_bucket_is_away_for_a_while(
    tmp_path: Path, tell: Callable[[str, str], None]
) -> None:
    """Twice: frozen, so that requests hang, then gone, so that they are refused."""
    with Ministack(tmp_path / "ministack") as ministack:
        server = ministack.info
        options = {"endpoint": server.endpoint, "bucket": BUCKET}
        service = RunningService(
            tmp_path,
            env={"WAN_S3_ACCESS_KEY": server.access_key, "WAN_S3_SECRET_KEY": server.secret_key},
            storage={"kind": "s3", "folder": str(tmp_path / "secret"), "create_bucket": True, "s3": options},
        ).wait_ready()
        try:
            usual = run(service)
            for name, leave, come_back in (
                ("frozen", ministack.freeze, ministack.thaw),
                ("gone", ministack.stop, ministack.start),
            ):
                one_outage(service, usual, name, leave, come_back, tell)
            credentials = static_credentials(SecretStr(server.access_key), SecretStr(server.secret_key))
            store = S3Store(S3Options.model_validate(options), credentials)
            records = [JobRecords(store).get(stat.key[5:-5])[0] for stat in store.list("jobs/").stats]
            clips = {stat.key for stat in store.list("clips/").stats}
            client = S3Client(S3Options.model_validate(options), credentials)
            uploads = parse_xml(client.send("GET", query={"uploads": ""}).body).findall("Upload")
            spooled = list((tmp_path / "data" / "spool").rglob("job_*"))
        finally:
            service.stop()

    assert {record.state.value for record in records} == {"succeeded"}
    assert clips == {record.result.key for record in records if record.result is not None}
    assert uploads == []
    assert spooled == []


def one_outage(
    service: RunningService,
    usual: list[Outcome],
    name: str,
    leave: Callable[[], None],
    come_back: Callable[[], None],
    tell: Callable[[str, str], None],
) -> None:
    refused: list[httpx.Response] = []

    def outage() -> None:
        leave()
        ends = time.monotonic() + OUTAGE_S
        with service.client() as http:
            while http.get("/health/ready").status_code == 200:
                pass
            refused.append(http.post("/generate", json=BODY))
        time.sleep(max(0, ends - time.monotonic()))  # the outage is what the test is about
        come_back()

    with watched_readiness(service) as changes:
        outcomes = run(service, outage)
        until(lambda: changes[-1][1] == 200, "a ready service")
    down_s = changes[2][0] - changes[1][0]
    tell("faults", f"{report(f'{OUTAGE_S:g} s with the store {name}', outcomes, usual)}; not ready for {down_s:.1f} s")

    assert [outcome.clip["sha256"] for outcome in outcomes] == [outcome.clip["sha256"] for outcome in usual]
    assert {refusal for outcome in outcomes for refusal in outcome.refusals} <= {"store-unavailable"}
    (refusal,) = refused
    assert (refusal.status_code, refusal.json()["type"]) == (503, "urn:wan-serve:problem:store-unavailable")
    assert int(refusal.headers["retry-after"]) >= 1
    assert [status for _, status in changes] == [200, 503, 200]
