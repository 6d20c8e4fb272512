"""Calls of functions: their inputs, queued until a container takes them, their outputs, and the data between."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from grpclib import Status
from modal._serialization import deserialize_data_format
from modal_proto import api_pb2

from modal_loopback.records import Function
from modal_loopback.rpc import Changes, refuse

if TYPE_CHECKING:
    from modal_loopback.container import Container

MAX_LOST = 8
"""So often is an input given to another container, when the one that had it was lost."""

Result = api_pb2.GenericResult


@dataclass(eq=False, repr=False)
class Input:
    """One input of a call: queued, running in a container, then with an output; lost or failed, it is queued again."""

    input_id: str
    idx: int
    call: "Call"
    payload: api_pb2.FunctionInput
    container: "Container | None" = None
    output: api_pb2.FunctionGetOutputsItem | None = None
    attempts: int = 0
    lost: int = 0
    failed: int = 0

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the function is called with: by position and by name."""
        return deserialize_data_format(self.payload.args, self.payload.data_format, None)


@dataclass(eq=False, repr=False)
class Call:
    """A call: one input, or many of a map. `outputs` holds the inputs that ended, in that order."""

    call_id: str
    function: Function
    invocation: "api_pb2.FunctionCallInvocationType.ValueType"
    inputs: list[Input] = field(default_factory=list)
    outputs: list[Input] = field(default_factory=list)
    data_in: list[api_pb2.DataChunk] = field(default_factory=list)
    data_out: list[api_pb2.DataChunk] = field(default_factory=list)
    is_web: bool = False


