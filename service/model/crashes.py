"""Which requests crash an engine: one that was there at two crashes is refused, for it would end the next one, too.

An engine that crashes has the requests of several callers, and only one of them is at fault. The others are in their
turn without it next time.
"""

import hashlib
import signal
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from service.errors import InvalidRequestError
from service.model import channel

CRASHES = frozenset(
    {signal.SIGSEGV, signal.SIGFPE, signal.SIGILL, signal.SIGBUS, signal.SIGABRT, signal.SIGSYS, signal.SIGTRAP}
)
MOST = 1024  # requests that are remembered, and that are looked at after a crash
Request = tuple[str, Any]  # the key of a version, and inputs


class Crashes:
    """What one worker remembers of the crashes of one engine."""

    def __init__(self) -> None:
        self._lost: list[Request] = []
        self._counts: OrderedDict[bytes, int] = OrderedDict()  # of crashes, by digest of the request
        self._keys: frozenset[str] = frozenset()  # of versions with a request that is refused

    def lose(self, requests: Sequence[Request]) -> None:
        """Keep the requests that an engine had when it ended, until its successor says how."""
        self._lost = [*self._lost, *requests][:MOST]

    def judge(self, previous_exit: int) -> None:
        """Count the requests that were lost, if the engine crashed; negative exit codes are signals."""
        lost, self._lost = self._lost, []
        if -previous_exit not in CRASHES:
            return
        for found, key in {_digest(request): request[0] for request in lost}.items():
            self._counts[found] = self._counts.pop(found, 0) + 1
            if self._counts[found] > 1:
                self._keys |= {key}
        while len(self._counts) > MOST:
            self._counts.popitem(last=False)

    def check(self, key: str, inputs: Any) -> None:  # noqa: ANN401 - an array or `Tensors`
        """Refuse a request that was there at two crashes.

        Raises:
            InvalidRequestError: it was.
        """
        if key in self._keys and self._counts.get(_digest((key, inputs)), 0) > 1:
            raise InvalidRequestError("the model crashed twice when it had these values, so they are not tried again")


def _digest(request: Request) -> bytes:
    key, inputs = request
    found = hashlib.blake2b(key.encode(), digest_size=16)
    for part in channel.pack({}, inputs):
        found.update(part)
    return found.digest()
