"""What the service reads of a request's header fields, and the id that every answer carries."""

import itertools
import os
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from service.errors import InvalidRequestError, MethodNotAllowedError, UnsupportedMediaError
from service.model.manifest import AnyManifest, Manifest

Headers = Iterable[tuple[bytes, bytes]]

_PREDICT = re.compile(r"/v1/models/([^/:]+)(?:/(?:versions|labels)/([^/:]+))?:predict")
_INFER = re.compile(r"/v2/models/([^/:]+)(?:/(?:versions|labels)/([^/:]+))?/infer")
_SECONDS = re.compile(rb"(?=.*[1-9])\d{1,6}(\.\d{1,6})?")
_TRACE = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:+/=-]{1,128}")
_LONGEST_KEPT = 300  # characters of a path; callers choose them, and a thousand are kept


class RequestHeaders(NamedTuple):
    """The fields that matter here; `key` is the caller's API key."""

    request_id: bytes
    content_type: bytes = b""
    content_encoding: bytes = b""
    content_length: int | None = None
    key: bytes = b""
    timeout: bytes = b""
    json_length: bytes = b""
    accept_encoding: bytes = b""
    trace: bytes = b""

    @property
    def echoed(self) -> list[tuple[bytes, bytes]]:
        """The fields that the answer repeats: the request's id, and its W3C trace context where it sent one."""
        fields = [(b"x-request-id", self.request_id)]
        if self.trace and _TRACE.fullmatch(self.trace):
            fields.append((b"traceparent", self.trace))
        return fields

    def choose_timeout(self, longest: float) -> float:
        """Return the seconds this request may take: what it asks for in `X-Request-Timeout`, up to `longest`.

        A value that is not a positive number is refused by `check_call`.
        """
        if not self.timeout:
            return longest
        return min(float(self.timeout), longest) if _SECONDS.fullmatch(self.timeout) else longest


def read_headers(headers: Headers) -> RequestHeaders:
    """Pick the header fields that matter; make a request id where none, or an unusable one, was sent.

    Args:
        headers: names in lower case, as ASGI has them.
    """
    fields = dict(headers)
    sent = fields.get(b"x-request-id", b"")
    length = fields.get(b"content-length", b"")
    key = fields.get(b"x-api-key", b"")
    if not key and fields.get(b"authorization", b"")[:7].lower() == b"bearer ":
        key = fields[b"authorization"][7:].strip()
    return RequestHeaders(
        sent if sent and _REQUEST_ID.fullmatch(sent) else new_request_id(),
        fields.get(b"content-type", b""),
        fields.get(b"content-encoding", b""),
        int(length) if length.isdigit() else None,
        key,
        fields.get(b"x-request-timeout", b""),
        fields.get(b"inference-header-content-length", b""),
        fields.get(b"accept-encoding", b""),
        fields.get(b"traceparent", b""),
    )


class PredictRoute(NamedTuple):
    """What a predict path names: an API ("v1" or "v2"), a model, and a version (None: the newest); and the path."""

    api: str
    name: str
    version: str | None
    path: str


def match_route(path: str) -> PredictRoute | None:
    """Return what a predict or infer path names, or None for another path."""
    return _match_again(path) if len(path) <= _LONGEST_KEPT else _match(path)


def _match(path: str) -> PredictRoute | None:
    match = _PREDICT.fullmatch(path) or _INFER.fullmatch(path)
    return PredictRoute(path[1:3], match[1], match[2], path) if match else None


_match_again = lru_cache(maxsize=1024)(_match)


def check_call(method: str, head: RequestHeaders) -> None:
    """Refuse what is not a POST, whatever the model.

    Raises:
        InvalidRequestError: `X-Request-Timeout` is not a positive number of seconds.
        MethodNotAllowedError: another method.
    """
    if method != "POST":
        raise MethodNotAllowedError(f"{method} is not answered here; send POST with a JSON body", allow="POST")
    if head.timeout and not _SECONDS.fullmatch(head.timeout):
        raise InvalidRequestError("X-Request-Timeout is not a positive number of seconds, such as 0.5")


def check_media(target: PredictRoute, head: RequestHeaders, manifest: AnyManifest) -> None:
    """Refuse a body that the API, or the model, does not read.

    Raises:
        UnsupportedMediaError: another content type, or a content encoding.
    """
    if head.content_type not in (b"application/json", b""):
        kind = head.content_type.partition(b";")[0].strip().lower()
        if not _is_read(kind, target.api, manifest):
            shown = kind[:60].decode("latin-1")
            pictures = ", image/* or multipart/form-data" if _takes_pictures(manifest) else ""
            only = "" if kind[:6] != b"image/" or pictures else f"; {manifest.name} takes numbers and no pictures"
            raise UnsupportedMediaError(
                f"content type {shown} is not read here{only}; send Content-Type: application/json{pictures}"
            )
    if head.content_encoding not in (b"", b"identity", b"gzip", b"deflate"):
        shown = head.content_encoding[:60].decode("latin-1")
        raise UnsupportedMediaError(f"content encoding {shown} is not read here; send gzip, deflate or none")


def _takes_pictures(manifest: AnyManifest) -> bool:
    return isinstance(manifest, Manifest) and manifest.input.kind == "image"


def _is_read(kind: bytes, api: str, manifest: AnyManifest) -> bool:
    if api == "v2":
        return kind in (b"application/json", b"application/octet-stream")
    picture = kind[:6] == b"image/" or kind == b"multipart/form-data"
    return kind == b"application/json" or (picture and _takes_pictures(manifest))


_count = itertools.count()
_prefix = os.urandom(6).hex()
os.register_at_fork(after_in_child=lambda: globals().update(_prefix=os.urandom(6).hex()))


def new_request_id() -> bytes:
    """Return an id that no other request of any worker has: a random prefix per process, and a counter."""
    return f"{_prefix}-{next(_count):x}".encode()
