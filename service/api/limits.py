"""How much of a body is read, and for how long: small bodies must not become large objects, nor hold up a worker."""

import sys
from collections.abc import Callable
from typing import NamedTuple

from service.errors import InvalidRequestError, TooLargeError

MAX_VALUES = 2**19  # JSON values that are decoded into objects at once: up to 30 ms, and 70 bytes each


class ReadLimits(NamedTuple):
    """What a decoder keeps to.

    `rows` is how many instances a request may have. `check` is called between two pieces of a long body, and raises
    once nobody waits for the answer any more.
    """

    rows: int = sys.maxsize
    check: Callable[[], object] = bool  # does nothing

    def check_rows(self, rows: int) -> None:
        """Refuse a request with too many instances.

        Raises:
            TooLargeError: it has more than `rows`.
        """
        if rows > self.rows:
            raise TooLargeError(f"the request has {rows} instances; at most {self.rows} are taken at once")


NO_LIMITS = ReadLimits()


def check_values(text: bytes, limit: int = MAX_VALUES) -> None:
    """Refuse JSON with too many values before any of them is built.

    A value, or a key, follows a comma, a bracket, a brace or a colon, so counting those bytes counts the values; it
    counts too many where strings have such bytes.

    Raises:
        InvalidRequestError: it was cut off, so that its brackets do not match.
        TooLargeError: it has more than `limit` values.
    """
    if len(text) <= limit or sum(map(text.count, (b",", b"[", b"{", b":"))) <= limit:
        return
    if text.count(b"[") != text.count(b"]") or text.count(b"{") != text.count(b"}"):
        raise InvalidRequestError("the body is not JSON: its brackets do not match")
    raise TooLargeError(f"the body has over {limit} JSON values; send fewer, or numbers as binary tensors to /v2")
