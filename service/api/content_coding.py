"""Content codings (RFC 9110, section 8.4): gzip and deflate bodies in and out."""

import re
import zlib

from service.errors import InvalidRequestError, TooLargeError

COMPRESS_FROM = 2**14  # bytes; a smaller response travels faster than it is compressed
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_RAW_DEFLATE = -zlib.MAX_WBITS
_WINDOWS = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}
_REFUSED = re.compile(rb"q=0(\.0*)?")


def inflate(body: bytes, limit: int) -> bytes:
    """Return a gzip or deflate body decompressed; never more than `limit` bytes of it are in memory.

    Raises:
        InvalidRequestError: it is damaged or cut short.
        TooLargeError: it is longer than `limit`.
    """
    # "deflate" is zlib by RFC 9110 and a raw stream from some clients; the low half of zlib's first byte is 8.
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


def compress(fields: bytes, body: bytes, accepted: bytes) -> tuple[bytes, bytes]:
    """Return header lines and body, compressed where an Accept-Encoding field allows a coding of ours."""
    fields += b"vary: accept-encoding\r\n"
    coding = _choose_coding(accepted)
    if not coding:
        return fields, body
    compressor = zlib.compressobj(level=1, wbits=_WINDOWS[coding])
    return fields + b"content-encoding: %b\r\n" % coding, compressor.compress(body) + compressor.flush()


def _choose_coding(accepted: bytes) -> bytes:
    """Return the first coding of ours that an Accept-Encoding field allows, or the empty string."""
    offers = dict(offer.replace(b" ", b"").lower().partition(b";")[::2] for offer in accepted.split(b","))
    return next((name for name in _WINDOWS if name in offers and not _REFUSED.fullmatch(offers[name])), b"")
