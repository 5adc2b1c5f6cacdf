"""The calls of GRPCInferenceService: infer and its stream as `PredictRequest`s, everything else as operations."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import orjson

from service.api.access import check_key
from service.api.headers import Headers, PredictRoute, RequestHeaders, read_headers
from service.api.responses import Response, build_error_response
from service.app import Application
from service.errors import ClientClosedError, DeadlineExceededError, RequestError, ServiceError
from service.grpc import messages
from service.grpc.operations import OPERATIONS, Operation, OperationFailedError, operate
from service.request import PredictRequest, add_api

STREAM_REQUESTS = 64  # of one stream that are answered at a time; more are read when the first of them is answered
API = "grpc"
_LONGEST_TIMEOUT = 999_999.0  # seconds that `RequestHeaders.timeout` can say
_METADATA = ("authorization", "x-api-key", "x-request-id", "traceparent")
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}

Context = Any  # grpc.aio.ServicerContext, generic in types that are made at run time


class Servicer:
    """Answers the calls of one worker.

    Args:
        app: answers the same over HTTP.
    """

    def __init__(self, app: Application) -> None:
        self._app = app
        self._reading: set[asyncio.Task[None]] = set()  # of each stream
        self._operating: set[asyncio.Task[Any]] = set()
        add_api(API, messages)

    def build_handler(self) -> grpc.GenericRpcHandler:
        """Return what a server calls; infer requests and their answers stay bytes for `PredictRequest`."""
        handlers = {
            "ModelInfer": grpc.unary_unary_rpc_method_handler(self._infer),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self._infer_stream),
        }
        for name, operation in OPERATIONS.items():
            method = messages.SERVICE.methods_by_name[name]
            handlers[name] = grpc.unary_unary_rpc_method_handler(
                self._build_operation(operation, messages.get_message(method.output_type.name)),
                messages.get_message(method.input_type.name).FromString,
                messages.serialize,
            )
        return grpc.method_handlers_generic_handler(messages.SERVICE.full_name, handlers)

    def end_streams(self) -> None:
        """Read no more requests of any stream; those that have been read are answered first."""
        for reading in self._reading:
            reading.cancel()

    async def _infer(self, body: bytes, context: Context) -> bytes:
        response, request_id = await self._predict(body, context)
        context.set_trailing_metadata((("x-request-id", request_id),))
        if response.status != 200:  # noqa: PLR2004
            await context.abort(_choose_code(response.status), _read_error(response))
        return response.body

    async def _infer_stream(self, bodies: AsyncIterator[bytes], context: Context) -> None:
        """Answer the requests of a stream in order, up to `STREAM_REQUESTS` of them side by side."""
        headers = read_headers(_pick_metadata(context))
        try:
            check_key(headers.key, self._app.context.keys)
        except RequestError as error:
            await context.abort(_choose_code(error.status), str(error))
        waiting: asyncio.Queue[tuple[bytes, asyncio.Task[tuple[Response, str]]] | None] = asyncio.Queue()
        room = asyncio.Semaphore(STREAM_REQUESTS)

        async def read() -> None:
            try:
                while await room.acquire() and (body := await anext(aiter(bodies), None)) is not None:
                    waiting.put_nowait((body, asyncio.create_task(self._predict(body, context))))
            finally:
                waiting.put_nowait(None)

        reading = asyncio.create_task(read())
        self._reading.add(reading)
        task = None
        try:
            while (item := await waiting.get()) is not None:
                body, task = item
                response, _ = await task
                await context.write(_build_stream_response(response, body))
                room.release()
        finally:
            reading.cancel()
            self._reading.discard(reading)
            while not waiting.empty():
                if (item := waiting.get_nowait()) is not None:
                    item[1].cancel()
        if self._app.draining:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the service is shutting down")

    async def _predict(self, body: bytes, context: Context) -> tuple[Response, str]:
        """Return the response to an infer request, and the request's id."""
        headers = _read_request_headers(context, len(body))
        request_id = headers.request_id.decode()
        try:
            name, version = messages.read_model(body)
        except RequestError as error:
            return build_error_response(error), request_id
        answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()

        def respond(response: Response) -> None:
            if not answer.done():  # else the call has been cancelled
                answer.set_result(response)

        request = PredictRequest(self._app.context, respond)
        route = PredictRoute(API, (name, version), "infer", f"/{messages.SERVICE.full_name}/ModelInfer")
        request.start("POST", route, headers)
        request.finish(body)
        try:
            return await answer, request_id
        finally:
            if not request.answered:  # the call has been cancelled, by its client or its deadline
                request.cancel(_explain_end(context))

    def _build_operation(self, operation: Operation, answer_class: Any) -> Callable[[Any, Context], Awaitable[Any]]:  # noqa: ANN401
        async def answer(message: Any, context: Context) -> Any:  # noqa: ANN401 - made at run time
            # In a task of its own, because a change of what is served goes on when its client has gone, as over HTTP.
            task = asyncio.create_task(operate(self._app, operation, message, _pick_metadata(context)))
            self._operating.add(task)
            task.add_done_callback(self._operating.discard)
            try:
                return messages.build_message(answer_class, await asyncio.shield(task))
            except OperationFailedError as error:
                await context.abort(_choose_code(error.status), str(error))
            except RequestError as error:
                await context.abort(_choose_code(error.status), str(error))

        return answer


def _pick_metadata(context: Context) -> Headers:
    """Return the metadata that the service reads, as header fields."""
    return [
        (name.encode(), value if isinstance(value, bytes) else value.encode("utf-8", "replace"))
        for name, value in context.invocation_metadata() or ()
        if name in _METADATA
    ]


def _read_request_headers(context: Context, size: int) -> RequestHeaders:
    """Return what the metadata and the deadline of a call say; `size` is that of its message."""
    headers = read_headers(_pick_metadata(context))
    seconds = context.time_remaining()
    has_deadline = seconds is not None and seconds < _LONGEST_TIMEOUT
    timeout = b"%.6f" % max(seconds, 1e-6) if has_deadline else b""
    return headers._replace(timeout=timeout, content_length=size)


def _explain_end(context: Context) -> ServiceError:
    remaining = context.time_remaining()
    if remaining is not None and remaining <= 0:
        return DeadlineExceededError("no answer was ready by the request's deadline")
    return ClientClosedError("the client cancelled the call before its answer")


def _choose_code(status: int) -> grpc.StatusCode:
    return _CODES.get(status, grpc.StatusCode.INTERNAL)


def _read_error(response: Response) -> str:
    return str(orjson.loads(response.body)["error"])


def _build_stream_response(response: Response, request: bytes) -> bytes:
    if response.status == 200:  # noqa: PLR2004
        return messages.build_stream_response(response.body)
    return messages.build_stream_error(_read_error(response), request)
