"""What the service reads of a request's target and header fields, and the id that every response carries."""

import itertools
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from service.api.content_coding import read_coding
from service.errors import InvalidRequestError, MethodNotAllowedError, UnsupportedMediaError
from service.model.manifest import AnyManifest, Manifest

Headers = Sequence[tuple[bytes, bytes]]

_PREDICT = re.compile(r"/v1/models/([^/:]+)(?:/(?:versions|labels)/([^/:]+))?:(predict|preview)")
_INFER = re.compile(r"/v2/models/([^/:]+)(?:/(?:versions|labels)/([^/:]+))?/(infer)")
_SECONDS = re.compile(rb"(?=.*[1-9])\d{1,6}(\.\d{1,6})?")
_TRACE = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:+/=-]{1,128}")
_CACHED_LENGTH = 300  # bytes; callers choose paths, so only short ones are cached
# Content types that every predict path reads as JSON; the last is what `curl -d` sends.
JSON_TYPES = (b"application/json", b"", b"application/x-www-form-urlencoded")


class RequestHeaders(NamedTuple):
    """The header fields that matter to the service.

    `key` is the caller's API key, and `content_encoding` the coding as `read_coding` names it. `origin` is that of the
    web page that sent the request; empty if none did, or if the browser says that it is the service's own.
    """

    request_id: bytes
    content_type: bytes = b""
    content_encoding: bytes = b""
    content_length: int = 0
    key: bytes = b""
    timeout: bytes = b""
    json_length: bytes = b""
    accept_encoding: bytes = b""
    trace: bytes = b""
    host: bytes = b""
    origin: bytes = b""

    def choose_timeout(self, longest: float) -> float:
        """Return the seconds this request may take: what it asks for in `X-Request-Timeout`, at most `longest`.

        `check_call` refuses a value that is not a positive number.
        """
        return min(float(self.timeout), longest) if _SECONDS.fullmatch(self.timeout) else longest


def build_response_fields(request_id: bytes, trace: bytes) -> bytes:
    """Return the header lines that a response repeats: the request id, and the W3C trace context if it is valid."""
    fields = b"x-request-id: %b\r\n" % request_id
    return fields + b"traceparent: %b\r\n" % trace if trace and _TRACE.fullmatch(trace) else fields


def read_headers(headers: Headers) -> RequestHeaders:
    """Pick the header fields that matter; make a request id where none, or an unusable one, was sent.

    Args:
        headers: names in lower case, as ASGI has them.
    """
    fields = dict(headers)
    get = fields.get
    sent = get(b"x-request-id", b"")
    length = get(b"content-length", b"")
    key = get(b"x-api-key", b"")
    if not key and b"authorization" in fields and fields[b"authorization"][:7].lower() == b"bearer ":
        key = fields[b"authorization"][7:].strip()
    coding = get(b"content-encoding", b"")
    if coding:
        coding = read_coding([value for name, value in headers if name == b"content-encoding"])
    return RequestHeaders(
        sent if sent and _REQUEST_ID.fullmatch(sent) else new_request_id(),
        get(b"content-type", b""),
        coding,
        int(length) if length.isdigit() else 0,
        key,
        get(b"x-request-timeout", b""),
        get(b"inference-header-content-length", b""),
        get(b"accept-encoding", b""),
        get(b"traceparent", b""),
        get(b"host", b""),
        b"" if get(b"sec-fetch-site") == b"same-origin" else get(b"origin", b""),
    )


class PredictRoute(NamedTuple):
    """What a predict path names.

    `api` is "v1" or "v2", or "tfserving" for the former with answers of that form, `key` the model with its version or
    label (None: the latest), `action` "predict", "preview" or "infer", and `path` the decoded path.
    """

    api: str
    key: tuple[str, str | None]
    action: str
    path: str


def decode_path(target: bytes) -> str:
    """Return the path of a request target without its query, percent-decoded (RFC 3986, section 2.1)."""
    path = target.partition(b"?")[0]
    return (unquote_to_bytes(path) if b"%" in path else path).decode("utf-8", "replace")


def match_route(path: str, query: bytes = b"") -> PredictRoute | None:
    """Return what the path of a prediction names, or None for any other path."""
    match = _PREDICT.fullmatch(path) or _INFER.fullmatch(path)
    if match is None:
        return None
    is_tensorflow = path[1:3] == "v1" and b"format=tfserving" in query.split(b"&")
    return PredictRoute("tfserving" if is_tensorflow else path[1:3], (match[1], match[2]), match[3], path)


@lru_cache(maxsize=1024)
def _match_cached(target: bytes) -> PredictRoute | None:
    return match_route(decode_path(target), target.partition(b"?")[2])


def match_target(target: bytes) -> PredictRoute | None:
    """Do `match_route` for a request target as it stands in the request line."""
    return (
        _match_cached(target)
        if len(target) <= _CACHED_LENGTH
        else match_route(decode_path(target), target.partition(b"?")[2])
    )


def check_call(method: str, headers: RequestHeaders) -> None:
    """Refuse a prediction that is not a POST, and a timeout that is not a time.

    Raises:
        InvalidRequestError: `X-Request-Timeout` is not a positive number of seconds.
        MethodNotAllowedError: another method.
    """
    if method != "POST":
        raise MethodNotAllowedError(f"{method} is not answered here; send POST with a JSON body", allow="POST")
    if headers.timeout and not _SECONDS.fullmatch(headers.timeout):
        raise InvalidRequestError("X-Request-Timeout is not a positive number of seconds, such as 0.5")


def check_media(api: str, headers: RequestHeaders, manifest: AnyManifest) -> None:
    """Refuse a body that the API, or the model, does not read.

    Raises:
        UnsupportedMediaError: an unsupported content type or content coding.
    """
    if headers.content_type not in JSON_TYPES:
        kind = headers.content_type.partition(b";")[0].strip().lower()
        if not _is_read(kind, api, manifest):
            shown = kind[:60].decode("latin-1")
            pictures = ", image/* or multipart/form-data" if _takes_pictures(manifest) else ""
            only = "" if kind[:6] != b"image/" or pictures else f"; {manifest.name} takes numbers and no pictures"
            raise UnsupportedMediaError(
                f"content type {shown} is not read here{only}; send Content-Type: application/json{pictures}"
            )
    if headers.content_encoding not in (b"", b"gzip", b"deflate"):
        shown = headers.content_encoding[:60].decode("latin-1")
        raise UnsupportedMediaError(f"content encoding {shown} is not read here; send one of gzip, deflate and none")


def _takes_pictures(manifest: AnyManifest) -> bool:
    return isinstance(manifest, Manifest) and manifest.input.kind == "image"


def _is_read(kind: bytes, api: str, manifest: AnyManifest) -> bool:
    if kind in JSON_TYPES or (kind.startswith(b"application/") and kind.endswith(b"+json")):
        return True
    if api == "v2":
        return kind == b"application/octet-stream"
    return (kind[:6] == b"image/" or kind == b"multipart/form-data") and _takes_pictures(manifest)


_count = itertools.count()
_prefix = os.urandom(6).hex()
os.register_at_fork(after_in_child=lambda: globals().update(_prefix=os.urandom(6).hex()))


def new_request_id() -> bytes:
    """Return an id that no other request has: a random prefix for the process, and a counter."""
    return f"{_prefix}-{next(_count):x}".encode()
