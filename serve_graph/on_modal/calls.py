"""Modal as the platform that runs jobs: calls of the deployed generator."""

from typing import Any

import modal
from modal.exception import Error as ModalError
from modal.exception import (
    ExecutionError,
    FunctionTimeoutError,
    InternalFailure,
    NotFoundError,
    OutputExpiredError,
    RemoteError,
)

from serve_graph.jobs.platform import PlatformUnavailable
from serve_graph.on_modal.options import ModalOptions

_GIVEN_UP = (ExecutionError, FunctionTimeoutError, InternalFailure, RemoteError)
"""How Modal says that a call has ended without having returned."""


class ModalPlatform:
    """Implements `serve_graph.jobs.Platform`. generate: the generator's method, of the app that this process is of."""

    def __init__(self, options: ModalOptions, generate: Any) -> None:
        self._options = options
        self._generate = generate

    @property
    def max_turns(self) -> int:
        return self._options.max_turns

    def call(self, work_id: str) -> str:
        """Spawn `Generator.generate`; Modal keeps it until a container has room, and gives a lost one's to another."""
        try:
            call_id: str = self._generate.spawn(work_id).object_id
        except ModalError as error:
            raise PlatformUnavailable(str(error)) from error
        return call_id

    def is_pending(self, call_id: str) -> bool:
        try:
            modal.FunctionCall.from_id(call_id).get(timeout=0)
        except TimeoutError:
            return True
        except (NotFoundError, OutputExpiredError, *_GIVEN_UP):
            return False
        except ModalError as error:
            raise PlatformUnavailable(str(error)) from error
        except Exception:  # what the call itself has raised
            return False
        return False

    def is_idle(self) -> bool:
        try:
            stats = self._generate.get_current_stats()
        except ModalError as error:
            raise PlatformUnavailable(str(error)) from error
        return bool(stats.backlog == 0 and stats.num_running_inputs == 0)
