"""One prediction, from the head of its request to its response, whoever brings it.

admit → reserve → decode → submit → encode → record. A `PredictRequest` knows no transport: the HTTP protocol drives it
from its parser's callbacks, and `service.app` from ASGI messages. It is the waiter of its model's batcher, and it
responds exactly once.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

from service.api.access import WebRules, check_key, read_keys
from service.api.content_coding import COMPRESS_FROM, compress, inflate
from service.api.headers import (
    JSON_TYPES,
    PredictRoute,
    RequestHeaders,
    build_response_fields,
    check_call,
    check_media,
)
from service.api.limits import ReadLimits
from service.api.responses import Response, as_service_error, build_error_response
from service.api.v1 import decode as v1_decode
from service.api.v1 import encode as v1_encode
from service.api.v1 import tfserving_url
from service.api.v2 import decode as v2_decode
from service.api.v2 import encode as v2_encode
from service.errors import ClientClosedError, DeadlineExceededError, ServiceError, TooLargeError, UnavailableError
from service.model.backends import Array
from service.model.manifest import AnyManifest
from service.registry.registry import Registry
from service.registry.versions import LoadedVersion
from service.settings import Settings
from service.telemetry.recorder import BATCH, Answered, Recorder

READERS = 2  # threads of a worker that decode heavy bodies and encode large outputs, however many cores there are
LARGE_OUTPUTS = 2**16  # bytes; to write them would hold the event loop for some milliseconds
MAX_HELD_BYTES = 256 * 2**20  # of bodies and inputs that are not answered yet, and of answers that are not sent
_DECODERS: dict[str, Any] = {"v1": v1_decode, "v2": v2_decode, "tfserving": tfserving_url}
_ENCODERS: dict[str, Any] = {"v1": v1_encode, "v2": v2_encode, "tfserving": tfserving_url}


def add_api(name: str, codec: Any) -> None:  # noqa: ANN401 - a module
    """Add an API that paths may name, whose `is_heavy`, `decode` and `encode` are used as those of v2 are."""
    _DECODERS[name] = _ENCODERS[name] = codec


class RequestContext:
    """What all requests of a worker share: settings, registry, keys, the memory budget, threads and the recorder."""

    def __init__(self, settings: Settings, registry: Registry, recorder: Recorder) -> None:
        self.settings = settings
        self.registry = registry
        self.recorder = recorder
        self.keys = read_keys(settings)
        self.web = WebRules(settings)
        self.in_flight = 0
        self.limits = ReadLimits(settings.queue_size)
        self._held_bytes = 0
        self._max_held_bytes = max(MAX_HELD_BYTES, 2 * settings.max_request_bytes)
        self._readers = ThreadPoolExecutor(READERS, "read")

    @property
    def is_pressed(self) -> bool:
        """Whether more than half of what the worker may hold is held."""
        return 2 * self._held_bytes > self._max_held_bytes

    def reserve(self, held: int, size: int) -> int:
        """Let a request hold `size` bytes instead of `held`, and return `size`.

        Raises:
            UnavailableError: the worker would hold too much.
        """
        if size > held and self._held_bytes + size - held > self._max_held_bytes:
            raise UnavailableError("too many large requests and answers are held; try again in a moment")
        self._held_bytes += size - held
        return size

    def hold(self, held: int, size: int) -> int:
        """Do what `reserve` does for bytes that are there already, such as an answer that its client does not read."""
        self._held_bytes += size - held
        return size

    async def run(self, deadline: float, function: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401
        """Run in a thread what would hold the event loop; what has not begun by the deadline never does.

        Raises:
            DeadlineExceededError: it was not done by `deadline`, on the event loop's clock.
        """
        try:
            async with asyncio.timeout_at(deadline):
                return await asyncio.get_running_loop().run_in_executor(self._readers, function, *arguments)
        except TimeoutError:
            raise DeadlineExceededError("no answer was ready by the request's deadline") from None


class PredictRequest:
    """One prediction in flight.

    Args:
        context: what it shares with other requests.
        respond: is given the response, once; never after `cancel` with a `ClientClosedError`.
    """

    __slots__ = (
        "_began", "_body", "_call", "_context", "_held", "_parts", "_respond", "_task", "_version", "answered",
        "deadline", "headers", "method", "request_id", "route",
    )  # fmt: skip

    def __init__(self, context: RequestContext, respond: Callable[[Response], None]) -> None:
        self._context = context
        self._respond = respond
        self._body = b""
        self._parts: BytesIO | None = None
        self._held = 0
        self._version: LoadedVersion | None = None
        self._call: Any = None
        self._task: asyncio.Task[None] | None = None
        self.answered = False  # or given up: nobody waits any more

    def start(self, method: str, route: PredictRoute, headers: RequestHeaders, request_id: bytes = b"") -> None:
        """Admit the request by its head; one that is refused gets its response here.

        Args:
            method: of HTTP.
            route: what its path names.
            headers: what was read of its header fields.
            request_id: its own, if the headers were read for an earlier request that had the same.
        """
        context = self._context
        self.method, self.route, self.headers = method, route, headers
        self.request_id = request_id or headers.request_id
        timeout = context.settings.request_timeout
        self._began = time.perf_counter()
        self.deadline = asyncio.get_running_loop().time() + (
            headers.choose_timeout(timeout) if headers.timeout else timeout
        )
        context.in_flight += 1
        web = context.web
        try:
            if headers.origin or (web.hosts and headers.host not in web.hosts):
                web.check(method, headers)
                if web.is_preflight(method, headers.origin):
                    self._finish(encoded=(b"", b""))
                    return
            if context.keys:
                check_key(headers.key, context.keys)
            if method != "POST" or headers.timeout:
                check_call(method, headers)
            registry = context.registry
            self._version = version = registry.routes.get(route.key) or registry.get(*route.key)
            if headers.content_type not in JSON_TYPES or headers.content_encoding:
                check_media(route.api, headers, version.manifest)
        except Exception as error:
            self.set_exception(error)
        else:
            if headers.content_length > context.settings.max_request_bytes:
                self._refuse_body()

    def feed(self, chunk: bytes) -> None:
        """Take a part of the body, as long as it is within its limit and the worker's memory budget."""
        if self.answered:
            return
        if self._parts is not None:
            self._parts.write(chunk)
        elif not self._body:
            self._body = chunk
        else:  # a body in many parts is kept as one, for each object costs more than a short part
            self._parts = BytesIO()
            self._parts.write(self._body)
            self._parts.write(chunk)
        size = len(self._body) if self._parts is None else self._parts.tell()
        if size > self._context.settings.max_request_bytes:
            self._refuse_body()
            return
        try:
            self._held = self._context.reserve(self._held, size)
        except UnavailableError as error:
            self.set_exception(error, closes=True)

    def finish(self, chunk: bytes = b"") -> None:
        """Take the last part of the body; decode the whole and put it into its model's queue."""
        if chunk:
            self.feed(chunk)
        if self.answered:
            return
        body = self._body if self._parts is None else self._parts.getvalue()  # neither copies
        self._body, self._parts = b"", None
        version, decoder = self._version, _DECODERS[self.route.api]
        assert version is not None
        if self.headers.content_encoding or self.route.action == "preview" or decoder.is_heavy(body, self.headers):
            self._task = asyncio.get_running_loop().create_task(self._finish_in_thread(body, version))
            return
        try:
            self._call = call = decoder.decode(body, version.predictor.manifest, self.headers, self._context.limits)
            if call.timeout is not None:
                self._shorten_deadline(call.timeout)
            version.batcher.submit(call.inputs, self.deadline, self)
        except Exception as error:
            self.set_exception(error)

    async def _finish_in_thread(self, body: bytes, version: LoadedVersion) -> None:
        """Finish a request whose body takes so long to decode that it would hold up the event loop."""
        context, manifest = self._context, version.predictor.manifest
        try:
            call = await context.run(self.deadline, self._decode, body, manifest)
            if self.answered:
                return
            self._call = call
            self._held = context.reserve(self._held, max(self._held, call.inputs.nbytes))
            if self.route.action == "preview":
                encoded = await context.run(self.deadline, self._preview, call.inputs, manifest)
                if not self.answered:
                    self._finish(encoded=encoded)
                return
            if call.timeout is not None:
                self._shorten_deadline(call.timeout)
            version.batcher.submit(call.inputs, self.deadline, self)
        except Exception as error:
            self.set_exception(error)

    def _decode(self, body: bytes, manifest: AnyManifest) -> Any:  # noqa: ANN401 - each API has its own call
        limits = self._context.limits._replace(check=self._check_waiting)
        if self.headers.content_encoding:
            body = inflate(body, self._context.settings.max_request_bytes, limits.check)
        return _DECODERS[self.route.api].decode(body, manifest, self.headers, limits)

    def _check_waiting(self) -> None:
        """Raise in a thread whose request is answered: it was too late, or its client has gone."""
        if self.answered:
            raise ClientClosedError("nobody waits for this request any more")

    def _shorten_deadline(self, seconds: float) -> None:
        self.deadline = min(self.deadline, asyncio.get_running_loop().time() + seconds)

    def _preview(self, inputs: Array, manifest: AnyManifest) -> tuple[bytes, bytes]:
        """Return header lines and body with the instances as the graph would be given them."""
        self._context.limits.check_rows(len(inputs))
        return compress(*v1_encode.encode_preview(inputs, manifest), self.headers.accept_encoding)

    def set_result(self, outputs: Array) -> None:
        """Respond 200 with what the graph gave for this request's inputs; the batcher calls this."""
        if self.answered:
            return
        if outputs.nbytes > LARGE_OUTPUTS:
            self._task = asyncio.get_running_loop().create_task(self._encode_in_thread(outputs))
        else:
            self._finish(outputs)

    async def _encode_in_thread(self, outputs: Array) -> None:
        """Respond with outputs that take so long to write that it would hold up the event loop."""
        context = self._context
        try:
            self._held = context.reserve(self._held, self._held + outputs.nbytes)
            encoded = await context.run(self.deadline, self._encode, outputs, self._version, self._call)
        except Exception as error:
            self.set_exception(error)
        else:
            if not self.answered:
                self._finish(encoded=encoded)

    def _encode(self, outputs: Array, version: LoadedVersion, call: Any) -> tuple[bytes, bytes]:  # noqa: ANN401
        fields, body = _ENCODERS[self.route.api].encode(outputs, version.predictor.manifest, call)
        return (fields, body) if len(body) < COMPRESS_FROM else compress(fields, body, self.headers.accept_encoding)

    def set_exception(self, error: BaseException, closes: bool = False) -> None:
        """Respond with the status and the sentence of a failure.

        Args:
            error: what failed.
            closes: whether the rest of the request is not worth reading.
        """
        if not self.answered:
            self._finish(error=error, closes=closes)

    def cancel(self, error: ServiceError) -> None:
        """Give the request up before its answer: respond with `error`, or with nothing once the client has gone."""
        if isinstance(error, ClientClosedError):
            self._respond = _drop
        self.set_exception(error, closes=True)

    def _refuse_body(self) -> None:
        limit = self._context.settings.max_request_bytes
        self.set_exception(TooLargeError(f"the body is over the limit of {limit} bytes"), closes=True)

    def _finish(
        self,
        outputs: Array | None = None,
        encoded: tuple[bytes, bytes] | None = None,
        error: BaseException | None = None,
        closes: bool = False,
    ) -> None:
        """Build the response from outputs, encoded ones, or an error; record the request, and respond."""
        self.answered = True
        context, headers, version, call = self._context, self.headers, self._version, self._call
        context.in_flight -= 1
        if self._held:
            self._held = context.hold(self._held, 0)
        own = b"x-request-id: %b\r\n" % self.request_id
        if headers.trace:
            own = build_response_fields(self.request_id, headers.trace)
        if outputs is not None:
            assert version is not None
            try:
                encoded = self._encode(outputs, version, call)
            except Exception as failure:  # nothing may reach the batcher, which has other requests to answer
                error = failure
        if headers.origin:
            own += context.web.build_fields(self.method, headers.origin)
        message = ""
        if encoded is not None:
            response = Response(200, encoded[0] + own, encoded[1])
        else:
            found = as_service_error(error, self.request_id)
            response, message = build_error_response(found, own, closes), str(found)
        context.recorder.answered.append(
            Answered(
                self.method,
                self.route.path,
                self.request_id,
                response.status,
                time.perf_counter() - self._began,
                self.route.action != "preview" and self.method != "OPTIONS",
                len(call.inputs) if call is not None else 0,
                version.metrics if version is not None else None,
                message,
                headers.trace,
            )
        )
        # An idle connection must not keep a version that has been replaced, nor a body.
        self._version = self._call = None
        self._body, self._parts = b"", None
        self._respond(response)
        if len(context.recorder.answered) >= BATCH:
            context.recorder.write()


def _drop(response: Response) -> None:
    """Stand for a client that has gone."""
