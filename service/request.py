"""One prediction, from the head of its request to its response, whoever brings it.

admit → reserve → decode → submit → encode → record. A `PredictRequest` knows no transport: the HTTP protocol drives it
from its parser's callbacks, and `service.app` from ASGI messages. It is the waiter of its model's batcher, and it
responds exactly once.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from service.api.access import check_key, read_keys
from service.api.content_coding import COMPRESS_FROM, compress, inflate
from service.api.headers import JSON_TYPES, NO_CODING, PredictRoute, RequestHeaders, check_call, check_media
from service.api.responses import Response, as_service_error, build_error_response
from service.api.v1 import decode as v1_decode
from service.api.v1 import encode as v1_encode
from service.api.v2 import decode as v2_decode
from service.api.v2 import encode as v2_encode
from service.errors import ClientClosedError, DeadlineExceededError, ServiceError, TooLargeError, UnavailableError
from service.model.backends import Array
from service.model.manifest import AnyManifest
from service.registry.registry import Registry
from service.registry.versions import LoadedVersion
from service.settings import Settings
from service.telemetry.recorder import BATCH, Answered, Recorder

READERS = 2  # threads of a worker that decode heavy bodies, however many cores the machine has
MAX_HELD_BYTES = 256 * 2**20  # of bodies and inputs that one worker has not answered yet
_DECODERS: dict[str, Any] = {"v1": v1_decode, "v2": v2_decode}
_ENCODERS: dict[str, Any] = {"v1": v1_encode, "v2": v2_encode}


class RequestContext:
    """What all requests of a worker share: settings, registry, keys, the memory budget, threads and the recorder."""

    def __init__(self, settings: Settings, registry: Registry, recorder: Recorder) -> None:
        self.settings = settings
        self.registry = registry
        self.recorder = recorder
        self.keys = read_keys(settings)
        self.in_flight = 0
        self._held_bytes = 0
        self._max_held_bytes = max(MAX_HELD_BYTES, 2 * settings.max_request_bytes)
        self._readers = ThreadPoolExecutor(READERS, "read")

    def reserve(self, held: int, size: int) -> int:
        """Let a request hold `size` bytes instead of `held`, and return `size`.

        Raises:
            UnavailableError: the worker would hold too much.
        """
        if size > held and self._held_bytes + size - held > self._max_held_bytes:
            raise UnavailableError("too many large requests are being read; try again in a moment")
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
            raise DeadlineExceededError("the body could not be read by the request's deadline") from None


class PredictRequest:
    """One prediction in flight.

    Args:
        context: what it shares with other requests.
        respond: is given the response, once; never after `cancel` with a `ClientClosedError`.
    """

    __slots__ = (
        "_began", "_body", "_call", "_context", "_held", "_respond", "_size", "_task", "_version", "answered",
        "deadline", "headers", "method", "route",
    )  # fmt: skip

    def __init__(self, context: RequestContext, respond: Callable[[Response], None]) -> None:
        self._context = context
        self._respond = respond
        self._body: list[bytes] = []
        self._size = self._held = 0
        self._version: LoadedVersion | None = None
        self._call: Any = None
        self._task: asyncio.Task[None] | None = None
        self.answered = False  # or given up: nobody waits any more

    def start(self, method: str, route: PredictRoute, headers: RequestHeaders) -> None:
        """Admit the request by its head; one that is refused gets its response here."""
        context = self._context
        self.method, self.route, self.headers = method, route, headers
        timeout = context.settings.request_timeout
        self._began = time.perf_counter()
        self.deadline = asyncio.get_running_loop().time() + (
            headers.choose_timeout(timeout) if headers.timeout else timeout
        )
        context.in_flight += 1
        try:
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
        self._body.append(chunk)
        self._size += len(chunk)
        if self._size > self._context.settings.max_request_bytes:
            self._refuse_body()
            return
        try:
            self._held = self._context.reserve(self._held, self._size)
        except UnavailableError as error:
            self.set_exception(error, closes=True)

    def finish(self, chunk: bytes = b"") -> None:
        """Take the last part of the body; decode the whole and put it into its model's queue."""
        if chunk:
            self.feed(chunk)
        if self.answered:
            return
        parts, self._body = self._body, []
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        version, decoder = self._version, _DECODERS[self.route.api]
        assert version is not None
        manifest = version.predictor.manifest
        is_heavy = self.headers.content_encoding not in NO_CODING or decoder.is_heavy(body, self.headers)
        if is_heavy or self.route.action == "preview":
            self._task = asyncio.get_running_loop().create_task(self._finish_in_thread(body, version))
            return
        try:
            self._call = call = decoder.decode(body, manifest, self.headers)
            if call.timeout is not None:
                self._shorten_deadline(call.timeout)
            version.batcher.submit(call.inputs, self.deadline, self)
        except Exception as error:
            self.set_exception(error)

    async def _finish_in_thread(self, body: bytes, version: LoadedVersion) -> None:
        """Finish a request whose body takes so long to decode that it would hold up the event loop."""
        try:
            call = await self._context.run(self.deadline, self._decode, body, version.manifest)
            if self.answered:
                return
            self._call = call
            self._held = self._context.reserve(self._held, max(self._held, call.inputs.nbytes))
            if self.route.action == "preview":
                await self._preview(call, version)
                return
            if call.timeout is not None:
                self._shorten_deadline(call.timeout)
            version.batcher.submit(call.inputs, self.deadline, self)
        except Exception as error:
            self.set_exception(error)

    def _decode(self, body: bytes, manifest: AnyManifest) -> Any:  # noqa: ANN401 - each API has its own call
        if self.headers.content_encoding not in NO_CODING:
            body = inflate(body, self._context.settings.max_request_bytes)
        return _DECODERS[self.route.api].decode(body, manifest, self.headers)

    def _shorten_deadline(self, seconds: float) -> None:
        self.deadline = min(self.deadline, asyncio.get_running_loop().time() + seconds)

    async def _preview(self, call: Any, version: LoadedVersion) -> None:  # noqa: ANN401 - each API has its own call
        """Respond with the instances as the graph would be given them."""
        count, limit = len(call.inputs), self._context.settings.queue_size
        if count > limit:
            raise TooLargeError(f"the request has {count} instances; at most {limit} are taken at once")
        fields, body = await self._context.run(self.deadline, v1_encode.encode_preview, call.inputs, version.manifest)
        if not self.answered:
            self._finish(encoded=(fields, body))

    def set_result(self, outputs: Array) -> None:
        """Respond 200 with what the graph gave for this request's inputs; the batcher calls this."""
        if not self.answered:
            self._finish(outputs)

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
        if self.answered:
            return
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
            self._held = context.reserve(self._held, 0)
        own = headers.build_response_fields() if headers.trace else b"x-request-id: %b\r\n" % headers.request_id
        response: Response | None = None
        if error is None:
            try:
                if encoded is None:
                    assert version is not None
                    encoded = _ENCODERS[self.route.api].encode(outputs, version.predictor.manifest, call)
                fields, body = encoded
                if len(body) >= COMPRESS_FROM:
                    fields, body = compress(fields, body, headers.accept_encoding)
                response = Response(200, fields + own, body)
            except Exception as failure:  # nothing may reach the batcher, which has other requests to answer
                error = failure
        message = ""
        if response is None:
            found = as_service_error(error, headers.request_id)
            response, message = build_error_response(found, own, closes), str(found)
        context.recorder.answered.append(
            Answered(
                self.method,
                self.route.path,
                headers.request_id,
                response.status,
                time.perf_counter() - self._began,
                self.route.action != "preview",
                len(call.inputs) if call is not None else 0,
                version.metrics if version is not None else None,
                message,
                headers.trace,
            )
        )
        # An idle connection must not keep a version that has been replaced, nor a body.
        self._version = self._call = None
        self._body = []
        self._respond(response)
        if len(context.recorder.answered) >= BATCH:
            context.recorder.write()


def _drop(response: Response) -> None:
    """Stand for a client that has gone."""
