"""The head of a request, and what makes one that is not answered.

Sources: RFC 9110 (semantics) and RFC 9112 (HTTP/1.1). What the parser refuses by itself is not checked again.
"""

import re
from functools import lru_cache
from typing import NamedTuple

import httptools

from service.api.headers import PredictRoute, RequestHeaders
from service.errors import HeadTooLargeError, InvalidRequestError, ServiceError

MAX_HEAD_BYTES = 2**16
MAX_HEADER_FIELDS = 100
TOO_LONG = f"the request's head is over the limit of {MAX_HEAD_BYTES} bytes"
CHUNKS_TOO_LONG = f"the request has over {MAX_HEAD_BYTES} bytes of chunk extensions or trailer fields"
_CLOSE = b"connection: close\r\n"
CONNECTION_FIELDS = {  # by whether the connection stays open, and the version: HTTP/1.0 closes where nothing is said
    (True, "1.1"): b"",
    (True, "1.0"): b"connection: keep-alive\r\n",
    (False, "1.1"): _CLOSE,
    (False, "1.0"): _CLOSE,
}
_HOST = re.compile(rb"(?:[\w.~!$&'()*+;=%-]*|\[[0-9A-Fa-f:.]+\])(?::\d{0,5})?")  # RFC 3986, section 3.2.2
LONGEST_HOST = 255 + len(":65535")

Fields = list[tuple[bytes, bytes]]


class RequestHead(NamedTuple):
    """A request line and its header fields, names in lower case.

    `expects` tells whether the client waits for `100 Continue` before it sends the body.
    """

    method: str
    target: bytes
    fields: Fields
    version: str
    keep_alive: bool
    expects: bool


Event = RequestHead | bytes | ServiceError | None  # a head, a part of a body, bytes that are not HTTP, a body's end
NO_HEAD = RequestHead("", b"", [], "1.1", True, False)

END_OF_HEAD = b"\r\n\r\n"
_LONGEST_KNOWN = 1024  # bytes
_MOST_KNOWN = 1024
_CHANGING_FIELDS = {b"x-request-id", b"traceparent", b"transfer-encoding"}  # with these, a head says nothing of others


class KnownHead(NamedTuple):
    """What was read of the head of a prediction; of `headers`, only the request id was for one request alone."""

    head: RequestHead
    route: PredictRoute
    headers: RequestHeaders


known_heads: dict[bytes, KnownHead] = {}
"""By heads as they stand in a request, to the last byte."""


def remember_head(data: bytes, head: RequestHead, route: PredictRoute, headers: RequestHeaders) -> None:
    """Keep what was read of a prediction's head if `data` is just its request, since clients repeat their heads."""
    end = data.find(END_OF_HEAD) + len(END_OF_HEAD)
    fields = dict(head.fields)
    is_plain = head.method == "POST" and head.version == "1.1" and head.keep_alive and not head.expects
    if not is_plain or end > _LONGEST_KNOWN or not _CHANGING_FIELDS.isdisjoint(fields):
        return
    if fields.get(b"content-length") == b"%d" % (len(data) - end):  # so the head ended there
        if len(known_heads) >= _MOST_KNOWN:
            known_heads.clear()
        known_heads[data[:end]] = KnownHead(head, route, headers)


@lru_cache(maxsize=1024)
def is_host(value: bytes) -> bool:
    """Tell whether the value of a Host field of up to `LONGEST_HOST` bytes is one."""
    return _HOST.fullmatch(value) is not None


def measure_head(target: bytes, fields: Fields) -> int:
    """Return about how many bytes a head has."""
    return len(target) + sum(len(name) + len(value) + len(": \r\n") for name, value in fields)


def check_head(target: bytes, fields: Fields, version: str) -> None:
    """Refuse a head that could be read in two ways, or not at all.

    RFC 9112 asks for exactly one Host (section 3.2). Of the transfer codings only `chunked` is read, and none in
    HTTP/1.0, which has no such thing (sections 6.1 and 7).

    Raises:
        HeadTooLargeError: it is too long.
        InvalidRequestError: anything else.
    """
    if len(fields) > MAX_HEADER_FIELDS:
        raise HeadTooLargeError(f"the request has over {MAX_HEADER_FIELDS} header fields")
    if measure_head(target, fields) > MAX_HEAD_BYTES:
        raise HeadTooLargeError(TOO_LONG)
    if version not in ("1.1", "1.0"):
        raise InvalidRequestError(f"this is HTTP/{version}; send HTTP/1.1")
    hosts = [value for name, value in fields if name == b"host"]
    if len(hosts) > 1 or not (hosts or version == "1.0"):
        raise InvalidRequestError(f"the request has {len(hosts)} Host fields; send one")
    if hosts and not (len(hosts[0]) <= LONGEST_HOST and is_host(hosts[0])):
        raise InvalidRequestError("the request's Host field is not a name or address with an optional port")
    codings = [value.lower() for name, value in fields if name == b"transfer-encoding"]
    if codings and (codings != [b"chunked"] or version == "1.0"):
        raise InvalidRequestError("this Transfer-Encoding is not read here; send chunked, in HTTP/1.1, or a length")
    if not target or b"#" in target:
        raise InvalidRequestError("the request's target is not a path")


def normalize_target(target: bytes) -> bytes:
    """Return the path and query of a target in absolute form (RFC 9112, section 3.2.2), or nothing if it has none."""
    try:
        url = httptools.parse_url(target)
    except httptools.HttpParserError:
        return b""
    path = (url.path or b"") + (b"?" + url.query if url.query else b"")
    return path if path[:1] == b"/" else b""


def write_without_upgrade(method: bytes, target: bytes, version: str, fields: Fields) -> bytes:
    """Return a head that wishes for another protocol as one that does not."""
    lines = [b"%b %b HTTP/%b\r\n" % (method, target, version.encode())]
    lines += [b"%b: %b\r\n" % field for field in fields if field[0] != b"upgrade"]
    return b"".join([*lines, b"\r\n"])
