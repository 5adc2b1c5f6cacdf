"""Tests of service.agreement."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

from service.agreement import Agreement, State


def _raise_often(folder: Path) -> None:
    agreement = Agreement(folder)
    for index in range(50):
        agreement.change(lambda unloaded, index=index: unloaded | {f"{os.getpid()}-{index}"})  # type: ignore[misc]


def test_alone_is_agreed_at_once() -> None:
    """One process needs no folder: what it changes is so."""
    agreement = Agreement(None)
    assert agreement.read() == State(0, frozenset())
    agreement.confirm(0)
    assert agreement.change(lambda unloaded: unloaded | {"a"}) == 1
    assert agreement.read() == State(1, frozenset({"a"}))
    assert agreement.is_reached(1)


def test_others_see_a_change(tmp_path: Path) -> None:
    """A change is read by another worker, and each raises the generation by one."""
    one, other = Agreement(tmp_path), Agreement(tmp_path)
    assert other.read() == State()
    assert one.change(lambda unloaded: unloaded | {"a"}) == 1
    assert other.change(lambda unloaded: unloaded | {"b"}) == 2
    assert one.read() == other.read() == State(2, frozenset({"a", "b"}))


def test_changes_of_many_processes_are_all_kept(tmp_path: Path) -> None:
    """Processes that change at the same time lose nothing of each other's."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_raise_often, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    state = Agreement(tmp_path).read()
    assert (state.generation, len(state.unloaded)) == (150, 150)


def test_reached_when_every_living_worker_has_confirmed(tmp_path: Path) -> None:
    """A worker that has not confirmed is waited for while it lives, and no longer."""
    agreement = Agreement(tmp_path)
    agreement.confirm(0)
    assert not agreement.is_reached(1)
    agreement.confirm(1)
    assert agreement.is_reached(1)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        (tmp_path / f"worker-{other.pid}").write_text("0")
        assert not agreement.is_reached(1)
        other.communicate(b"\n")
    assert agreement.is_reached(1)
    assert not (tmp_path / f"worker-{other.pid}").exists()
