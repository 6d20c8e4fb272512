"""What the real server refuses of a function, and the client does not check."""

from grpclib import Status
from modal_proto import api_pb2

from modal_loopback.rpc import refuse

GPUS = frozenset({"T4", "L4", "A10", "A10G", "L40S", "A100", "A100-40GB", "A100-80GB", "H100", "H200", "B200"})
MIN_TIMEOUT_S, MAX_TIMEOUT_S = 1, 24 * 60 * 60
MAX_GPUS = 8


def check_function(function: api_pb2.Function) -> None:
    """Refuse an unknown GPU and limits that contradict each other or are out of range."""
    name = function.function_name
    gpu = function.resources.gpu_config
    if gpu.gpu_type and gpu.gpu_type not in GPUS:
        _bad(f"Invalid GPU type {gpu.gpu_type!r} of {name}: choose one of {', '.join(sorted(GPUS))}.")
    if gpu.count > MAX_GPUS:
        _bad(f"{name} asks for {gpu.count} GPUs; there are {MAX_GPUS} at most.")
    for what, seconds in (("timeout", function.timeout_secs), ("startup_timeout", function.startup_timeout_secs)):
        if not MIN_TIMEOUT_S <= seconds <= MAX_TIMEOUT_S:
            _bad(f"The {what} of {name} is {seconds} s, not {MIN_TIMEOUT_S} to {MAX_TIMEOUT_S} s.")
    _check_autoscaler(name, function.autoscaler_settings)
    if function.target_concurrent_inputs > max(function.max_concurrent_inputs, 1):
        _bad(f"target_inputs of {name} is larger than its max_inputs.")


def _check_autoscaler(name: str, settings: api_pb2.AutoscalerSettings) -> None:
    if settings.HasField("max_containers") and settings.min_containers > settings.max_containers:
        _bad(f"min_containers of {name} is larger than its max_containers.")
    if settings.HasField("scaledown_window") and not 2 <= settings.scaledown_window <= 20 * 60:
        _bad(f"The scaledown_window of {name} is {settings.scaledown_window} s, not 2 to 1200 s.")


def _bad(message: str) -> None:
    refuse(Status.INVALID_ARGUMENT, message)
