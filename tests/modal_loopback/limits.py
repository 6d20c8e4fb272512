"""What the real server refuses of a function. The client checks the limits of containers and concurrency itself."""

from grpclib import Status
from modal_proto import api_pb2

from modal_loopback.rpc import refuse

GPUS = frozenset({"T4", "L4", "A10", "A10G", "L40S", "A100", "A100-40GB", "A100-80GB", "H100", "H200", "B200"})
MAX_GPUS = 8
MIN_TIMEOUT_S, MAX_TIMEOUT_S = 1, 24 * 60 * 60


def check_function(function: api_pb2.Function) -> None:
    """Refuse an unknown GPU, too many of them, and timeouts out of range."""
    name = function.function_name
    gpu = function.resources.gpu_config
    if gpu.gpu_type and gpu.gpu_type not in GPUS:
        _bad(f"Invalid GPU type {gpu.gpu_type!r} of {name}: choose one of {', '.join(sorted(GPUS))}.")
    if gpu.count > MAX_GPUS:
        _bad(f"{name} asks for {gpu.count} GPUs; there are {MAX_GPUS} at most.")
    for what, seconds in (("timeout", function.timeout_secs), ("startup_timeout", function.startup_timeout_secs)):
        if not MIN_TIMEOUT_S <= seconds <= MAX_TIMEOUT_S:
            _bad(f"The {what} of {name} is {seconds} s, not {MIN_TIMEOUT_S} to {MAX_TIMEOUT_S} s.")


def _bad(message: str) -> None:
    refuse(Status.INVALID_ARGUMENT, message)
