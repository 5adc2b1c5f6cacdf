"""A value in memory that several processes share."""

import json
import mmap
import struct
from typing import Any

RECORD_BYTES = 2**23  # 25,000 failed versions; the system takes memory only for the pages that are written
_LENGTH = struct.Struct("<Q")


class Record:
    """JSON in shared memory, replaced as a whole: a reader finds one whole value, wherever a writer was killed.

    There are two places, used in turn, and the number of values written so far, which says where the newest is. There
    is one writer at a time.
    """

    def __init__(self, size: int = RECORD_BYTES) -> None:
        self._size = size
        self._memory = mmap.mmap(-1, 2 * size)
        self._written = memoryview(self._memory).cast("Q")

    def read(self) -> Any:  # noqa: ANN401 - decoded JSON
        """Return the newest value; None before the first."""
        while number := self._written[0]:
            place = self._place(number)
            (length,) = _LENGTH.unpack_from(self._memory, place)
            data = self._memory[place + _LENGTH.size : place + _LENGTH.size + length]
            if self._written[0] == number:  # else this place may have been written to meanwhile
                return json.loads(data)
        return None

    def write(self, value: object) -> None:
        """Replace the value.

        Raises:
            OverflowError: it is too large; the value before it stays.
        """
        data = json.dumps(value).encode()
        if len(data) > self._size - 2 * _LENGTH.size:
            raise OverflowError(f"{len(data)} bytes are too many")
        number = self._written[0] + 1
        place = self._place(number)
        _LENGTH.pack_into(self._memory, place, len(data))
        self._memory[place + _LENGTH.size : place + _LENGTH.size + len(data)] = data
        self._written[0] = number

    def _place(self, number: int) -> int:
        return _LENGTH.size + number % 2 * (self._size - _LENGTH.size)
