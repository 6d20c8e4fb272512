"""A hub on loopback that has one checkpoint and one LoRA adapter, with the few routes that the hub's client uses."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlparse

from schemas.official_profiles import PROFILES

PROFILE = PROFILES["wan2.1-t2v-1.3b"]
COMMIT = "c" * 40
LORA_HUB_ID, LORA, STRANGER = "them/adapters", "styles/ink.safetensors", "styles/oil.safetensors"
"""An adapter's repository, its file there, and another's."""

SMALL, LARGE = "model_index.json", "transformer/diffusion_pytorch_model.safetensors"


class Hub:
    """files: path to bytes. cut: bytes of a file that are sent before the connection breaks, once."""

    def __init__(self) -> None:
        self.files = {SMALL: b'{"_class_name": "WanPipeline"}', LARGE: bytes(range(256)) * 4096}
        self.told = dict(self.files)
        self.loras = {LORA: bytes(range(256)) * 16, STRANGER: b"another's"}
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
        hub_id, files, told = str(PROFILE.hub_id), self.files, self.told
        if LORA_HUB_ID in path:
            hub_id, files, told = LORA_HUB_ID, self.loras, self.loras
        if path.startswith(f"/api/models/{hub_id}"):
            about = _tree(told) if "/tree/" in path else _info(hub_id, told)
            self.send(handler, json.dumps(about).encode(), {"Content-Type": "application/json"})
            return
        name = path.removeprefix(f"/{hub_id}/resolve/{COMMIT}/")
        if name not in files:
            self.send(handler, b"", {"X-Error-Code": "EntryNotFound"}, status=404)
            return
        body = files[name]
        headers = {"ETag": f'"{hashlib.sha256(told[name]).hexdigest()}"', "X-Repo-Commit": COMMIT}
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


def _tree(told: dict[str, bytes]) -> list[dict[str, Any]]:
    return [{"type": "file", "path": name, "size": len(body), "oid": "b" * 40} for name, body in told.items()]


def _info(hub_id: str, told: dict[str, bytes]) -> dict[str, Any]:
    """Of a repository; what is safetensors is kept in large-file storage."""
    siblings: list[dict[str, Any]] = []
    for name, body in told.items():
        siblings.append({"rfilename": name, "size": len(body), "blobId": "b" * 40})
        if name.endswith(".safetensors"):
            sha256 = hashlib.sha256(body).hexdigest()
            siblings[-1]["lfs"] = {"sha256": sha256, "size": len(body), "pointerSize": 135}
    return {"id": hub_id, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
