"""One prediction on its way through a connection: from its head to the bytes of its answer."""

import http
import time
from collections.abc import Callable, Iterable
from typing import Any

from service.api import codecs
from service.api.failures import as_service_error, encode_error, error_headers
from service.api.headers import PredictRoute, RequestHeaders
from service.app import Application
from service.errors import ServiceError
from service.model.backends import Array
from service.registry.versions import LoadedVersion

CLOSE = b"connection: close\r\n"
_STATUS = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in http.HTTPStatus}
_OK = _STATUS[200] + b"%bcontent-length: %d\r\n%b\r\n%b"
Finish = Callable[["Prediction", bytes], None]


class _NoEvent:
    """Stands where uvicorn wakes the ASGI task of a request; a prediction has none."""

    def set(self) -> None:
        """Do nothing."""


_NO_EVENT = _NoEvent()


class Prediction:
    """One prediction in flight: uvicorn's idea of a request cycle, and the batcher's of a waiter.

    Args:
        app: what decides.
        target: what is asked for.
        head: of the request.
        keep_alive: whether the connection stays open after the answer.
        now: the event loop's time.
        finish: is given the whole answer, once.
        method: of the request; another than POST is refused.
    """

    __slots__ = (
        "app", "began", "call", "deadline", "disconnected", "finish", "head", "held", "keep_alive", "message_event",
        "method", "parts", "response_complete", "served", "size", "target",
    )  # fmt: skip

    def __init__(
        self,
        app: Application,
        target: PredictRoute,
        head: RequestHeaders,
        keep_alive: bool,
        now: float,
        finish: Finish,
        method: str = "POST",
    ) -> None:
        self.app = app
        self.finish = finish
        self.method = method
        self.target = target
        self.head = head
        self.keep_alive = keep_alive
        self.began = time.perf_counter()
        self.deadline = now + head.choose_timeout(app.settings.request_timeout)
        self.disconnected = False
        self.response_complete = False
        self.message_event = _NO_EVENT
        self.parts: list[bytes] = []
        self.size = 0
        self.held = 0
        self.served: LoadedVersion | None = None
        self.call: Any = None

    def done(self) -> bool:
        """Tell whether it was answered or its client is gone."""
        return self.response_complete or self.disconnected

    def set_result(self, results: Array) -> None:
        """Answer 200."""
        assert self.served is not None
        assert self.call is not None
        try:
            about, body = codecs.encode(self.target.api, results, self.served.manifest, self.call, self.head)
        except Exception as error:  # nothing may reach the batcher, which has other requests to answer
            self.set_exception(error)
            return
        self._finish(200, _OK % (about, len(body), self._fields(), body))

    def set_exception(self, error: BaseException) -> None:
        """Answer with the failure's status and sentence."""
        if self.done():
            return
        found = as_service_error(error if isinstance(error, Exception) else Exception(error), self.head.request_id)
        self._finish(found.status, encode_failure(found, self._fields()), str(found))

    def _fields(self) -> bytes:
        if self.app.registry.draining:
            self.keep_alive = False
        fields = join_fields(self.head.echoed) if self.head.trace else b"x-request-id: %b\r\n" % self.head.request_id
        return fields if self.keep_alive else fields + CLOSE

    def _finish(self, status: int, answer: bytes, error: str = "") -> None:
        self.response_complete = True
        rows = len(self.call.inputs) if self.call is not None else 0
        self.app.note(self.target, self.method, self.head, status, rows, self.began, self.served, error)
        self.served = self.call = None  # an idle connection must not keep a version that has been replaced
        self.finish(self, answer)


def encode_failure(error: ServiceError, fields: bytes) -> bytes:
    """Return a whole HTTP answer for a failure; `fields` are header lines to add."""
    body = encode_error(error)
    about = join_fields([(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))])
    return _STATUS[error.status] + about + fields + join_fields(error_headers(error)) + b"\r\n" + body


def join_fields(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return header fields as lines."""
    return b"".join(b"%b: %b\r\n" % field for field in fields)
