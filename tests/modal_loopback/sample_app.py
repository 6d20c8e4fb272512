"""An app with one of each: what the loopback's tests deploy, and run in containers."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import modal
from modal.mount import ROOT_DIR

app = modal.App("sample", tags={"made-for": "tests"})
image = (
    modal.Image.debian_slim("3.11")
    .env({"GREETING": "hello there"})
    .uv_pip_install("numpy==2.0.0", uv_version="0.9.0")
    .add_local_dir(Path(__file__).parent / "sample_files", f"{ROOT_DIR}/sample_files")
)
weights = modal.Volume.from_name("sample-weights", create_if_missing=True)
outputs = modal.Volume.from_name("sample-outputs", create_if_missing=True)
secret = modal.Secret.from_name("sample-secret", required_keys=["KEY"])

CLOCKS = "import sys, time\nfor line in sys.stdin: print(time.time(), time.monotonic(), flush=True)"


def hold_at(gate: str) -> str:
    """Wait until another process has opened this FIFO and closed it. Returns what it wrote."""
    return Path(gate).read_text()


@app.cls(
    image=image,
    gpu=os.environ.get("SAMPLE_GPU", "L4"),
    enable_memory_snapshot=True,
    experimental_options={"enable_gpu_snapshot": True},
    volumes={"/weights": weights.with_mount_options(read_only=True), "/outputs": outputs},
    secrets=[secret],
    min_containers=int(os.environ.get("SAMPLE_MIN", "0")),
    max_containers=1,
    scaledown_window=60,
    timeout=int(os.environ.get("SAMPLE_TIMEOUT", "600")),
    startup_timeout=120,
)
@modal.concurrent(max_inputs=3, target_inputs=2)
class Painter:
    """A class with a snapshot. A child process of it tells its own clocks, as a Ray worker would have them."""

    @modal.enter(snap=True)
    def load(self) -> None:
        if "BREAK_ENTER" in os.environ:
            raise RuntimeError("this enter is broken")
        self.child = subprocess.Popen([sys.executable, "-c", CLOCKS], stdin=-1, stdout=-1, text=True, bufsize=1)
        self.loaded = (time.time(), time.monotonic(), *self.child_clocks())
        print("loaded", flush=True)

    @modal.enter(snap=False)
    def wake(self) -> None:
        self.woken = (time.time(), time.monotonic(), *self.child_clocks())

    def child_clocks(self) -> tuple[float, float]:
        print(file=self.child.stdin)
        wall, monotonic = self.child.stdout.readline().split()
        return float(wall), float(monotonic)

    @modal.method()
    def slept(self) -> list[float]:
        """How far each clock went between the two `enter`s: wall, monotonic, and the child's two."""
        return [after - before for before, after in zip(self.loaded, self.woken, strict=True)]

    @modal.method()
    def env(self, name: str) -> str | None:
        return os.environ.get(name)

    @modal.method()
    def hold(self, gate: str) -> str:
        print("holding", flush=True)
        return hold_at(gate)

    @modal.method()
    async def wait_forever(self) -> None:
        print("waiting", flush=True)
        await asyncio.Event().wait()

    @modal.exit()
    def leave(self) -> None:
        print("left", flush=True)


@app.function(image=image, schedule=modal.Period(hours=1))
def sweep() -> str:
    return (Path("sample_files") / "settings.yaml").read_text() + os.environ["GREETING"]


@app.function(image=image)
def double(number: int) -> int:
    print(f"doubling {number}", flush=True)
    return 2 * number


@app.function(image=image, retries=modal.Retries(max_retries=1, initial_delay=1.0))
def fail_first(trace: str) -> str:
    """Fails on its first try; the trace tells which one it is."""
    with Path(trace).open("a+") as file:
        file.write("tried\n")
        file.seek(0)
        tries = len(file.readlines())
    if tries == 1:
        raise ValueError("the first try")
    return f"try {tries}"


@app.function(image=image, max_containers=1)
@modal.concurrent(max_inputs=20)
@modal.asgi_app()
def web():
    import anyio
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
    from starlette.routing import Route

    async def echo(request: Request) -> Response:
        chunks = [len(chunk) async for chunk in request.stream() if chunk]
        return PlainTextResponse(
            f"{sum(chunks)} bytes, {request.url.query}", status_code=201, headers={"x-seen": request.headers["x-sent"]}
        )

    async def stream(request: Request) -> Response:
        async def lines() -> AsyncIterator[str]:
            yield "first\n"
            yield await anyio.to_thread.run_sync(hold_at, request.query_params["gate"])

        return StreamingResponse(lines(), media_type="text/plain")

    async def until_disconnect(request: Request) -> Response:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        await anyio.Path(request.query_params["told"]).write_text("gone")
        return Response()

    async def slow(request: Request) -> Response:
        return PlainTextResponse(await anyio.to_thread.run_sync(hold_at, request.query_params["gate"]))

    async def spawn(request: Request) -> Response:
        function = modal.Function.from_name("sample", "double")
        call = await function.spawn.aio(int(request.query_params["number"]))
        return JSONResponse({"call": call.object_id})

    async def poll(request: Request) -> Response:
        call = modal.FunctionCall.from_id(request.path_params["call"])
        try:
            return JSONResponse({"result": await call.get.aio(timeout=0)})
        except TimeoutError:
            return JSONResponse({}, status_code=202)

    return Starlette(
        routes=[
            Route("/echo", echo, methods=["POST"]),
            Route("/stream", stream),
            Route("/until-disconnect", until_disconnect),
            Route("/slow", slow, methods=["GET", "POST"]),
            Route("/spawn", spawn),
            Route("/poll/{call}", poll),
        ]
    )


@app.local_entrypoint()
def main(number: int = 21) -> None:
    print(f"remote: {double.remote(number)}, mapped: {list(double.map(range(3)))}")
