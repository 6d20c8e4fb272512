"""Loopback HTTP for faults: a server that answers what a function says, a proxy that edits and drops, a black hole."""

import http.client
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass
class Request:
    """What a client sent; `path` includes the query, header names are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Response:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


Answer = Callable[[Request], Response | None]
"""None: the connection is closed without an answer."""


@contextmanager
def http_server(answer: Answer, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Serve on a free port of 127.0.0.1. Yields the URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_request(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            body = self.rfile.read(int(headers.get("content-length", 0)))
            response = answer(Request(self.command, self.path, headers, body))
            if response is None:
                self.close_connection = True
                return
            self.send_response_only(response.status)
            length = {"content-length": str(len(response.body))}
            for name, value in {**length, **response.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(response.body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_request  # noqa: N815  # the base class's names

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on stderr."""

    with _Server(("127.0.0.1", 0), Handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        try:
            yield f"{'http' if tls is None else 'https'}://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # clients keep their connections open

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are part of the tests."""


def forward(upstream: str, request: Request) -> Response:
    """Send the request on, its Host included, since that is signed."""
    connection = http.client.HTTPConnection(urlsplit(upstream).netloc, timeout=30)
    try:
        connection.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.items():
            connection.putheader(name, value)
        connection.endheaders(request.body)
        answer = connection.getresponse()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        for hop in ("connection", "transfer-encoding", "keep-alive"):
            headers.pop(hop, None)
        return Response(answer.status, headers, answer.read())
    finally:
        connection.close()


@contextmanager
def swallowing_proxy(upstream: str, swallows: Callable[[Request], bool]) -> Iterator[str]:
    """A proxy that forwards everything and loses the answers to the requests that `swallows` picks."""

    def answer(request: Request) -> Response | None:
        response = forward(upstream, request)
        return None if swallows(request) else response

    with http_server(answer) as url:
        yield url


@contextmanager
def editing_proxy(upstream: str, edit: Callable[[Request], None]) -> Iterator[str]:
    """A proxy that changes each request before it forwards it."""

    def answer(request: Request) -> Response | None:
        edit(request)
        return forward(upstream, request)

    with http_server(answer) as url:
        yield url


@contextmanager
def black_hole() -> Iterator[str]:
    """A server that takes every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