class Calls:
    """RPCs of callers, and the queues that containers take from. on_queued: told when a function has new inputs."""

    def __init__(self, functions: dict[str, Function], changes: Changes, ids: "itertools.count[int]") -> None:
        self.calls: dict[str, Call] = {}
        self.on_queued: Callable[[Function], None]
        self._functions = functions
        self._changes = changes
        self._ids = ids
        self._inputs: dict[str, Input] = {}

    # For the web and the containers

    def open(self, function: Function, invocation: "api_pb2.FunctionCallInvocationType.ValueType") -> Call:
        """A call with no inputs yet."""
        call = Call(f"fc-{next(self._ids)}", function, invocation)
        self.calls[call.call_id] = call
        return call

    def add(self, call: Call, idx: int, payload: api_pb2.FunctionInput) -> Input:
        """Queue an input."""
        item = Input(f"in-{next(self._ids)}", idx, call, payload)
        self._inputs[item.input_id] = item
        call.inputs.append(item)
        self._queue(item)
        return item

    def take(self, container: "Container") -> Input | None:
        """Give the next input of its function to this container."""
        if not container.function.queue:
            return None
        item = container.function.queue.popleft()
        item.container = container
        item.attempts += 1
        container.running[item.input_id] = item
        self._changes.notify()
        return item

    def put(self, container: "Container", output: api_pb2.FunctionPutOutputsItem) -> None:
        """Take an output of a container, or queue a failed input again if its function retries."""
        item = container.running.pop(output.input_id, None)
        if item is None:
            return
        policy = item.call.function.proto.retry_policy
        if output.result.status == Result.GENERIC_STATUS_FAILURE and item.failed < policy.retries:
            delay_ms = min(policy.initial_delay_ms * policy.backoff_coefficient**item.failed, policy.max_delay_ms)
            item.failed += 1
            item.container = None
            self._changes.notify()
            asyncio.get_running_loop().call_later(delay_ms / 1000, self._queue, item)
            return
        self._finish(item, output.result, output.data_format, container.task_id)

    def lose(self, container: "Container") -> None:
        """Queue what ran in a container that is gone again, in front; a web request is not tried twice."""
        for item in reversed(container.running.values()):
            item.container = None
            item.lost += 1
            if item.call.is_web or item.lost > MAX_LOST:
                self._finish(item, Result(status=Result.GENERIC_STATUS_INTERNAL_FAILURE, exception="container lost"))
            else:
                self._queue(item, in_front=True)
        container.running.clear()

    def abandon(self, function: Function) -> None:
        """End all inputs of a function, those that run included."""
        for container in function.containers:
            for item in container.running.values():
                self._finish(item, Result(status=Result.GENERIC_STATUS_TERMINATED, exception="abandoned"))
            container.running.clear()
        self.fail_queued(function, Result(status=Result.GENERIC_STATUS_TERMINATED, exception="abandoned"))

    def fail_queued(self, function: Function, result: api_pb2.GenericResult) -> None:
        """End all inputs that wait for a function which cannot start."""
        while function.queue:
            self._finish(function.queue.popleft(), result)

    def _queue(self, item: Input, in_front: bool = False) -> None:
        queue = item.call.function.queue
        (queue.appendleft if in_front else queue.append)(item)
        self.on_queued(item.call.function)
        self._changes.notify()

    def _finish(
        self,
        item: Input,
        result: api_pb2.GenericResult,
        data_format: "api_pb2.DataFormat.ValueType" = api_pb2.DATA_FORMAT_UNSPECIFIED,
        task_id: str = "",
    ) -> None:
        item.container = None
        item.output = api_pb2.FunctionGetOutputsItem(
            result=result, idx=item.idx, input_id=item.input_id, data_format=data_format, task_id=task_id
        )
        item.call.outputs.append(item)
        self._changes.notify()

    # Callers

    async def FunctionMap(self, request: api_pb2.FunctionMapRequest) -> api_pb2.FunctionMapResponse:
        call = self.open(self._function(request.function_id), request.function_call_invocation_type)
        return api_pb2.FunctionMapResponse(
            function_call_id=call.call_id,
            function_call_jwt=call.call_id,
            pipelined_inputs=self._put_inputs(call, request.pipelined_inputs),
            retry_policy=call.function.proto.retry_policy,
            max_inputs_outstanding=1000,
        )

    async def FunctionPutInputs(self, request: api_pb2.FunctionPutInputsRequest) -> api_pb2.FunctionPutInputsResponse:
        return api_pb2.FunctionPutInputsResponse(
            inputs=self._put_inputs(self._call(request.function_call_id), request.inputs)
        )

    async def FunctionFinishInputs(self, request: api_pb2.FunctionFinishInputsRequest) -> None: ...

    async def FunctionGetOutputs(
        self, request: api_pb2.FunctionGetOutputsRequest
    ) -> api_pb2.FunctionGetOutputsResponse:
        """Wait for outputs: after an entry, in the order of their ends; or of a range of inputs."""
        call = self._call(request.function_call_id)
        after = int(request.last_entry_id.partition("-")[0] or 0)
        wanted = range(request.start_idx, request.end_idx + 1) if request.HasField("start_idx") else None

        def find() -> list[Input]:
            return [item for item in call.outputs[after:] if wanted is None or item.idx in wanted]

        found = await self._changes.until(find, request.timeout)
        return api_pb2.FunctionGetOutputsResponse(
            idxs=[item.idx for item in found],
            outputs=[item.output for item in found],
            last_entry_id=f"{len(call.outputs)}-0",
            num_unfinished_inputs=len(call.inputs) - len(call.outputs),
        )

    async def FunctionCallFromId(
        self, request: api_pb2.FunctionCallFromIdRequest
    ) -> api_pb2.FunctionCallFromIdResponse:
        call = self._call(request.function_call_id)
        ids = {"app_id": call.function.app.app_id, "function_id": call.function.function_id}
        return api_pb2.FunctionCallFromIdResponse(
            function_call_id=call.call_id,
            num_inputs=len(call.inputs),
            metadata=api_pb2.FunctionCallHandleMetadata(**ids),
        )

    async def FunctionCallCancel(self, request: api_pb2.FunctionCallCancelRequest) -> None:
        """End what is queued, and tell the containers of what runs, or end them."""
        call = self._call(request.function_call_id)
        for item in call.inputs:
            if item in call.function.queue:
                call.function.queue.remove(item)
                self._finish(item, Result(status=Result.GENERIC_STATUS_TERMINATED, exception="cancelled"))
            elif container := item.container:
                if request.terminate_containers:
                    del container.running[item.input_id]
                    self._finish(item, Result(status=Result.GENERIC_STATUS_TERMINATED, exception="cancelled"))
                    container.send_kill()
                else:
                    container.cancelled.append(item.input_id)
        self._changes.notify()

    async def FunctionGetCurrentStats(self, request: api_pb2.FunctionGetCurrentStatsRequest) -> api_pb2.FunctionStats:
        function = self._function(request.function_id)
        return api_pb2.FunctionStats(
            backlog=len(function.queue),
            num_total_tasks=len(function.containers),
            num_running_inputs=sum(len(container.running) for container in function.containers),
        )

    async def FunctionUpdateSchedulingParams(
        self, request: api_pb2.FunctionUpdateSchedulingParamsRequest
    ) -> api_pb2.FunctionUpdateSchedulingParamsResponse:
        settings = self._function(request.function_id).proto.autoscaler_settings
        settings.MergeFrom(request.settings)
        return api_pb2.FunctionUpdateSchedulingParamsResponse(current_settings=settings)

    # Data between: of a web request and its answer, and of generators

    async def FunctionCallGetDataIn(
        self, request: api_pb2.FunctionCallGetDataRequest
    ) -> AsyncIterator[api_pb2.DataChunk]:
        async for chunk in self.follow(self._call(request.function_call_id).data_in, request.last_index):
            yield chunk

    async def FunctionCallGetDataOut(
        self, request: api_pb2.FunctionCallGetDataRequest
    ) -> AsyncIterator[api_pb2.DataChunk]:
        async for chunk in self.follow(self._call(request.function_call_id).data_out, request.last_index):
            yield chunk

    async def FunctionCallPutDataOut(self, request: api_pb2.FunctionCallPutDataRequest) -> None:
        call = self._call(request.function_call_id)
        last = len(call.data_out)
        call.data_out.extend(chunk for chunk in request.data_chunks if chunk.index > last)
        self._changes.notify()

    def put_data_in(self, call: Call, data: bytes) -> None:
        chunk = api_pb2.DataChunk(data_format=api_pb2.DATA_FORMAT_ASGI, data=data, index=len(call.data_in) + 1)
        call.data_in.append(chunk)
        self._changes.notify()

    async def follow(self, chunks: list[api_pb2.DataChunk], last_index: int = 0) -> AsyncIterator[api_pb2.DataChunk]:
        """The chunks after an index and those to come; indices count from 1. It ends with its reader."""
        while True:
            await self._changes.until(lambda last=last_index: len(chunks) > last)
            yield chunks[last_index]
            last_index += 1

    def _put_inputs(
        self, call: Call, items: "list[api_pb2.FunctionPutInputsItem]"
    ) -> list[api_pb2.FunctionPutInputsResponseItem]:
        added = [self.add(call, item.idx, item.input) for item in items]
        return [
            api_pb2.FunctionPutInputsResponseItem(idx=item.idx, input_id=item.input_id, input_jwt=item.input_id)
            for item in added
        ]

    def _call(self, call_id: str) -> Call:
        if call_id not in self.calls:
            refuse(Status.NOT_FOUND, f"no function call {call_id}")
        return self.calls[call_id]

    def _function(self, function_id: str) -> Function:
        if function_id not in self._functions:
            refuse(Status.NOT_FOUND, f"no function {function_id}")
        return self._functions[function_id]
