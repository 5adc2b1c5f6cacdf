"""Tests of service.model.arena: slots, what is read in them, and when they are free again."""

import asyncio
import mmap
import os
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.model import channel
from service.model.arena import KEPT_BYTES, LEAST_BYTES, Arena, open_arena
from service.model.tensor_model import Tensors

WIDE = LEAST_BYTES // 4  # of float32, in the smallest row that goes to a slot

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="there is no memfd here")


def opened(size: int) -> Arena:
    """Return an arena as it is once an engine has opened it."""
    arena = Arena(size)
    arena.close()
    return arena


def rows(value: float, count: int = 1) -> "np.ndarray[Any, Any]":
    """Return inputs for slots, float32 (count, WIDE)."""
    return np.full((count, WIDE), value, np.float32)


def test_slots_are_taken_from_the_begin_and_again() -> None:
    """A slot fills the first gap that is large enough; what finds no room, or is small, stays outside."""
    arena = opened(4 * LEAST_BYTES)
    assert arena.place(1, rows(0)[:, 1:]) is None
    assert [arena.place(number, rows(0)) for number in (1, 2, 1)] == [0, LEAST_BYTES, 2 * LEAST_BYTES]
    assert arena.place(3, rows(0, 2)) is None
    arena.release(2)
    assert arena.place(4, rows(0, 2)) is None
    assert arena.place(4, rows(0)) == LEAST_BYTES
    arena.release(1)
    assert [arena.place(5, rows(0, count)) for count in (2, 1, 1)] == [2 * LEAST_BYTES, 0, None]
    assert arena.place(6, rows(0, 5)) is None


def test_nothing_is_placed_before_the_engine_has_opened_it() -> None:
    """An engine that does not answer, or may not open the arena, is given everything through the socket."""
    arena = Arena(2**20)
    assert arena.place(1, rows(0)) is None
    arena.close()
    assert arena.place(1, rows(0)) == 0


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 3), st.integers(-40, 40)), max_size=60))
def test_slots_never_overlap(steps: list[tuple[int, int, int]]) -> None:
    """Whatever is placed and released, each request's tensors keep their values until it is released."""
    arena = Arena(16 * LEAST_BYTES)
    view = np.frombuffer(mmap.mmap(arena.describe()[1], 16 * LEAST_BYTES), np.uint8)
    arena.close()
    placed: dict[int, list[tuple[int, np.ndarray[Any, Any]]]] = {}
    for number, count, more in steps:
        if not count:
            arena.release(number)
            placed.pop(number, None)
            continue
        tensor = np.random.default_rng(number).integers(0, 256, max(0, count * LEAST_BYTES + more), np.uint8)
        if (offset := arena.place(number, tensor)) is not None:
            placed.setdefault(number, []).append((offset, tensor))
        for offset, expected in (slot for slots in placed.values() for slot in slots):
            assert np.array_equal(view[offset : offset + expected.size], expected)
    for number in list(placed):
        arena.release(number)
    assert arena.place(0, np.zeros(16 * LEAST_BYTES, np.uint8)) == 0  # everything is free again


def test_empty_arena_gives_its_memory_back() -> None:
    """What a burst has touched does not stay for ever, and is still usable."""
    arena = Arena()
    descriptor = os.dup(arena.describe()[1])
    arena.close()

    def held() -> int:
        return os.fstat(descriptor).st_blocks * 512

    large = np.ones(2 * KEPT_BYTES, np.uint8)
    assert arena.place(1, large) == 0
    assert held() >= large.nbytes
    arena.release(1)
    assert held() <= KEPT_BYTES
    assert arena.place(2, large) == 0
    os.close(descriptor)


def test_tensors_come_back_from_slots() -> None:
    """Large tensors by way of the arena and the others in the message are what was sent; BYTES and empty ones, too."""

    async def run() -> None:
        arena, told = Arena(), list[int]()
        borrow = open_arena(arena.describe(), told.append)
        assert borrow is not None
        arena.close()
        text = np.empty(2, dtype=object)
        text[:] = [b"a" * 2 * LEAST_BYTES, b""]
        sent = Tensors(
            large=np.random.default_rng(0).random((3, WIDE)),
            turned=np.arange(4 * WIDE, dtype=np.int64).reshape(4, WIDE).T,
            little=np.arange(3),
            nothing=np.zeros((0, WIDE), np.float32),
            text=text,
        )
        parts = channel.pack({"id": 5}, sent, lambda tensor: arena.place(5, tensor))
        assert sum(map(len, parts)) < 3 * LEAST_BYTES
        fields, found = channel.unpack(bytes(parts[1]), b"".join(parts[2:]), borrow)
        assert fields == {"id": 5}
        assert list(found) == list(sent)
        for name, tensor in sent.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            assert np.array_equal(found[name], tensor)
        kept = found["turned"][1:]
        del found
        await asyncio.sleep(0)
        assert told == []  # a part of one is still referred to
        threading.Thread(target=[kept].clear).start()
        del kept
        async with asyncio.timeout(30):
            while told != [5]:
                await asyncio.sleep(0.005)

    asyncio.run(run())


def test_arena_that_cannot_be_opened_is_refused() -> None:
    """A process that has gone, or is another user's, is no failure."""

    async def run() -> None:
        assert open_arena([2**30, 3, 2**20], lambda _: None) is None

    asyncio.run(run())
