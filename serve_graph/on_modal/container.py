"""One container's graph in Modal's main process: started, woken up after a restore, built anew where that broke it."""

import asyncio
import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from schemas.errors import ModelNotReady, ShuttingDown, WanError
from serve_graph.logs import configure_logging, log_event, log_failure
from serve_graph.on_modal.graph_process import GraphProcess
from serve_graph.on_modal.options import ModalOptions
from serve_graph.renewal import renew_process
from serve_graph.settings import SECRET_NAMES, ConfigError
from storage.store import StoreError

BUCKET_VARIABLES = "WAN_STORAGE__S3__"
"""Of the Secret for the bucket, which may have been changed since the snapshot."""

PROBE_TIMEOUT_S = 10.0
"""A thawed Serve answered after 0.06 s on loopback (median of 10), but there all of its memory was at hand."""

AWAKEN_TIMEOUT_S = 120.0
"""Looking at the bucket, and moving a model of up to 28 GB to the GPU."""


class Container:
    """`start`, then `awaken` (once, perhaps in another container than `start`), then `work_on`, then `stop`."""

    def __init__(self, options: ModalOptions) -> None:
        configure_logging()
        self._options = options
        self._started_in = os.environ.get("MODAL_TASK_ID")
        self._graph: GraphProcess | None = None
        self._port = 0
        self._start: str | None = None
        self._awake_s: float | None = None

    @property
    def port(self) -> int:
        """Of the graph's own ingress, on loopback."""
        return self._port

    def start(self) -> None:
        """Bring the graph up, model and all, and warm it up. Raises ConfigError, StartFailed, WanError, GraphGone."""
        self._graph = GraphProcess(self._options)
        self._port = self._graph.call("start").result()

    def awaken(self) -> None:
        """Have the replicas work with this container's secrets; build the graph anew where it does not answer."""
        began = time.monotonic()
        renew_process({})
        restored = os.environ.get("MODAL_TASK_ID") != self._started_in
        start = "restored" if restored else "fresh"
        try:
            self._running.call("probe").result(PROBE_TIMEOUT_S)
            self._awaken(start)
        except (WanError, ConfigError, StoreError):  # the graph answers, and says what is wrong
            raise
        except Exception as failure:  # whatever a restore has broken
            log_failure("restore_failed", failure)
            start = "rebuilt"
            self._running.end()
            self.start()
            self._awaken(start)
        self._start, self._awake_s = start, round(time.monotonic() - began, 3)
        log_event("graph_awake", start=start, seconds=self._awake_s)
        self._record_start()

    async def work_on(self, work_id: str) -> bool:
        """Work until this job or batch has ended; False where this container or the call ends first.

        Raises GraphGone: this container can do nothing any more.
        """
        try:
            await asyncio.wrap_future(self._running.call("work_on", work_id))
        except (TimeoutError, ShuttingDown):
            return False
        return True

    async def started(self) -> dict[str, Any]:
        """How this container came up, in how many seconds after the snapshot, and with which GPU."""
        gpu = asyncio.wrap_future(self._running.call("gpu"))
        return {
            "container": os.environ.get("MODAL_TASK_ID"),
            "start": self._start,
            "awake_s": self._awake_s,
            "gpu": await asyncio.wait_for(gpu, AWAKEN_TIMEOUT_S),
        }

    def stop(self) -> None:
        """Let running jobs end within the drain limit, hand the others back, and take everything down."""
        if self._graph is not None:
            self._graph.stop()

    @property
    def _running(self) -> GraphProcess:
        if self._graph is None:
            raise ModelNotReady("the graph has not been started")
        return self._graph

    def _awaken(self, start: str) -> None:
        environment = {
            name: value
            for name, value in os.environ.items()
            if name in SECRET_NAMES or name.startswith(BUCKET_VARIABLES) or name == "MODAL_TASK_ID"
        }
        self._running.call("awaken", environment, start).result(AWAKEN_TIMEOUT_S)

    def _record_start(self) -> None:
        """Leave a line about this start in the Volume, for whoever asks how long starts take."""
        folder = Path(self._options.outputs_dir) / "starts"
        record = {
            "container": os.environ.get("MODAL_TASK_ID"),
            "at": datetime.now(UTC).isoformat(),
            "start": self._start,
            "awake_s": self._awake_s,
            "gpu": self._options.gpu,
            "snapshot": self._options.snapshot,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{record['container']}.json").write_text(json.dumps(record) + "\n")
        except OSError as failure:  # no clip depends on it
            log_failure("start_not_recorded", failure)
