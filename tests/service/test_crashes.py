"""Tests of service.model.crashes."""

import signal

import numpy as np
import pytest

from service.errors import InvalidRequestError
from service.model import crashes
from service.model.crashes import Crashes
from service.model.tensor_model import Tensors

ROW = np.array([[1.0, 2.0]], np.float32)


def is_refused(memory: Crashes, key: str, inputs: object) -> bool:
    """Return whether a request is refused."""
    try:
        memory.check(key, inputs)
    except InvalidRequestError:
        return True
    return False


def test_request_of_two_crashes_is_refused() -> None:
    """Only what was there at both crashes is refused, by version and values; other ends do not count."""
    memory = Crashes()
    bad, once = Tensors(x=np.array([b"bad"], object)), Tensors(x=np.array([b"once"], object))
    for end, requests in (
        (-signal.SIGSEGV, [("a", ROW), ("a", bad), ("a", once), ("a", ROW)]),
        (-signal.SIGKILL, [("a", once)]),
        (1, [("a", once)]),
        (-signal.SIGFPE, [("a", ROW), ("a", bad)]),
    ):
        assert not is_refused(memory, "a", ROW)
        memory.lose(requests)
        memory.judge(end)
        memory.judge(end)  # nothing has been lost since
    assert is_refused(memory, "a", ROW)
    assert is_refused(memory, "a", bad)
    assert not is_refused(memory, "a", once)
    assert not is_refused(memory, "a", ROW[:, ::-1])
    assert not is_refused(memory, "a", ROW.reshape(2, 1))
    assert not is_refused(memory, "b", ROW)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only so many requests are remembered; the oldest are forgotten."""
    monkeypatch.setattr(crashes, "MOST", 2)
    memory = Crashes()
    for number in (1, 2, 3, 1, 3):
        memory.lose([("a", np.array([number], np.float32))])
        memory.judge(-signal.SIGSEGV)
    assert len(memory._counts) == 2
    assert [is_refused(memory, "a", np.array([number], np.float32)) for number in (1, 2, 3)] == [False, False, True]
