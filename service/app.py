"""The service as one ASGI application (https://asgi.readthedocs.io): it owns no socket and no process.

A prediction is a `PredictRequest`, which our own HTTP protocol drives without ASGI, and a coroutine here drives from
ASGI messages for every other server. Everything else is Starlette's. Every response carries an `X-Request-ID`, and
every failure the body `{"error": sentence}`.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.utils import formatdate

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api import responses
from service.api.access import HIDDEN_PROBLEM, check_admin, check_key, check_path, hide_reason, is_known
from service.api.headers import PredictRoute, RequestHeaders, build_response_fields, match_route, read_headers
from service.api.operations import build_routes
from service.api.page import build_page, is_open
from service.api.v2.operations import build_protocol_routes
from service.errors import (
    ClientClosedError,
    DeadlineExceededError,
    RequestError,
    ServiceError,
    TooLargeError,
)
from service.model.memory import KeptMemory
from service.model.remote import Engines
from service.registry.coordination import Coordination, SingleProcess, WorkerStatus
from service.registry.reconciler import Reconciler
from service.registry.registry import Registry, check_settings
from service.request import PredictRequest, RequestContext
from service.settings import Settings
from service.telemetry import metrics
from service.telemetry.log import AccessLog
from service.telemetry.recorder import Answered, Recorder
from service.telemetry.tracing import open_tracer

MAX_OPERATION_BYTES = 2**16  # of a body for anything but a prediction; it is read on the event loop


class Application:
    """The ASGI callable that `create_app` returns."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        reconciler: Reconciler,
        engines: Engines | None = None,
        token: bytes = b"",
    ) -> None:
        self.settings = settings
        self.registry = registry
        self.recorder = Recorder(AccessLog(settings.log_format, settings.access_log), open_tracer())
        self.context = RequestContext(settings, registry, self.recorder)
        self.arrival = asyncio.Event()  # set when a connection has come
        self.draining = False  # set by the host when it has been told to stop
        self.date = _build_date()
        self._memory = KeptMemory()
        self._reconciler = reconciler
        self._engines = engines
        self._token = token
        self._keys = [*self.context.keys, token] if token and self.context.keys else self.context.keys
        self._operations = self._build_starlette()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI connection."""
        if scope["type"] != "http":
            await self._operations(scope, receive, send)
            return
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        headers = read_headers(scope["headers"])
        route = match_route(path, scope.get("query_string", b""))
        if route is None:
            await self._operate(path, headers, scope, receive, send)
        else:
            await self._predict(scope["method"], route, headers, receive, send)

    @property
    def problem(self) -> str:
        """Why the service is not ready, or the empty string when every model that should be served is."""
        return "the service is shutting down" if self.draining else self.registry.problem

    def tick(self) -> None:
        """Write what was recorded, the gauges and the time; the host calls this a few times a second."""
        self.date = _build_date()
        self.recorder.flush()
        metrics.set_in_flight(self.context.in_flight)
        self.registry.write_metrics()
        if not self.context.in_flight:  # it takes a few milliseconds for each 100 MB
            self._memory.trim()

    def find_stuck(self) -> str:
        """Return the name of a model whose backend call does not end, or nothing."""
        return self.registry.find_stuck(self.settings.stuck_seconds)

    async def _predict(
        self, method: str, route: PredictRoute, headers: RequestHeaders, receive: Receive, send: Send
    ) -> None:
        """Drive a `PredictRequest` from ASGI messages."""
        responded: asyncio.Future[responses.Response] = asyncio.get_running_loop().create_future()
        request = PredictRequest(self.context, responded.set_result)
        request.start(method, route, headers)
        feeding = asyncio.create_task(_feed(request, receive))
        try:
            await asyncio.wait((responded, feeding), return_when=asyncio.FIRST_COMPLETED)
        finally:
            feeding.cancel()
            request.cancel(ClientClosedError("the server gave the request up"))
        if responded.done():
            await _send_response(send, responded.result())

    async def _operate(self, path: str, headers: RequestHeaders, scope: Scope, receive: Receive, send: Send) -> None:
        """Run Starlette within limits, and record what it answers."""
        began, held, web = time.perf_counter(), 0, self.context.web
        self.tick()  # so that metrics and statistics are up to date

        async def receive_within_limits() -> Message:
            nonlocal held
            message = await receive()
            size = held + len(message.get("body", b""))
            if size > MAX_OPERATION_BYTES:
                raise TooLargeError(f"the body is over the limit of {MAX_OPERATION_BYTES} bytes")
            held = self.context.reserve(held, size)
            return message

        state = scope["state"] = scope.get("state", {}) | {
            "headers": headers,
            "is_known": is_known(headers.key, self._keys),
        }

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = web.build_fields(scope["method"], headers.origin)
                own = responses.split_fields(build_response_fields(headers.request_id, headers.trace) + more)
                message["headers"] = [*message["headers"], *own]
                if path != "/metrics" and not is_open(path):
                    seconds, status = time.perf_counter() - began, message["status"]
                    answered = Answered(
                        scope["method"], path, headers.request_id, status, seconds, error=state.get("error", "")
                    )
                    self.recorder.answered.append(answered)
            await send(message)

        try:
            web.check(scope["method"], headers)
            if web.is_preflight(scope["method"], headers.origin):
                await _send_response(send_with_id, responses.Response(200, b"", b""))
                return
            check_path(scope.get("raw_path") or b"")
            if not is_open(path):
                check_key(headers.key, self._keys)
            await self._operations(scope, receive_within_limits, send_with_id)
        except RequestError as error:
            state["error"] = str(error)
            await _send_response(send_with_id, responses.build_error_response(error))
        except Exception:
            if "error" not in state:  # else it has been answered and logged, and Starlette raises it for servers to log
                raise
        finally:
            self.context.reserve(held, 0)

    def _build_starlette(self) -> ASGIApp:
        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            tasks = [asyncio.create_task(self._reconciler.run())]
            engines = list(self._engines.by_name.values()) if self._engines else []
            tasks += [asyncio.create_task(engine.run()) for engine in engines]
            for engine in engines:
                await engine.wait_until_connected()
            yield
            if self._engines:
                self._engines.ending.set()
            for task in tasks:
                task.cancel()
            await asyncio.get_running_loop().run_in_executor(None, self.recorder.close)

        async def answer_error(request: Request, error: Exception) -> Response:
            if isinstance(error, HTTPException):
                error = responses.explain(request.method, request.url.path, error)
            elif isinstance(error, ServiceError) and not request.state.is_known:
                error = hide_reason(error)
            found = responses.as_service_error(error, request.state.headers.request_id)
            request.state.error = str(found)
            extra = {name.decode(): value.decode() for name, value in responses.error_headers(found)}
            return Response(responses.encode_error(found), found.status, extra, "application/json")

        admin_key = self.settings.admin_key.strip().encode()

        def check_may_change(request: Request) -> None:
            check_admin(request.state.headers.key, admin_key, self._token)

        def explain_problem(request: Request) -> str:
            return self.problem and (self.problem if request.state.is_known else HIDDEN_PROBLEM)

        handlers = {ServiceError: answer_error, HTTPException: answer_error, Exception: answer_error}
        routes = [
            *build_page(self.registry, self.settings.models_dir),
            *build_routes(self.registry, self.settings, explain_problem),
            *build_protocol_routes(self._reconciler, check_may_change, self.settings.max_batch_size, explain_problem),
        ]
        app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
        app.router.redirect_slashes = False  # it would send callers to whatever host they named
        return app


def _build_date() -> bytes:
    """Return the header line with the time, which an origin server has to send (RFC 9110, section 6.6.1)."""
    return f"date: {formatdate(usegmt=True)}\r\n".encode()


async def _feed(request: PredictRequest, receive: Receive) -> None:
    """Give a request its body, and end when its client has gone or it is answered."""
    more = True
    try:
        async with asyncio.timeout_at(request.deadline):
            while more and not request.answered:
                message = await receive()
                if message["type"] == "http.disconnect":
                    request.cancel(ClientClosedError("the client closed the connection before its answer"))
                    return
                request.feed(message.get("body", b""))
                more = message.get("more_body", False)
    except TimeoutError:
        request.cancel(DeadlineExceededError("the body did not arrive by the request's deadline"))
        return
    request.finish()
    while not request.answered:
        if (await receive())["type"] == "http.disconnect":
            request.cancel(ClientClosedError("the client closed the connection before its answer"))


async def _send_response(send: Send, response: responses.Response) -> None:
    """Send a whole response."""
    fields = [*responses.split_fields(response.fields), (b"content-length", b"%d" % len(response.body))]
    await send({"type": "http.response.start", "status": int(response.status), "headers": fields})
    await send({"type": "http.response.body", "body": response.body})


def create_app(
    settings: Settings,
    threads: int = 1,
    preferred_device: str = "cuda:0",
    coordination: Coordination | None = None,
    engines: Engines | None = None,
    token: str = "",
) -> Application:
    """Load the models and return the application that serves them.

    Args:
        settings: how to run.
        threads: CPU threads that one backend call may use.
        preferred_device: the accelerator that "auto" takes where there are several.
        coordination: with the other workers of this host.
        engines: where models are checked first, and where heavy ones run; without, all of that happens in this process.
        token: by which the command line may change what is served, where no admin key is set.

    Raises:
        StartError: the models folder, the backend or the device asked for is not there.
    """
    check_settings(settings)
    coordination = coordination or SingleProcess()
    coordination.report(WorkerStatus())  # from now on, the other workers wait for this one
    state = coordination.read_state()
    registry = Registry(settings, threads, preferred_device, engines)
    registry.load(state.unloaded)
    reconciler = Reconciler(registry, settings, coordination, state.generation)
    return Application(settings, registry, reconciler, engines, token.encode())
