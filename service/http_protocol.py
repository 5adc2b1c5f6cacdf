"""A short cut for predictions inside uvicorn's HTTP/1.1 protocol.

uvicorn (https://www.uvicorn.org) parses HTTP with llhttp, keeps connections alive, and runs all as ASGI: a task, scope
and six messages a request. A prediction needs none of them. It is decoded in the callback that completes its body,
queued, and answered with one write when its batch is done. Everything else, pipelined requests too, goes uvicorn's own
way. What an answer says is decided by `service.app` and `service.api`, for both ways alike.
"""

import asyncio
import http
from typing import TYPE_CHECKING

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.api import typed
from service.api.failures import as_service_error, encode_error, error_headers
from service.api.head import RequestHead, match_predict, read_head
from service.app import Application
from service.backends import Array
from service.errors import DeadlineExceededError, TooLargeError

if TYPE_CHECKING:
    from service.repository import Served

SWEEP_SECONDS = 0.5
_STATUS = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in http.HTTPStatus}
_OK = _STATUS[200] + b"content-type: application/json\r\nx-request-id: %b\r\ncontent-length: %d\r\n%b\r\n%b"
_CLOSE = b"connection: close\r\n"


class _NoEvent:
    """Stands where uvicorn wakes the ASGI task of a request; a prediction has none."""

    def set(self) -> None:
        """Do nothing."""


class Prediction:
    """One prediction in flight: uvicorn's idea of a request cycle, and the batcher's of a waiter."""

    __slots__ = (
        "call", "deadline", "disconnected", "head", "keep_alive", "message_event", "parts", "protocol",
        "response_complete", "served", "size",
    )  # fmt: skip

    def __init__(self, protocol: "PredictProtocol", head: RequestHead, keep_alive: bool, deadline: float) -> None:
        self.protocol = protocol
        self.head = head
        self.keep_alive = keep_alive
        self.deadline = deadline
        self.disconnected = False
        self.response_complete = False
        self.message_event = _NO_EVENT
        self.parts: list[bytes] = []
        self.size = 0
        self.served: Served
        self.call: typed.Call

    def done(self) -> bool:
        """Tell whether it was answered or its client is gone."""
        return self.response_complete or self.disconnected

    def set_result(self, results: Array) -> None:
        """Answer 200."""
        try:
            body = typed.encode_results(results, self.served.manifest, self.call)
        except Exception as error:  # nothing may reach the batcher, which has other requests to answer
            self.set_exception(error)
            return
        close = b"" if self.keep_alive else _CLOSE
        self._write(_OK % (self.head.request_id, len(body), close, body))

    def set_exception(self, error: BaseException) -> None:
        """Answer with the failure's status and sentence."""
        if self.done():
            return
        found = as_service_error(error if isinstance(error, Exception) else Exception(error), self.head.request_id)
        body = encode_error(found)
        fields = [
            (b"content-type", b"application/json"),
            (b"x-request-id", self.head.request_id),
            (b"content-length", b"%d" % len(body)),
            *error_headers(found),
        ]
        lines = b"".join(b"%b: %b\r\n" % field for field in fields)
        self._write(_STATUS[found.status] + lines + (b"" if self.keep_alive else _CLOSE) + b"\r\n" + body)

    def _write(self, answer: bytes) -> None:
        self.response_complete = True
        self.protocol.finish(self, answer)


_NO_EVENT = _NoEvent()


class PredictProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with predictions answered without ASGI; its `app` is an `Application`."""

    app: Application
    _prediction: Prediction | None = None

    def on_headers_complete(self) -> None:
        """Begin a prediction, or leave the request to uvicorn."""
        target = match_predict(self.url.decode("latin-1"))
        busy = self.cycle is not None and not self.cycle.response_complete
        if target is None or busy or self.expect_100_continue or self.parser.should_upgrade():
            super().on_headers_complete()
            return
        settings = self.app.settings
        head = read_head(self.headers)
        keep_alive = self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive()
        deadline = self.loop.time() + settings.request_timeout
        self._prediction = prediction = Prediction(self, head, keep_alive, deadline)
        self.cycle = prediction  # type: ignore[assignment]  # it is all that uvicorn asks of a cycle
        try:
            prediction.served = self.app.admit(target, self.parser.get_method().decode("latin-1"), head)
            self._check_size(prediction, head.content_length or 0)
        except Exception as error:
            self._refuse(prediction, error)

    def on_body(self, body: bytes) -> None:
        """Gather a prediction's body, up to the limit."""
        prediction = self._prediction
        if prediction is None:
            super().on_body(body)
            return
        if prediction.response_complete:
            return
        prediction.parts.append(body)
        prediction.size += len(body)
        try:
            self._check_size(prediction, prediction.size)
        except TooLargeError as error:
            self._refuse(prediction, error)

    def on_message_complete(self) -> None:
        """Decode a prediction and put it into its model's queue."""
        prediction, self._prediction = self._prediction, None
        if prediction is None:
            super().on_message_complete()
        elif not prediction.response_complete:
            parts = prediction.parts
            body = parts[0] if len(parts) == 1 else b"".join(parts)
            prediction.parts = []
            if len(body) < typed.LARGE_BODY:
                self._submit(prediction, body)
            else:
                self.flow.pause_reading()
                task = self.loop.create_task(self._submit_large(prediction, body))
                task.add_done_callback(self.tasks.discard)
                self.tasks.add(task)

    def _submit(self, prediction: Prediction, body: bytes) -> None:
        try:
            prediction.call = typed.decode_call(body, prediction.served.manifest)
            prediction.served.batcher.submit(prediction.call.inputs, prediction.deadline, prediction)
        except Exception as error:
            prediction.set_exception(error)

    async def _submit_large(self, prediction: Prediction, body: bytes) -> None:
        """Decode a large body in a thread: it would hold the loop for milliseconds."""
        try:
            manifest = prediction.served.manifest
            prediction.call = await self.loop.run_in_executor(None, typed.decode_call, body, manifest)
            prediction.served.batcher.submit(prediction.call.inputs, prediction.deadline, prediction)
        except Exception as error:
            prediction.set_exception(error)

    def _check_size(self, prediction: Prediction, size: int) -> None:
        limit = self.app.settings.max_request_bytes
        if size > limit:
            prediction.keep_alive = False  # what is left of the body is not worth reading
            raise TooLargeError(f"the body is over the limit of {limit} bytes")

    def _refuse(self, prediction: Prediction, error: Exception) -> None:
        """Answer before the body was read; what comes of it is parsed and dropped."""
        prediction.set_exception(error)

    def finish(self, prediction: Prediction, answer: bytes) -> None:
        """Write an answer, and get ready for the connection's next request."""
        if self.transport.is_closing():
            return
        self.transport.write(answer)
        if prediction.keep_alive:
            self.on_response_complete()
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        """Stop reading from a client that does not read its answers."""
        super().pause_writing()
        self.flow.pause_reading()

    def resume_writing(self) -> None:
        """Read again."""
        super().resume_writing()
        self.flow.resume_reading()


def sweep(connections: "set[asyncio.Protocol]", now: float) -> None:
    """Answer predictions whose body did not arrive by their deadline."""
    for connection in list(connections):
        prediction = connection._prediction if isinstance(connection, PredictProtocol) else None
        if prediction is not None and not prediction.done() and prediction.deadline < now:
            prediction.keep_alive = False
            prediction.set_exception(DeadlineExceededError("the body did not arrive by the request's deadline"))
