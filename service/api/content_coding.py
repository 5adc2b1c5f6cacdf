"""Content codings (RFC 9110, section 8.4): gzip and deflate bodies in and out."""

import re
import zlib
from collections.abc import Callable

from service.errors import InvalidRequestError, TooLargeError

COMPRESS_FROM = 2**14  # bytes; a smaller response travels faster than it is compressed
# JSON of numbers unfolds 3 to 30 times, and only the same few characters again and again unfold up to 1030 times. That
# is what benchmarks send, so it is taken as long as it stays small: 4 MB are 1,300 digits of zeros.
MAX_RATIO = 200
RATIO_FROM = 2**22  # bytes
_MAX_MEMBERS = 1024
_READ_BYTES, _INFLATED_BYTES = 2**16, 2**20  # at a time
_GZIP = b"\x1f\x8b"
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_RAW_DEFLATE = -zlib.MAX_WBITS
_WINDOWS = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}
_LONGEST_OFFER = 1024  # bytes that are read of an Accept-Encoding field
_NAMES = {b"x-gzip": b"gzip"}
_REFUSED = re.compile(rb"q=0(\.0*)?")


def inflate(body: bytes, limit: int, check: Callable[[], object]) -> bytes:
    """Return a gzip or deflate body decompressed; gzip may have several members (RFC 1952, section 2.2).

    Args:
        body: compressed.
        limit: bytes that may come of it; no more are ever in memory.
        check: called for every megabyte; raises once nobody waits for it.

    Raises:
        InvalidRequestError: it is damaged or cut short.
        TooLargeError: it is longer than `limit`, or unfolds to more than `MAX_RATIO` times its size.
    """
    most = min(limit, max(RATIO_FROM, MAX_RATIO * len(body)))
    parts: list[bytes] = []
    size = start = 0
    for _ in range(_MAX_MEMBERS):
        decompressor = zlib.decompressobj(_choose_window(body[start : start + 2]))
        while not decompressor.eof:
            check()
            fed = decompressor.unconsumed_tail or body[start : start + _READ_BYTES]
            start += 0 if decompressor.unconsumed_tail else len(fed)
            try:
                part = decompressor.decompress(fed, min(_INFLATED_BYTES, most - size + 1))
            except zlib.error as error:
                raise InvalidRequestError(f"the compressed body cannot be read: {error}") from error
            if not fed and not part:
                raise InvalidRequestError("the compressed body is cut short")
            parts.append(part)
            size += len(part)
            if size > most:
                raise _over_limit(most, limit)
        start -= len(decompressor.unused_data)
        if start == len(body):
            return b"".join(parts)
        if body[start : start + 2] != _GZIP:
            raise InvalidRequestError("the compressed body has bytes after its end")
    raise InvalidRequestError(f"the compressed body has over {_MAX_MEMBERS} members")


def _choose_window(first: bytes) -> int:
    """Return zlib's window bits by the first two bytes.

    "deflate" is zlib by RFC 9110 and a raw stream from some clients; the low half of zlib's first byte is 8.
    """
    return _RAW_DEFLATE if first and first != _GZIP and first[0] & 15 != 8 else _GZIP_OR_ZLIB  # noqa: PLR2004


def _over_limit(most: int, limit: int) -> TooLargeError:
    if most == limit:
        return TooLargeError(f"the body is over the limit of {limit} bytes once decompressed")
    return TooLargeError(
        f"the body has over {most} bytes once decompressed, over {MAX_RATIO} times its size; send it uncompressed"
    )


def read_coding(values: list[bytes]) -> bytes:
    """Return the content coding that Content-Encoding fields name: gzip, deflate, or nothing for none.

    Codings are case-insensitive, `x-gzip` is gzip (RFC 9110, section 8.4.1.3), and several fields are one list. Of
    another coding, or of several, the list is returned as it is.
    """
    codings = [coding.strip() for coding in b",".join(values).lower().split(b",")]
    return b", ".join(_NAMES.get(coding, coding) for coding in codings if coding not in (b"", b"identity"))


def compress(fields: bytes, body: bytes, accepted: bytes) -> tuple[bytes, bytes]:
    """Return header lines and body; a long body is compressed where Accept-Encoding allows a coding of ours."""
    if len(body) < COMPRESS_FROM:
        return fields, body
    fields += b"vary: accept-encoding\r\n"
    coding = _choose_coding(accepted)
    if not coding:
        return fields, body
    compressor = zlib.compressobj(level=1, wbits=_WINDOWS[coding])
    return fields + b"content-encoding: %b\r\n" % coding, compressor.compress(body) + compressor.flush()


def _choose_coding(accepted: bytes) -> bytes:
    """Return the first coding of ours that an Accept-Encoding field allows, or the empty string."""
    offered = accepted[:_LONGEST_OFFER].replace(b" ", b"").lower().split(b",")
    offers = dict(offer.partition(b";")[::2] for offer in offered)
    return next((name for name in _WINDOWS if name in offers and not _REFUSED.fullmatch(offers[name])), b"")
