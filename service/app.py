"""The service as one ASGI application (https://asgi.readthedocs.io): it owns no socket and no process.

Predictions take a lane of their own, straight from bytes to bytes; everything else goes to Starlette. Both give every
answer an `X-Request-ID` and every failure the body `{"error": sentence}`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api import codecs
from service.api.access import check_key, read_keys
from service.api.asgi import read_body, send_answer, send_error, split_fields, wait_for_result
from service.api.failures import as_service_error, encode_error, error_headers, explain
from service.api.headers import PredictRoute, RequestHeaders, check_call, check_media, match_route, read_headers
from service.api.operations import build_routes
from service.api.page import build_page, is_open
from service.api.v1 import codec as v1_codec
from service.api.v2.operations import build_protocol_routes, check_admin
from service.errors import (
    DeadlineExceededError,
    ServiceError,
    TooLargeError,
    UnauthorizedError,
    UnavailableError,
)
from service.model.backends import Array
from service.model.manifest import AnyManifest
from service.registry.coordination import WorkerStatus, open_coordination
from service.registry.reconciler import Reconciler
from service.registry.registry import Registry, check_settings
from service.registry.versions import LoadedVersion
from service.settings import Settings
from service.telemetry import metrics
from service.telemetry.log import AccessLog
from service.telemetry.tracing import open_tracer

SHORTEST_STUCK = 5.0  # seconds
READERS = 2  # threads of a worker that read heavy bodies, however many cores the machine has
MOST_OPERATION_BYTES = 2**16  # of a body for anything but instances; it is read on the event loop
MOST_HELD_BYTES = 256 * 2**20  # of bodies and inputs that one worker has not answered yet


class Application:
    """The ASGI callable that `create_app` returns; `registry` is what it serves."""

    def __init__(self, settings: Settings, registry: Registry, reconciler: Reconciler) -> None:
        self.settings = settings
        self.registry = registry
        self.access_log = AccessLog(settings.log_format, settings.access_log)
        self.in_flight = 0
        self.held_bytes = 0
        self.readers = ThreadPoolExecutor(READERS, "read")
        self.arrival = asyncio.Event()  # a connection has come
        self._most_held = max(MOST_HELD_BYTES, 2 * settings.max_request_bytes)
        self._keys = read_keys(settings)
        self.reconciler = reconciler
        self._tracer = open_tracer()
        self._admin_key = settings.admin_key.strip().encode()
        self._others = self._build_starlette()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI connection."""
        if scope["type"] != "http":
            await self._others(scope, receive, send)
            return
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        head = read_headers(scope["headers"])
        target = match_route(path)
        if target is None:
            await self._operate(path, head, scope, receive, send)
        else:
            await self._predict(target, scope["method"], head, receive, send)

    def admit(self, target: PredictRoute, method: str, head: RequestHeaders) -> LoadedVersion:
        """Return what a predict request asks for, once its head has been found good.

        Raises:
            ServiceError: of a status from 400 to 415, or 503.
        """
        check_key(head.key, self._keys)
        check_call(method, head)
        served = self.registry.get(target.name, target.version)
        check_media(target, head, served.manifest)
        return served

    def hold(self, held: int, size: int) -> int:
        """Let a request hold `size` bytes instead of `held`, and return that.

        Raises:
            UnavailableError: the worker would hold too much.
        """
        if size > held and self.held_bytes + size - held > self._most_held:
            raise UnavailableError("too many large requests are being read; try again in a moment")
        self.held_bytes += size - held
        return size

    async def _predict(
        self, target: PredictRoute, method: str, head: RequestHeaders, receive: Receive, send: Send
    ) -> None:
        loop = asyncio.get_running_loop()
        began, rows, held, served = time.perf_counter(), 0, 0, None

        def hold(size: int) -> None:
            nonlocal held
            held = self.hold(held, size)

        deadline = loop.time() + head.choose_timeout(self.settings.request_timeout)
        self.in_flight += 1
        try:
            served = self.admit(target, method, head)
            body = await read_body(receive, head, self.settings.max_request_bytes, deadline, hold)
            call = await self._decode(target, body, served.manifest, head, deadline)
            rows = len(call.inputs)
            hold(max(held, call.inputs.nbytes))
            waiter: asyncio.Future[Array] = loop.create_future()
            deadline = min(deadline, loop.time() + call.timeout) if call.timeout else deadline
            served.batcher.submit(call.inputs, deadline, waiter)
            results = await wait_for_result(waiter, receive)
            fields, answer = codecs.encode(target.api, results, served.manifest, call, head)
        except Exception as error:  # whatever happens, the caller gets a sentence and not a stack
            found = as_service_error(error, head.request_id)
            self.note(target, method, head, found.status, rows, began, served, str(found))
            await send_error(send, found, head.echoed)
            return
        finally:
            self.in_flight -= 1
            self.hold(held, 0)
        self.note(target, method, head, 200, rows, began, served)
        await send_answer(send, 200, answer, [*split_fields(fields), *head.echoed])

    async def _decode(
        self, target: PredictRoute, body: bytes, manifest: AnyManifest, head: RequestHeaders, deadline: float
    ) -> Any:  # noqa: ANN401 - each API has its own call
        arguments = target.api, body, manifest, head, self.settings.max_request_bytes
        if not codecs.is_heavy(target.api, body, head):
            return codecs.decode(*arguments)
        return await self.run(deadline, codecs.decode, *arguments)

    async def run(self, deadline: float, function: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401
        """Run in a thread what would hold the event loop; what still waits for one at the deadline is never run."""
        try:
            async with asyncio.timeout_at(deadline):
                return await asyncio.get_running_loop().run_in_executor(self.readers, function, *arguments)
        except TimeoutError:
            raise DeadlineExceededError("the body could not be read by the request's deadline") from None

    def _preview_routes(self) -> list[BaseRoute]:
        paths = ("/v1/models/{name}:preview", "/v1/models/{name}/versions/{version}:preview")
        return [Route(path, self.preview, methods=["GET", "POST"]) for path in paths]

    async def preview(self, request: Request) -> Response:
        """Answer with what a model would be given for a predict body: the instances as numbers, decoded and fitted.

        Raises:
            ServiceError: what the same predict request would be refused for.
        """
        head: RequestHeaders = request.state.head
        target = PredictRoute("v1", request.path_params["name"], request.path_params.get("version"), request.url.path)
        deadline = asyncio.get_running_loop().time() + head.choose_timeout(self.settings.request_timeout)
        served = self.admit(target, request.method, head)
        body = await read_body(request.receive, head, self.settings.max_request_bytes, deadline)
        call = await self._decode(target, body, served.manifest, head, deadline)
        count, most = len(call.inputs), self.settings.queue_size
        if count > most:
            raise TooLargeError(f"the request has {count} instances; at most {most} are taken at once")
        answer = await self.run(deadline, v1_codec.encode_preview, call.inputs, served.manifest)
        return Response(answer, media_type="application/json")

    def note(
        self,
        target: PredictRoute,
        method: str,
        head: RequestHeaders,
        status: int,
        rows: int,
        began: float,
        served: LoadedVersion | None,
        error: str = "",
    ) -> None:
        """Count and log a predict request that has been answered.

        Args:
            target: what was asked for.
            method: of the request.
            head: of the request.
            status: of the answer.
            rows: instances in the request.
            began: when its head was complete, on `time.perf_counter`.
            served: the version that was found, if one was.
            error: the sentence of a failure.
        """
        seconds = time.perf_counter() - began
        if served is not None:
            manifest = served.manifest
            served.metrics.answered(status, seconds)
            model = f"{manifest.name}/{manifest.version}"
        else:
            metrics.record_failure(status)
            model = ""
        self.access_log.note(head.request_id, f"{method} {target.path}", status, rows, seconds, model, error)
        if self._tracer is not None:
            asked = model or "/".join(filter(None, (target.name, target.version)))
            self._tracer.record(head, asked, status, rows, seconds)

    def record_other(self, request_id: bytes, what: str, status: int, seconds: float, error: str = "") -> None:
        """Count and log an answered request that is no predict request; `what` is its method and path."""
        metrics.record_other(status)
        self.access_log.note(request_id, what, status, 0, seconds, error=error)

    def tick(self) -> None:
        """Write what was gathered for the log, and the gauges; the host calls this a few times a second."""
        self.access_log.flush()
        metrics.set_in_flight(self.in_flight)
        self.registry.write_metrics()

    def find_stuck(self) -> str:
        """Return the name of a model with a call that has run for twice the time that any request has, or nothing."""
        return self.registry.find_stuck(max(SHORTEST_STUCK, 2 * self.settings.request_timeout))

    async def _operate(self, path: str, head: RequestHeaders, scope: Scope, receive: Receive, send: Send) -> None:
        began, held, limit = time.perf_counter(), 0, self.settings.max_request_bytes
        if not path.endswith(":preview"):
            limit = min(limit, MOST_OPERATION_BYTES)

        async def receive_within_limits() -> Message:
            nonlocal held
            message = await receive()
            size = held + len(message.get("body", b""))
            if size > limit:
                raise TooLargeError(f"the body is over the limit of {limit} bytes")
            held = self.hold(held, size)
            return message

        state = scope["state"] = scope.get("state", {}) | {"head": head}

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *head.echoed]
                if path != "/metrics" and not is_open(path):
                    what = f"{scope['method']} {path}"
                    seconds = time.perf_counter() - began
                    self.record_other(head.request_id, what, message["status"], seconds, state.get("error", ""))
            await send(message)

        try:
            if not is_open(path):
                check_key(head.key, self._keys)
        except UnauthorizedError as error:
            state["error"] = str(error)
            await send_error(send_with_id, error)
            return
        try:
            await self._others(scope, receive_within_limits, send_with_id)
        except Exception:
            if "error" not in state:  # else Starlette has had it answered and logged, and raises it for servers to log
                raise
        finally:
            self.hold(held, 0)

    def _build_starlette(self) -> ASGIApp:
        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            keeping = asyncio.create_task(self.reconciler.run())
            yield
            keeping.cancel()
            if self._tracer is not None:
                await asyncio.get_running_loop().run_in_executor(None, self._tracer.close)

        async def answer_error(request: Request, error: Exception) -> Response:
            if isinstance(error, HTTPException):
                error = explain(request.method, request.url.path, error)
            found = as_service_error(error, request.state.head.request_id)
            request.state.error = str(found)
            extra = {name.decode(): value.decode() for name, value in error_headers(found)}
            return Response(encode_error(found), found.status, extra, "application/json")

        def check(request: Request) -> None:
            check_admin(request, self._admin_key, request.state.head.key)

        handlers = {ServiceError: answer_error, HTTPException: answer_error, Exception: answer_error}
        routes = [
            *self._preview_routes(),
            *build_page(self.registry, self.settings.models_dir),
            *build_routes(self.registry, self.settings),
            *build_protocol_routes(self.reconciler, check, self.settings.max_batch_size),
        ]
        app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
        app.router.redirect_slashes = False  # it would send callers to whatever host they named
        return app


def create_app(
    settings: Settings, threads: int = 1, preferred_device: str = "cuda:0", shared: Path | None = None
) -> Application:
    """Load the models and return the application that serves them.

    Args:
        settings: how to run.
        threads: CPU threads that one backend call may use.
        preferred_device: the accelerator that "auto" takes where there are several.
        shared: a folder that the workers of one host share, to agree on what is loaded.

    Raises:
        StartError: the models folder, the backend or the device asked for is not there.
    """
    check_settings(settings)
    coordination = open_coordination(shared)
    coordination.report(WorkerStatus())  # from now on, what is agreed on waits for this worker
    state = coordination.read_state()
    registry = Registry(settings, threads, preferred_device)
    registry.load(state.unloaded)
    return Application(settings, registry, Reconciler(registry, settings, coordination, state.generation))
