"""A receiver of webhooks on loopback, with or without TLS, whose answers a test writes byte by byte."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import trustme

NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"

Respond = Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Receiver:
    """What arrived. sni: the names that clients asked for in their handshakes."""

    port: int = 0
    connections: int = 0
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    sni: list[str | None] = field(default_factory=list)


def answers(data: bytes) -> Respond:
    async def respond(writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()

    return respond


def status(code: int, *headers: str) -> Respond:
    lines = [f"HTTP/1.1 {code} X", "Content-Length: 0", *headers, "", ""]
    return answers("\r\n".join(lines).encode())


@asynccontextmanager
async def receiving(
    respond: Respond | None = None,
    *,
    authority: trustme.CA | None = None,
    certificate_for: str = "hooks.example.com",
    address: str = "127.0.0.1",
    port: int = 0,
) -> AsyncIterator[Receiver]:
    """authority: signs the certificate; None is plain HTTP."""
    receiver = Receiver()
    handlers: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        receiver.connections += 1
        handlers[asyncio.create_task(handle(reader, writer))] = writer

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head.strip().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines)
            lowered = {name.lower(): value for name, value in headers.items()}
            receiver.targets.append(first.split(" ")[1])
            receiver.headers.append(lowered)
            receiver.bodies.append(await reader.readexactly(int(lowered["content-length"])))
            await (respond or answers(NO_CONTENT))(writer)
        writer.transport.abort()

    tls = None
    if authority is not None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(certificate_for).configure_cert(tls)
        tls.sni_callback = lambda _socket, name, _context: receiver.sni.append(name)
    server = await asyncio.start_server(accept, address, port, ssl=tls)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()
        for handler, writer in handlers.items():
            handler.cancel()
            writer.transport.abort()
        await asyncio.gather(*handlers, return_exceptions=True)
        await server.wait_closed()
