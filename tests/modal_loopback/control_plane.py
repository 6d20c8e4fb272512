"""The RPCs that define apps and look them up: what `modal deploy`, `modal run` and `modal serve` call."""

import itertools
import time
from collections.abc import AsyncIterator, Callable

from grpclib import Status
from modal_proto import api_pb2

from modal_loopback.limits import check_function
from modal_loopback.records import App, Function, FunctionLayout, function_layout
from modal_loopback.rpc import Changes, refuse
from modal_loopback.storage import BUILDER_VERSION, Storage, volume_metadata


class ControlPlane:
    """Apps, functions and classes.

    url_of: opens a site for a web function's method and returns its URL. on_publish: told of functions that have
    containers of an older definition now. on_stop: told of an app that has ended.
    """

    def __init__(self, storage: Storage, changes: Changes, ids: "itertools.count[int]") -> None:
        self.apps: dict[str, App] = {}
        self.functions: dict[str, Function] = {}
        self.url_of: Callable[[Function, str], str]
        self.on_publish: Callable[[list[Function]], None]
        self.on_stop: Callable[[App], None]
        self.storage = storage
        self._changes = changes
        self._ids = ids

    def app(self, name: str) -> App | None:
        """The app of that name that runs."""
        return next((app for app in reversed(self.apps.values()) if app.name == name and app.state != "stopped"), None)

    async def ClientHello(self, request: object) -> api_pb2.ClientHelloResponse:
        return api_pb2.ClientHelloResponse()

    async def EnvironmentGetOrCreate(
        self, request: api_pb2.EnvironmentGetOrCreateRequest
    ) -> api_pb2.EnvironmentGetOrCreateResponse:
        settings = api_pb2.EnvironmentSettings(image_builder_version=BUILDER_VERSION)
        metadata = api_pb2.EnvironmentMetadata(name="main", settings=settings)
        return api_pb2.EnvironmentGetOrCreateResponse(environment_id="en-main", metadata=metadata)

    # Apps

    async def AppCreate(self, request: api_pb2.AppCreateRequest) -> api_pb2.AppCreateResponse:
        app = App(f"ap-{next(self._ids)}", request.description, tags=dict(request.tags))
        self.apps[app.app_id] = app
        return api_pb2.AppCreateResponse(app_id=app.app_id, app_page_url=f"https://modal.invalid/{app.app_id}")

    async def AppGetByDeploymentName(
        self, request: api_pb2.AppGetByDeploymentNameRequest
    ) -> api_pb2.AppGetByDeploymentNameResponse:
        app = self._deployed(request.name)
        return api_pb2.AppGetByDeploymentNameResponse(app_id=app.app_id if app else "", environment_name="main")

    async def AppGetLayout(self, request: api_pb2.AppGetLayoutRequest) -> api_pb2.AppGetLayoutResponse:
        return api_pb2.AppGetLayoutResponse(app_layout=self.layout_message(self.apps[request.app_id]))

    async def AppHeartbeat(self, request: api_pb2.AppHeartbeatRequest) -> None: ...

    async def AppPublish(self, request: api_pb2.AppPublishRequest) -> api_pb2.AppPublishResponse:
        app = self.apps[request.app_id]
        published = [self.functions[function_id] for function_id in request.function_ids.values()]
        replaced = [function for function in app.functions.values() if function.containers]
        for function in published:
            function.publish()
        app.functions = {function.name: function for function in published}
        app.classes = dict(request.class_ids)
        app.tags = dict(request.tags)
        if request.app_state:
            app.state = api_pb2.AppState.Name(request.app_state).removeprefix("APP_STATE_").lower()
        app.name = request.name or app.name
        app.publications += 1
        deployed_at = time.time()
        self.on_publish(replaced)
        self._changes.notify()
        return api_pb2.AppPublishResponse(url=f"https://modal.invalid/{app.app_id}", deployed_at=deployed_at)

    async def AppClientDisconnect(self, request: api_pb2.AppClientDisconnectRequest) -> None:
        """The client went: what was not deployed, ends."""
        app = self.apps[request.app_id]
        if app.state not in ("deployed", "detached"):
            self._stop(app)

    async def AppStop(self, request: api_pb2.AppStopRequest) -> None:
        self._stop(self.apps[request.app_id])

    async def AppGetLogs(self, request: api_pb2.AppGetLogsRequest) -> AsyncIterator[api_pb2.TaskLogsBatch]:
        app = self.apps[request.app_id]
        sent = int(request.last_entry_id or 0)
        while await self._changes.until(lambda sent=sent: len(app.log) > sent or app.log_ended, request.timeout):
            for task_id, text in app.log[sent:]:
                sent += 1
                item = api_pb2.TaskLogs(data=text, file_descriptor=api_pb2.FILE_DESCRIPTOR_STDOUT)
                yield api_pb2.TaskLogsBatch(task_id=task_id, items=[item], entry_id=str(sent))
            if app.log_ended:
                yield api_pb2.TaskLogsBatch(app_done=True)
                return

    # Functions and classes

    async def FunctionPrecreate(self, request: api_pb2.FunctionPrecreateRequest) -> api_pb2.FunctionPrecreateResponse:
        proto = api_pb2.Function(
            function_name=request.function_name,
            function_type=request.function_type,
            webhook_config=request.webhook_config,
            method_definitions=request.method_definitions,
            function_schema=request.function_schema,
            supported_input_formats=request.supported_input_formats,
            supported_output_formats=request.supported_output_formats,
        )
        function = self._function(request.app_id, request.existing_function_id, proto)
        metadata = self._with_urls(function, proto)
        return api_pb2.FunctionPrecreateResponse(function_id=function.function_id, handle_metadata=metadata)

    async def FunctionCreate(self, request: api_pb2.FunctionCreateRequest) -> api_pb2.FunctionCreateResponse:
        if not request.HasField("function"):
            refuse(Status.UNIMPLEMENTED, "The loopback Modal takes one GPU type of a function, no list.")
        proto = request.function
        check_function(proto)
        function = self._function(request.app_id, request.existing_function_id, proto)
        metadata = self._with_urls(function, proto)
        function.draft = (proto, self._layout(proto))
        data = function_data(proto)
        return api_pb2.FunctionCreateResponse(
            function_id=function.function_id, function=proto, function_data=data, handle_metadata=metadata
        )

    async def ClassCreate(self, request: api_pb2.ClassCreateRequest) -> api_pb2.ClassCreateResponse:
        class_id = request.existing_class_id or f"cs-{next(self._ids)}"
        return api_pb2.ClassCreateResponse(class_id=class_id, handle_metadata=api_pb2.ClassHandleMetadata())

    async def ClassGet(self, request: api_pb2.ClassGetRequest) -> api_pb2.ClassGetResponse:
        app = self._deployed(request.app_name)
        if app is None or request.object_tag not in app.classes:
            refuse(Status.NOT_FOUND, f"no class {request.object_tag} of a deployed app {request.app_name}")
        class_id, metadata = app.classes[request.object_tag], api_pb2.ClassHandleMetadata()
        return api_pb2.ClassGetResponse(class_id=class_id, handle_metadata=metadata)

    async def FunctionGet(self, request: api_pb2.FunctionGetRequest) -> api_pb2.FunctionGetResponse:
        app = self._deployed(request.app_name)
        function = app and app.functions.get(request.object_tag.removesuffix(".*"))
        if not function or function.proto.function_name != request.object_tag:
            refuse(Status.NOT_FOUND, f"no function {request.object_tag} of a deployed app {request.app_name}")
        return api_pb2.FunctionGetResponse(
            function_id=function.function_id,
            handle_metadata=handle_metadata(function, function.proto),
            function=function_data(function.proto),
        )

    async def FunctionGetById(self, request: api_pb2.FunctionGetByIdRequest) -> api_pb2.FunctionGetByIdResponse:
        function = self.functions[request.function_id]
        metadata = handle_metadata(function, function.proto)
        return api_pb2.FunctionGetByIdResponse(function=function_data(function.proto), handle_metadata=metadata)

    def layout_message(self, app: App) -> api_pb2.AppLayout:
        """An app's ids, and handles of all that its functions use: a container looks up what they depend on."""
        layout = api_pb2.AppLayout(class_ids=app.classes)
        for class_id in app.classes.values():
            layout.objects.add(object_id=class_id, class_handle_metadata=api_pb2.ClassHandleMetadata())
        for function in app.functions.values():
            layout.function_ids[function.proto.function_name] = function.function_id
            metadata = handle_metadata(function, function.proto)
            layout.objects.add(object_id=function.function_id, function_handle_metadata=metadata)
        uses = {dependency.object_id for f in app.functions.values() for dependency in f.proto.object_dependencies}
        for object_id in sorted(uses):
            item = layout.objects.add(object_id=object_id)
            if object_id in self.storage.volumes:
                item.volume_metadata.CopyFrom(volume_metadata(self.storage.volumes[object_id]))
            elif object_id in self.storage.mounts:
                item.mount_handle_metadata.SetInParent()
        return layout

    def _deployed(self, name: str) -> App | None:
        return next((app for app in self.apps.values() if app.name == name and app.state == "deployed"), None)

    def _stop(self, app: App) -> None:
        if app.state != "stopped":
            app.state = "stopped"
            self.on_stop(app)
            self._changes.notify()

    def _function(self, app_id: str, existing_id: str, proto: api_pb2.Function) -> Function:
        if existing_id:
            return self.functions[existing_id]
        name = proto.function_name.removesuffix(".*")
        function = Function(f"fu-{next(self._ids)}", self.apps[app_id], name, proto)
        self.functions[function.function_id] = function
        return function

    def _with_urls(self, function: Function, proto: api_pb2.Function) -> api_pb2.FunctionHandleMetadata:
        """Give each web endpoint its URL, for good, and describe the function."""
        for method, config in [("", proto.webhook_config)] + [
            (name, definition.webhook_config) for name, definition in proto.method_definitions.items()
        ]:
            if config.type and method not in function.web_urls:
                function.web_urls[method] = self.url_of(function, method)
        proto.web_url = function.web_urls.get("", "")
        for name, definition in proto.method_definitions.items():
            definition.web_url = function.web_urls.get(name, "")
        return handle_metadata(function, proto)

    def _layout(self, proto: api_pb2.Function) -> FunctionLayout:
        storage = self.storage
        mounted = {path: data for mount_id in proto.mount_ids for path, data in storage.mounts[mount_id].items()}
        image = storage.images[proto.image_id]
        return function_layout(proto, proto.schedule, image, mounted, storage.volumes, storage.secrets)


