"""ministack, an S3 server for tests and development (PyPI): signatures, expiry, conditional writes, users.

It stores lifecycle rules and never runs them. Its root key may write with any secret, so an IAM user is made whose
key is checked. `POST /_ministack/reset` needs no key: loopback only.
"""

import json
import os
import signal
import sys
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlencode
from urllib.request import ProxyHandler, Request, build_opener
from xml.etree import ElementTree

from s3_servers.process import Daemon, S3Server, ServerFailed, answers
from serve_graph.open_ports import free_port

BUCKETS = "wan-"
"""What the names of all buckets begin with that the user may make and use."""

_ROOT_KEY = "AKIAROOTROOTROOTROOT"
_START_ATTEMPTS = 3
_USER = "wan-serve"
_POLICY = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": [f"arn:aws:s3:::{BUCKETS}*"]}],
}


class Ministack:
    """A server with one user. `with Ministack(folder) as server: server.info.endpoint`.

    folder: its data, which a stop and a start keep.
    auth: without it, any signature or none will do.
    """

    def __init__(self, folder: Path, *, auth: bool = True) -> None:
        self._folder = folder
        self._auth = auth
        self._port = free_port()
        self._daemon: Daemon | None = None
        self._info: S3Server | None = None

    def __enter__(self) -> Self:
        for _ in range(_START_ATTEMPTS - 1):
            try:
                self.start()
                break
            except ServerFailed:  # somebody else may have taken the port
                self._port = free_port()
        else:
            self.start()
        self._info = S3Server(self.endpoint, *self._make_user())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def info(self) -> S3Server:
        assert self._info is not None, "not started"
        return self._info

    def start(self) -> None:
        """Start it, again with the same port, users and objects."""
        self._folder.mkdir(parents=True, exist_ok=True)
        command = [str(Path(sys.executable).with_name("ministack"))]
        self._daemon = Daemon(command, self._folder / "log", self._environment())
        try:
            self._daemon.wait_until(lambda: answers(f"{self.endpoint}/_ministack/health"))
        except ServerFailed:
            self.stop()
            raise

    def stop(self) -> None:
        """End it; it saves its users and rules."""
        if self._daemon is not None:
            self._daemon.send(signal.SIGCONT)
            self._daemon.stop()
            self._daemon = None

    def freeze(self) -> None:
        """From now on it takes connections and never answers."""
        assert self._daemon is not None
        self._daemon.send(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._daemon is not None
        self._daemon.send(signal.SIGCONT)

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ.get("PATH", ""),
            "HOME": str(self._folder),
            "AUTH": "true" if self._auth else "false",
            "SERVICES": "s3,iam,sts",
            "BIND_HOST": "127.0.0.1",
            "GATEWAY_PORT": str(self._port),
            "AWS_ACCESS_KEY_ID": _ROOT_KEY,
            "AWS_SECRET_ACCESS_KEY": "unchecked",
            "S3_PERSIST": "1",
            "PERSIST_STATE": "1",
            "S3_DATA_DIR": str(self._folder / "s3"),
            "STATE_DIR": str(self._folder / "state"),
            "SFTP_ENABLED": "0",
            "IOT_MTLS_ENABLED": "0",
            "LOG_LEVEL": "WARNING",
        }

    def _make_user(self) -> tuple[str, str]:
        self._iam("CreateUser")
        self._iam("PutUserPolicy", PolicyName="buckets", PolicyDocument=json.dumps(_POLICY))
        made = ElementTree.fromstring(self._iam("CreateAccessKey"))  # noqa: S314  # our own child's answer
        texts = {element.tag.rpartition("}")[2]: element.text or "" for element in made.iter()}
        return texts["AccessKeyId"], texts["SecretAccessKey"]

    def _iam(self, action: str, **parameters: str) -> bytes:
        form = {"Action": action, "Version": "2010-05-08", "UserName": _USER, **parameters}
        scope = f"{_ROOT_KEY}/20260101/us-east-1/iam/aws4_request"
        signed = f"AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=host, Signature=0"
        request = Request(self.endpoint, urlencode(form).encode(), {"Authorization": signed})
        with build_opener(ProxyHandler({})).open(request, timeout=10) as response:
            body: bytes = response.read()
            return body
