"""Weights from a hub: whole or not there. The hub is one on loopback with the few routes that the client uses."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest

from schemas.errors import ModelNotReady
from schemas.official_profiles import PROFILES, WAN_TINY
from serve_graph.on_modal.weights import INVENTORY, check_whole, fetch

PROFILE = PROFILES["wan2.1-t2v-1.3b"]
COMMIT = "c" * 40
SMALL, LARGE = "model_index.json", "transformer/diffusion_pytorch_model.safetensors"


class Hub:
    """files: path to bytes. cut: bytes of a file that are sent before the connection breaks, once."""

    def __init__(self) -> None:
        self.files = {SMALL: b'{"_class_name": "WanPipeline"}', LARGE: bytes(range(256)) * 4096}
        self.told = dict(self.files)
        self.asked: list[str] = []
        self.cut: dict[str, int] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:  # the base class's name for it
                hub.answer(self)

            do_HEAD = do_GET  # noqa: N815  # the base class's name for it

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = urlparse(handler.path).path
        self.asked.append(f"{handler.command} {path} {handler.headers.get('Range', '')}".strip())
        if path.startswith(f"/api/models/{PROFILE.hub_id}"):
            told = self.tree() if "/tree/" in path else self.info()
            self.send(handler, json.dumps(told).encode(), {"Content-Type": "application/json"})
            return
        name = path.removeprefix(f"/{PROFILE.hub_id}/resolve/{COMMIT}/")
        if name not in self.files:
            self.send(handler, b"", {"X-Error-Code": "EntryNotFound"}, status=404)
            return
        body = self.files[name]
        headers = {"ETag": f'"{hashlib.sha256(self.told[name]).hexdigest()}"', "X-Repo-Commit": COMMIT}
        start = int((handler.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send(handler, body[start:], headers, status=206 if start else 200, cut=self.cut.pop(name, None))

    def send(
        self,
        handler: BaseHTTPRequestHandler,
        body: bytes,
        headers: dict[str, str],
        status: int = 200,
        cut: int | None = None,
    ) -> None:
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body[:cut])
            handler.close_connection = cut is not None

    def tree(self) -> list[dict[str, Any]]:
        return [{"type": "file", "path": name, "size": len(body), "oid": "b" * 40} for name, body in self.told.items()]

    def info(self) -> dict[str, Any]:
        siblings = [
            {"rfilename": SMALL, "size": len(self.told[SMALL]), "blobId": "b" * 40},
            {
                "rfilename": LARGE,
                "size": len(self.told[LARGE]),
                "blobId": "b" * 40,
                "lfs": {
                    "sha256": hashlib.sha256(self.told[LARGE]).hexdigest(),
                    "size": len(self.told[LARGE]),
                    "pointerSize": 135,
                },
            },
        ]
        return {"id": PROFILE.hub_id, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}


@pytest.fixture
def hub() -> Iterator[Hub]:
    opened = Hub()
    yield opened
    opened.close()


def test_weights_come_whole_from_one_commit_and_are_not_fetched_again(tmp_path: Path, hub: Hub) -> None:
    assert fetch(PROFILE, "main", tmp_path, hub.url) == COMMIT

    assert (tmp_path / LARGE).read_bytes() == hub.files[LARGE]
    check_whole(tmp_path)
    inventory = json.loads((tmp_path / INVENTORY).read_text())
    assert (inventory["commit"], {file["path"] for file in inventory["files"]}) == (COMMIT, {SMALL, LARGE})
    hub.asked.clear()
    fetch(PROFILE, COMMIT, tmp_path, hub.url)
    assert [line for line in hub.asked if line.startswith("GET") and LARGE in line] == []


def test_a_file_that_is_not_the_hub_s_is_refused_and_fetched_anew(tmp_path: Path, hub: Hub) -> None:
    hub.files[LARGE] = hub.files[LARGE][::-1]
    with pytest.raises(ModelNotReady, match="did not come as the hub has it"):
        fetch(PROFILE, "main", tmp_path, hub.url)
    with pytest.raises(ModelNotReady, match="no whole weights"):
        check_whole(tmp_path)

    hub.files = dict(hub.told)
    fetch(PROFILE, "main", tmp_path, hub.url)
    check_whole(tmp_path)


def test_a_folder_that_lost_a_file_since_is_not_whole(tmp_path: Path, hub: Hub) -> None:
    fetch(PROFILE, "main", tmp_path, hub.url)
    (tmp_path / LARGE).write_bytes(b"short")

    with pytest.raises(ModelNotReady, match=f"{LARGE} in .* is not whole: run `modal run"):
        check_whole(tmp_path)


def test_a_hub_that_is_away_is_told(tmp_path: Path, hub: Hub) -> None:
    hub.server.server_close()
    with pytest.raises(ModelNotReady, match="could not be fetched from the hub"):
        fetch(PROFILE, "main", tmp_path, "http://127.0.0.1:9")


def test_a_profile_that_is_made_here_has_nothing_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(ModelNotReady, match="nothing to fetch"):
        fetch(WAN_TINY, "main", tmp_path)
