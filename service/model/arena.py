"""Memory that a worker shares with an engine, so that large tensors need not be copied through a socket.

A worker makes an arena for each connection to an engine, and alone decides who has which part of it: it copies each
large tensor of a request into a slot, and the message says where the engine finds it. A request's slots are free again
once the engine has told that it does not read them any more, however the request ended. Where an arena is full, cannot
be opened, or cannot be made (memfd is Linux's), tensors go through the socket.
"""

import asyncio
import contextlib
import mmap
import os
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

ARENA_BYTES = 2**25
KEPT_BYTES = 2**22  # of an empty arena; the pages beyond go back to the system
LEAST_BYTES = 2**14  # of a tensor; smaller ones are copied through the socket as fast
_ALIGNMENT = 64

Borrow = Callable[[int], NDArray[np.uint8]]
"""Gives the bytes of an arena to the request of a number; these count as read until nothing refers to them."""


class Arena:
    """The worker's side. All methods belong to its event loop.

    Raises:
        OSError: there is no memory.
    """

    def __init__(self, size: int = ARENA_BYTES) -> None:
        self._file = open(os.memfd_create("arena"), "r+b", buffering=0)  # noqa: SIM115 - closed when opened elsewhere
        os.ftruncate(self._file.fileno(), size)
        self._memory = mmap.mmap(self._file.fileno(), size)
        self._size = size
        self._slots: list[tuple[int, int, int]] = []  # begin, end, and the request's number; in order
        self._touched = 0  # bytes from the begin that may take memory

    def describe(self) -> list[int]:
        """Return what `open_arena` needs."""
        return [os.getpid(), self._file.fileno(), self._size]

    def close(self) -> None:
        """Close the file; the memory remains while it is used."""
        self._file.close()

    def place(self, number: int, tensor: NDArray[Any]) -> int | None:
        """Copy a request's tensor into a slot, and return its offset; None if it is small, or there is no room."""
        size = tensor.nbytes
        if size < LEAST_BYTES or not self._file.closed:
            return None
        index = begin = 0
        while index < len(self._slots) and self._slots[index][0] - begin < size:
            begin = self._slots[index][1]
            index += 1
        if begin + size > self._size:
            return None
        end = begin + -(-size // _ALIGNMENT) * _ALIGNMENT
        self._slots.insert(index, (begin, end, number))
        self._touched = max(self._touched, end)
        np.frombuffer(self._memory, tensor.dtype, tensor.size, begin).reshape(tensor.shape)[...] = tensor
        return begin

    def release(self, number: int) -> None:
        """Take back the slots of a request."""
        self._slots = [slot for slot in self._slots if slot[2] != number]
        if not self._slots and self._touched > KEPT_BYTES:
            with contextlib.suppress(OSError):  # not every system that has memfd can
                self._memory.madvise(mmap.MADV_REMOVE, KEPT_BYTES, self._size - KEPT_BYTES)
            self._touched = 0


def create_arena() -> Arena | None:
    """Return a new arena, or None where there is no memfd or no memory."""
    with contextlib.suppress(AttributeError, OSError):
        return Arena()
    return None


def open_arena(described: list[int], tell_unread: Callable[[int], None]) -> Borrow | None:
    """Open a worker's arena, for reading, in the engine; return None where that is not allowed.

    `tell_unread` is called on this event loop with the number of a request whose tensors nothing refers to any more.
    """
    pid, descriptor, size = described
    try:
        with open(f"/proc/{pid}/fd/{descriptor}", "rb") as file:
            memory = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except OSError:
        return None
    loop = asyncio.get_running_loop()

    def tell(number: int) -> None:  # in any thread
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(tell_unread, number)

    def borrow(number: int) -> NDArray[np.uint8]:
        whole = np.frombuffer(memory, np.uint8)
        weakref.finalize(whole, tell, number).atexit = False
        return whole

    return borrow
