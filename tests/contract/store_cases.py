"""The stores that the contract suite runs against; `conftest.py` names them and opens a case for each test."""

import pickle
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import parse_qsl, urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from minio.credentials.providers import Provider
from pydantic import SecretStr
from s3_servers.ministack import BUCKETS
from s3_servers.process import S3Server
from store_worker import CRASH_STATUS

import storage
from schemas.errors import UrlExpired, UrlInvalid
from storage.local import LocalStore
from storage.s3 import S3Store
from storage.s3_credentials import static_credentials
from storage.s3_options import S3Options
from storage.s3_presigner import S3Presigner
from storage.s3_setup import prepare_bucket
from storage.signing import LocalPresigner
from storage.store import ObjectNotFound, ObjectStore, Presigner, content_type

WORKER = Path(__file__).with_name("store_worker.py")
PROJECT = Path(storage.__file__).parents[1]


@dataclass(frozen=True)
class Answer:
    """What an HTTP client got."""

    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes


@dataclass(frozen=True)
class StoreCase:
    """One store under test.

    open_store: picklable, since other processes open the same store.
    wait_until: returns when the clock of who answers the URLs shows that time.
    crash_in_put: a process that dies in the middle of a `put` of this key.
    """

    store: ObjectStore
    presigner: Presigner
    open_store: Callable[[], ObjectStore]
    wait_until: Callable[[datetime], None]
    crash_in_put: Callable[[str], None]

    def fetch(self, url: str, method: str = "GET") -> Answer:
        return fetch(url, method)


def fetch(url: str, method: str = "GET") -> Answer:
    """Fetch a URL on this machine; an error status is an answer like any other."""
    opener = build_opener(ProxyHandler({}))
    try:
        with opener.open(Request(url, method=method), timeout=10) as response:
            return Answer(response.status, _lower(response.headers.items()), response.read())
    except HTTPError as error:
        with error:
            return Answer(error.code, _lower(error.headers.items()), error.read())


def _lower(headers: list[tuple[str, str]]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers}


@dataclass
class Clock:
    """A clock that the test moves."""

    time: datetime

    def now(self) -> datetime:
        return self.time

    def wait_until(self, time: datetime) -> None:
        self.time = max(self.time, time)


@contextmanager
def local_case(tmp_path: Path) -> Iterator[StoreCase]:
    """The local folder, its URLs answered by a real HTTP server as the ingress would."""
    clock = Clock(datetime.now(UTC))
    open_store = partial(LocalStore, tmp_path / "store")
    store = open_store()
    secret = secrets.token_bytes(32)

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            parts = urlsplit(self.path)
            key = "clips/" + parts.path.removeprefix("/outputs/")
            headers = {"Content-Type": content_type(key)}
            try:
                query = parse_qsl(parts.query, keep_blank_values=True)
                disposition = server_presigner.verify(self.command, key, query)
                status, body = 200, store.get(key).body
            except (UrlInvalid, UrlExpired) as error:
                status, body, disposition = error.status, b"", None
            except ObjectNotFound:
                status, body, disposition = 404, b"", None
            if disposition is not None:
                headers["Content-Disposition"] = disposition
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_DELETE = answer  # noqa: N815  # the base class chose these names

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on stderr."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        public_url = f"http://127.0.0.1:{server.server_port}"
        server_presigner = LocalPresigner(public_url, secret, now=clock.now)
        thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        try:
            yield StoreCase(
                store=store,
                presigner=LocalPresigner(public_url + "/", secret, now=clock.now),
                open_store=open_store,
                wait_until=clock.wait_until,
                crash_in_put=partial(crash, open_store, "crash_before_rename"),
            )
        finally:
            server.shutdown()
            thread.join()


@cache
def prepared_bucket(server: S3Server) -> S3Options:
    """A bucket that the cases of one server share, each below a prefix of its own."""
    options = S3Options(endpoint=server.endpoint, bucket=f"{BUCKETS}contract")
    return prepare_bucket(options, server_credentials(server), create=True).options


def server_credentials(server: S3Server) -> Provider:
    return static_credentials(SecretStr(server.access_key), SecretStr(server.secret_key))


@contextmanager
def s3_case(server: S3Server) -> Iterator[StoreCase]:
    """A real S3 server, its URLs answered by itself and its clock the machine's."""
    credentials = server_credentials(server)
    options = prepared_bucket(server).model_copy(update={"prefix": f"{secrets.token_hex(8)}/"})
    open_store = partial(S3Store, options, credentials)
    yield StoreCase(
        store=open_store(),
        presigner=S3Presigner(options, credentials),
        open_store=open_store,
        wait_until=wait_for_the_clock,
        crash_in_put=partial(crash, open_store, "crash_in_the_body"),
    )


def wait_for_the_clock(time_: datetime) -> None:
    while (left := time_ - datetime.now(UTC)) >= timedelta(0):
        time.sleep(left.total_seconds() + 0.01)  # the store's clock is what is waited for


def crash(open_store: Callable[[], ObjectStore], task: str, *arguments: str) -> None:
    """Run a task that kills its process in the middle of a `put`."""
    worker = Worker(open_store, task, *arguments)
    worker.wait_ready()
    worker.go()
    assert worker.result() == (CRASH_STATUS, "")


class Worker:
    """A process that opens the store, waits for `go` and does one task of `store_worker.py`."""

    def __init__(self, open_store: Callable[[], ObjectStore], task: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), task, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": str(PROJECT)},
        )
        self._send(pickle.dumps(open_store).hex())

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def wait_ready(self) -> None:
        """Wait until the store is open."""
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def go(self) -> None:
        """Let it start."""
        self._send("go")

    def result(self) -> tuple[int, str]:
        """Wait for its end: the exit status and what it printed."""
        printed, _ = self._process.communicate(timeout=60)
        return self._process.returncode, printed.strip()


def race(open_store: Callable[[], ObjectStore], processes: int, task: str, *arguments: str) -> list[str]:
    """Run the same task in many processes at once, each told its number last. Returns what they printed."""
    workers = [Worker(open_store, task, *arguments, str(number)) for number in range(processes)]
    for worker in workers:
        worker.wait_ready()
    for worker in workers:
        worker.go()
    results = [worker.result() for worker in workers]
    assert [status for status, _ in results] == [0] * processes
    return [printed for _, printed in results]
