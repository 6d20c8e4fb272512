"""The whole graph on a real S3 server: the bucket's own URL in the answer, and its bytes behind it. `-s` shows figures.

At the end the bucket goes away in the middle of twenty requests and comes back.
"""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest
from openai import OpenAI
from polling import until
from pydantic import SecretStr
from s3_servers.ministack import BUCKETS, Ministack
from s3_servers.process import S3Server

from schemas.clips import Clip
from storage.job_records import JobRecords
from storage.s3 import S3Store
from storage.s3_client import S3Client
from storage.s3_credentials import static_credentials
from storage.s3_options import S3Options
from storage.s3_xml import parse_xml
from tests.integration.load import BODY, Outcome, report, run
from tests.integration.service import RunningService, run_serve, write_config

BUCKET = f"{BUCKETS}service"
OUTAGE_S = float(os.environ.get("OUTAGE_S", "8"))

Tell = Callable[[str, str], None]


@pytest.fixture(scope="module")
def own_ministack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ministack]:
    """Nobody else's, since it goes away."""
    with Ministack(tmp_path_factory.mktemp("own-ministack")) as running:
        yield running


@pytest.fixture(scope="module", params=["ministack", "ceph"])
def server(request: pytest.FixtureRequest) -> S3Server:
    if request.param == "ministack":
        return request.getfixturevalue("own_ministack").info
    s3_server: S3Server = request.getfixturevalue(request.param)
    return s3_server


@pytest.fixture(scope="module")
def on_s3(server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    storage = {
        "kind": "s3",
        "folder": str(tmp_path_factory.mktemp("secret")),
        "create_bucket": True,
        "s3": {"endpoint": server.endpoint, "bucket": BUCKET},
    }
    env = {"WAN_S3_ACCESS_KEY": server.access_key, "WAN_S3_SECRET_KEY": server.secret_key}
    running = RunningService(tmp_path_factory.mktemp("on-s3"), env=env, storage=storage).wait_ready()
    yield running
    running.stop()


def generate(service: RunningService, **fields: int) -> Clip:
    with service.client() as http:
        answer = http.post("/generate", json={"prompt": "a red circle moving left", **fields})
    assert answer.status_code == 200, answer.text
    return Clip.model_validate_json(answer.content)


def test_generate_answers_the_bucket_s_own_url_and_its_bytes(on_s3: RunningService, server: S3Server) -> None:
    clip = generate(on_s3)
    assert clip.output_url.startswith(f"{server.endpoint}/{BUCKET}/clips/{clip.clip_id}/")
    answer = httpx.get(clip.output_url, timeout=30)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4")
    assert answer.headers["content-disposition"] == f'inline; filename="{clip.clip_id}.mp4"'
    assert hashlib.sha256(answer.content).hexdigest() == clip.sha256
    redirect = httpx.get(f"{on_s3.base}/outputs/{clip.clip_id}", follow_redirects=False, timeout=30)
    assert redirect.status_code == 307
    assert httpx.get(redirect.headers["location"], timeout=30).content == answer.content


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_openai_s_client_downloads_from_the_bucket(on_s3: RunningService, server: S3Server) -> None:
    with OpenAI(base_url=on_s3.base + "/v1", api_key="any") as sdk:
        video = sdk.videos.create_and_poll(prompt="a red circle moving left")
        clip = sdk.videos.download_content(video.id)
        thumbnail = sdk.videos.download_content(video.id, variant="thumbnail")
        assert str(clip.response.url).startswith(f"{server.endpoint}/{BUCKET}/clips/")
        assert (clip.content[4:8], thumbnail.content[:2]) == (b"ftyp", b"\xff\xd8")
        assert thumbnail.response.headers["content-type"] == "image/jpeg"
        assert sdk.videos.delete(video.id).deleted
    assert httpx.get(str(thumbnail.response.url), timeout=30).status_code == 404


def test_bucket_s_url_is_refused_once_changed_or_expired(on_s3: RunningService) -> None:
    clip = generate(on_s3, url_ttl_s=2)
    assert httpx.get(clip.output_url, timeout=30).status_code == 200
    assert httpx.get(clip.output_url.split("?")[0], timeout=30).status_code == 403
    assert httpx.get(clip.output_url.replace("X-Amz-Expires=2", "X-Amz-Expires=9000"), timeout=30).status_code == 403
    while time.time() <= clip.expires_at.timestamp():
        time.sleep(0.05)  # the clock is what expires it
    assert httpx.get(clip.output_url, timeout=30).status_code == 403


def test_health_names_the_store_and_no_key_is_shown(on_s3: RunningService, server: S3Server) -> None:
    generate(on_s3)
    health = httpx.get(on_s3.base + "/health", timeout=30)
    assert health.json()["storage"] == {"kind": "s3", "reachable": True}
    assert server.secret_key not in on_s3.output() + health.text
    commands = [" ".join(process.cmdline()) for process in on_s3.family()]
    assert not [command for command in commands if server.secret_key in command]


def test_serve_refuses_a_bucket_that_is_missing_in_one_line(
    server: S3Server, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WAN_S3_ACCESS_KEY", server.access_key)
    monkeypatch.setenv("WAN_S3_SECRET_KEY", server.secret_key)
    bucket = {"endpoint": server.endpoint, "bucket": f"{BUCKETS}none"}
    ended = run_serve(write_config(tmp_path_factory.mktemp("none"), storage={"kind": "s3", "s3": bucket}))
    assert ended.returncode == 1
    assert "the bucket does not exist: make it" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


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
@pytest.mark.parametrize("server", ["ministack"], indirect=True)
def test_every_request_ends_well_when_the_bucket_is_away_for_a_while(
    on_s3: RunningService, own_ministack: Ministack, tell: Tell
) -> None:
    """Twice: frozen, so that requests hang, then gone, so that they are refused."""
    options = S3Options(endpoint=own_ministack.endpoint, bucket=BUCKET)
    info = own_ministack.info
    credentials = static_credentials(SecretStr(info.access_key), SecretStr(info.secret_key))
    store = S3Store(options, credentials)
    before = {stat.key for stat in store.list("").stats}
    usual = run(on_s3)
    one_outage(on_s3, usual, "frozen", own_ministack.freeze, own_ministack.thaw, tell)
    one_outage(on_s3, usual, "gone", own_ministack.stop, own_ministack.start, tell)

    jobs, clips = ({stat.key for stat in store.list(kind).stats} - before for kind in ("jobs/", "clips/"))
    records = [JobRecords(store).get(key[5:-5])[0] for key in jobs]
    assert {record.state.value for record in records} == {"succeeded"}
    assert clips == {record.result.key for record in records if record.result is not None}
    uploads = S3Client(options, credentials).send("GET", query={"uploads": ""})
    assert parse_xml(uploads.body).findall("Upload") == []
    assert list((on_s3.folder / "data" / "spool").rglob("job_*")) == []


def one_outage(
    service: RunningService,
    usual: list[Outcome],
    name: str,
    leave: Callable[[], None],
    come_back: Callable[[], None],
    tell: Tell,
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
    refusals = {refusal for outcome in outcomes for refusal in outcome.refusals}
    assert refusals <= {"store-unavailable", "model-not-ready"}  # the latter where the machine is too slow for a look
    (refusal,) = refused
    assert (refusal.status_code, refusal.json()["type"]) == (503, "urn:wan-serve:problem:store-unavailable")
    assert int(refusal.headers["retry-after"]) >= 1
    assert [status for _, status in changes] == [200, 503, 200]