def handle_metadata(function: Function, proto: api_pb2.Function) -> api_pb2.FunctionHandleMetadata:
    """What a client needs to call a function, or the methods of a class."""
    metadata = api_pb2.FunctionHandleMetadata(
        function_name=proto.function_name,
        function_type=proto.function_type,
        web_url=proto.web_url,
        definition_id=f"de-{function.function_id}",
        class_parameter_info=proto.class_parameter_info,
        function_schema=proto.function_schema,
        supported_input_formats=proto.supported_input_formats,
        supported_output_formats=proto.supported_output_formats,
        app_id=function.app.app_id,
    )
    for name, method in proto.method_definitions.items():
        metadata.method_handle_metadata[name].CopyFrom(
            api_pb2.FunctionHandleMetadata(
                function_name=method.function_name,
                function_type=method.function_type,
                web_url=method.web_url,
                is_method=True,
                use_method_name=name,
                definition_id=metadata.definition_id,
                function_schema=method.function_schema,
                supported_input_formats=method.supported_input_formats,
                supported_output_formats=method.supported_output_formats,
                app_id=function.app.app_id,
            )
        )
    return metadata


def function_data(proto: api_pb2.Function) -> api_pb2.FunctionData:
    """The same definition in the shape that allows several GPU types; the client reads both."""
    data = api_pb2.FunctionData()
    shared = data.DESCRIPTOR.fields_by_name
    for field, value in proto.ListFields():
        if field.name not in shared:
            continue
        if field.is_repeated or field.message_type is not None:
            getattr(data, field.name).MergeFrom(value)
        else:
            setattr(data, field.name, value)
    data.ranked_functions.add(rank=0, function=proto)
    return data
