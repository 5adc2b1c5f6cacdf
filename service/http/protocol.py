"""A short cut for predictions inside uvicorn's HTTP/1.1 protocol.

uvicorn (https://www.uvicorn.org) parses HTTP with llhttp, keeps connections alive, and runs all as ASGI: a task, scope
and six messages a request. A prediction needs none of them. It is decoded in the callback that completes its body,
queued, and answered with one write when its batch is done. Everything else, pipelined requests too, goes uvicorn's own
way. What an answer says is decided by `service.app` and `service.api`, for both ways alike.
"""

from service.api import codecs
from service.api.headers import RequestHeaders, match_route, read_headers
from service.errors import (
    HeadTooLargeError,
    InvalidRequestError,
    TooLargeError,
    UnavailableError,
)
from service.http.connection import HEAD_TOO_LONG, MAX_HEAD_BYTES, LimitedProtocol
from service.model.manifest import AnyManifest
from service.request import Prediction

MAX_HEADER_FIELDS = 100
MAX_PIPELINED = 256


class PredictProtocol(LimitedProtocol):
    """uvicorn's protocol within limits, with predictions answered without ASGI."""

    def connection_lost(self, exc: Exception | None) -> None:
        """End a connection; a prediction in flight on it is dropped before it is run."""
        active, self._active, self._prediction = self._active, None, None
        self._head_since = self._body_since = None
        if active is not None and not active.response_complete:
            active.disconnected = True
            active.message_event.set()
            if isinstance(active, Prediction):
                self._release(active)
        self.pipeline.clear()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Start the clock of a request's head. The ASGI scope, which uvicorn makes here, is left until it is needed."""
        self.url, self.headers, self.expect_100_continue = b"", [], False
        self._head_since = self.loop.time()
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        """Begin a prediction, or leave the request to uvicorn."""
        self._head_since = self._idle_since = None
        if self._deaf or self.parser.should_upgrade():  # it will be read once more, without the upgrade
            return
        if len(self.headers) > MAX_HEADER_FIELDS:
            self._refuse(HeadTooLargeError(f"the request has over {MAX_HEADER_FIELDS} header fields"))
            return
        if self._head_bytes + self._unread > MAX_HEAD_BYTES and self._measure_head() > MAX_HEAD_BYTES:
            self._refuse(HeadTooLargeError(HEAD_TOO_LONG))
            return
        busy = self._is_busy()
        if busy and len(self.pipeline) >= MAX_PIPELINED:
            self.transport.abort()
            return
        target = match_route(self.url.partition(b"?")[0].decode("latin-1"))
        method = self.parser.get_method()
        is_plain = not (busy or self.expect_100_continue)
        if target is None or not is_plain or method == b"HEAD":  # the refusal of a HEAD has no body
            self._leave_to_uvicorn()
            return
        head = read_headers(self.headers)
        keep_alive = self.parser.should_keep_alive() and self.parser.get_http_version() != "1.0"
        self._prediction = self._active = prediction = Prediction(
            self.app, target, head, keep_alive, self.loop.time(), self.finish, method.decode("latin-1")
        )
        self.cycle = prediction  # type: ignore[assignment]  # it is all that uvicorn asks of a cycle
        self.app.in_flight += 1
        try:
            prediction.served = self.app.admit(target, prediction.method, head)
            self._check_size(prediction, head.content_length or 0)
        except Exception as error:
            prediction.set_exception(error)

    def _leave_to_uvicorn(self) -> None:
        url, headers, expect = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expect
        self.headers += headers  # in place: the scope holds this list
        try:
            super().on_headers_complete()
        except Exception:  # uvicorn reads the target here, and trips over one that is no path in several ways
            self._refuse(InvalidRequestError("the request's target is not a path"))
            return
        self._body_since = self.loop.time()
        self.headers = []  # trailer fields are none of the scope's
        if not self._is_busy():
            self._active = self.cycle

    def on_response_complete(self) -> None:
        """Go on with the next pipelined request, if one has come."""
        if self.pipeline:
            self._active = self.pipeline[-1][0]
        else:  # uvicorn's own clock ends with the next byte, also of a blank line that begins no request
            self._idle_since = self.loop.time()
        super().on_response_complete()

    def on_body(self, body: bytes) -> None:
        """Gather a prediction's body, up to the limit; that of a request already refused is dropped."""
        self._unread -= len(body)
        self._head_bytes = -self._unread
        prediction = self._prediction
        if prediction is None:
            if self.cycle is not None and not self._deaf:
                super().on_body(body)
            return
        if prediction.response_complete:
            return
        prediction.parts.append(body)
        prediction.size += len(body)
        try:
            self._check_size(prediction, prediction.size)
            prediction.held = self.app.hold(prediction.held, prediction.size)
        except (TooLargeError, UnavailableError) as error:
            prediction.keep_alive = False  # what is left of the body is not worth reading
            prediction.parts = []
            prediction.set_exception(error)

    def on_message_complete(self) -> None:
        """Decode a prediction and put it into its model's queue."""
        prediction, self._prediction = self._prediction, None
        if prediction is None:
            if self.parser.should_upgrade():
                return
            self._body_since = None
            if self.cycle is not None and not self._deaf:
                super().on_message_complete()
        elif not prediction.response_complete:
            parts = prediction.parts
            body = parts[0] if len(parts) == 1 else b"".join(parts)
            prediction.parts = []
            if not codecs.is_heavy(prediction.target.api, body, prediction.head):
                self._submit(prediction, body)
            else:
                self.flow.pause_reading()
                task = self.loop.create_task(self._submit_heavy(prediction, body))
                task.add_done_callback(self.tasks.discard)
                self.tasks.add(task)

    def _submit(self, prediction: Prediction, body: bytes) -> None:
        try:
            prediction.call = codecs.decode(*self._arguments(prediction, body))
            self._queue(prediction)
        except Exception as error:
            prediction.set_exception(error)

    async def _submit_heavy(self, prediction: Prediction, body: bytes) -> None:
        """Decode a heavy body in a thread: it would hold the loop for milliseconds."""
        try:
            arguments = self._arguments(prediction, body)
            prediction.call = await self.app.run(prediction.deadline, codecs.decode, *arguments)
            self._queue(prediction)
        except Exception as error:
            prediction.set_exception(error)

    def _arguments(self, prediction: Prediction, body: bytes) -> tuple[str, bytes, AnyManifest, RequestHeaders, int]:
        assert prediction.served is not None
        limit = self.app.settings.max_request_bytes
        return prediction.target.api, body, prediction.served.manifest, prediction.head, limit

    def _queue(self, prediction: Prediction) -> None:
        assert prediction.served is not None
        call = prediction.call
        if prediction.done():
            if prediction.disconnected:
                prediction.served.metrics.dropped("gone")
            return
        if call.inputs.nbytes > prediction.held:
            prediction.held = self.app.hold(prediction.held, call.inputs.nbytes)
        if call.timeout is not None:
            prediction.deadline = min(prediction.deadline, self.loop.time() + call.timeout)
        prediction.served.batcher.submit(call.inputs, prediction.deadline, prediction)

    def _check_size(self, prediction: Prediction, size: int) -> None:
        limit = self.app.settings.max_request_bytes
        if size > limit:
            prediction.keep_alive = False  # what is left of the body is not worth reading
            raise TooLargeError(f"the body is over the limit of {limit} bytes")

    def finish(self, prediction: Prediction, answer: bytes) -> None:
        """Write an answer, and get ready for the connection's next request."""
        if prediction.disconnected:
            return
        self._release(prediction)
        if self.transport.is_closing():
            return
        self.transport.write(answer)
        if not prediction.keep_alive:
            self._end(lingers=self._prediction is prediction)
        elif self.pipeline:
            self.on_response_complete()
        else:  # as on_response_complete, with a clock that `check_time` reads instead of a timer for every answer
            self.flow.resume_reading()
            self._idle_since = self.loop.time()

    def _release(self, prediction: Prediction) -> None:
        self.app.in_flight -= 1
        prediction.held = self.app.hold(prediction.held, 0)
