"""The two request bodies behind one face, with content encodings around them."""

import re
import zlib
from typing import Any, Protocol

from service.api.headers import RequestHeaders
from service.api.v1 import codec as v1_codec
from service.api.v2 import codec as v2_codec
from service.errors import InvalidRequestError, TooLargeError
from service.model.backends import Array
from service.model.manifest import AnyManifest

_COMPRESS_FROM = 2**14  # bytes; a smaller answer travels faster than it is compressed
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_RAW_DEFLATE = -zlib.MAX_WBITS
_WINDOWS = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}
_NEVER = re.compile(rb"q=0(\.0*)?")


class Codec(Protocol):
    """What a wire format does; `service.api.v1.codec` and `service.api.v2.codec` are two."""

    def is_heavy(self, body: bytes, head: RequestHeaders) -> bool:
        """Tell whether reading a body belongs in a thread."""
        ...

    def decode(self, body: bytes, manifest: AnyManifest, head: RequestHeaders) -> Any:  # noqa: ANN401 - each has its own call
        """Return a call with `inputs`, and `timeout` in seconds or None."""
        ...

    def encode(self, results: Array, manifest: AnyManifest, call: Any) -> tuple[bytes, bytes]:  # noqa: ANN401
        """Return header lines and body."""
        ...


CODECS: dict[str, Codec] = {"v1": v1_codec, "v2": v2_codec}


def is_heavy(api: str, body: bytes, head: RequestHeaders) -> bool:
    """Tell whether reading a body belongs in a thread: it is large, or compressed."""
    return bool(head.content_encoding) or CODECS[api].is_heavy(body, head)


def decode(api: str, body: bytes, manifest: AnyManifest, head: RequestHeaders, limit: int) -> Any:  # noqa: ANN401
    """Return an API's call from a request's body.

    Raises:
        InvalidRequestError: it cannot be used.
        TooLargeError: it has more than `limit` bytes once it is decompressed.
    """
    if head.content_encoding not in (b"", b"identity"):
        body = inflate(body, limit)
    return CODECS[api].decode(body, manifest, head)


def inflate(body: bytes, limit: int) -> bytes:
    """Return a gzip or deflate body decompressed, and never more than `limit` bytes of it in memory.

    Raises:
        InvalidRequestError: it is damaged or cut short.
        TooLargeError: it is longer than `limit`.
    """
    # "deflate" is zlib by RFC 9110 and a raw stream from some clients; zlib's first byte says 8 in its low half.
    raw = body[:2] != b"\x1f\x8b" and body[:1] != b"" and body[0] & 15 != 8  # noqa: PLR2004
    decompressor = zlib.decompressobj(_RAW_DEFLATE if raw else _GZIP_OR_ZLIB)
    try:
        content = decompressor.decompress(body, limit + 1)
    except zlib.error as error:
        raise InvalidRequestError(f"the compressed body cannot be read: {error}") from error
    if len(content) > limit:
        raise TooLargeError(f"the body is over the limit of {limit} bytes once decompressed")
    if not decompressor.eof or decompressor.unused_data:
        raise InvalidRequestError("the compressed body is cut short, or has bytes after its end")
    return content


def encode(api: str, results: Array, manifest: AnyManifest, call: Any, head: RequestHeaders) -> tuple[bytes, bytes]:  # noqa: ANN401
    """Return header lines and body of an answer, compressed where it is long and the client asked for it."""
    fields, body = CODECS[api].encode(results, manifest, call)
    if len(body) < _COMPRESS_FROM:
        return fields, body
    fields += b"vary: accept-encoding\r\n"
    encoding = _choose_encoding(head.accept_encoding)
    if not encoding:
        return fields, body
    compressor = zlib.compressobj(level=1, wbits=_WINDOWS[encoding])
    fields += b"content-encoding: %b\r\n" % encoding
    return fields, compressor.compress(body) + compressor.flush()


def _choose_encoding(accepted: bytes) -> bytes:
    """Return the first content encoding of ours that an Accept-Encoding field takes, or the empty string."""
    offers = dict(offer.replace(b" ", b"").lower().partition(b";")[::2] for offer in accepted.split(b","))
    return next((name for name in _WINDOWS if name in offers and not _NEVER.fullmatch(offers[name])), b"")
