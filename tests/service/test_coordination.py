"""Tests of service.registry.coordination."""

import asyncio
import errno
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from service.registry.coordination import Coordination, State, WorkerStatus
from service.registry.versions import Failures, Key


def _raise_often(folder: Path) -> None:
    coordination = Coordination(folder)
    for index in range(50):
        coordination.change(lambda unloaded, index=index: unloaded | {f"{os.getpid()}-{index}"})  # type: ignore[misc]


def test_alone_is_agreed_at_once() -> None:
    """One process needs no folder: what it changes is so."""
    coordination = Coordination(None)
    assert coordination.read_state() == State(0, frozenset())
    assert coordination.leads()
    assert coordination.change(lambda unloaded: unloaded | {"a"}) == 1
    assert coordination.read_state() == State(1, frozenset({"a"}), patient=False)
    assert not coordination.is_prepared(1)
    coordination.report(WorkerStatus(1, 0))
    assert (coordination.is_prepared(1), coordination.is_committed(1)) == (True, False)


def test_others_see_a_change(tmp_path: Path) -> None:
    """A change is read by another worker, and each raises the generation by one."""
    one, other = Coordination(tmp_path), Coordination(tmp_path)
    assert other.read_state() == State()
    assert one.change(lambda unloaded: unloaded | {"a"}) == 1
    assert other.change(lambda unloaded: unloaded | {"b"}) == 2
    assert one.read_state() == other.read_state() == State(2, frozenset({"a", "b"}), patient=False)
    assert one.change(lambda unloaded: unloaded - {"a"}, patient=True) == 3
    assert other.read_state() == State(3, frozenset({"b"}), patient=True)


def test_changes_of_many_processes_are_all_kept(tmp_path: Path) -> None:
    """Processes that change at the same time lose nothing of each other's."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_raise_often, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    state = Coordination(tmp_path).read_state()
    assert (state.generation, len(state.unloaded)) == (150, 150)


def test_every_living_worker_is_waited_for(tmp_path: Path) -> None:
    """A worker that has not come as far is waited for while it lives, and no longer."""
    coordination = Coordination(tmp_path)
    coordination.report(WorkerStatus(0, 0))
    assert not coordination.is_prepared(1)
    coordination.report(WorkerStatus(1, 0))
    assert coordination.is_prepared(1)
    assert not coordination.is_committed(1)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        left = tmp_path / f"worker-{other.pid}-0"
        shutil.copy(next(tmp_path.glob("worker-*")), left)
        coordination.report(WorkerStatus(1, 1))
        assert coordination.is_prepared(1)
        assert not coordination.is_committed(1)
        other.communicate(b"\n")
    assert coordination.is_committed(1)
    assert not left.exists()


def test_failures_of_all_workers_are_known(tmp_path: Path) -> None:
    """What failed its checks in one worker is known to the others, with the reason, until it reports again."""
    one, other = Coordination(tmp_path), Coordination(tmp_path)
    key = Key("coin", 2)
    one.report(WorkerStatus(1, 0, Failures({key: "broken"}, {})))
    other.report(WorkerStatus(1, 0, Failures({}, {key: "half there"})))
    assert one.read_failures() == other.read_failures() == Failures({key: "broken"}, {key: "half there"})
    one.report(WorkerStatus(2, 0))
    assert other.read_failures() == Failures({}, {key: "half there"})


def test_workers_are_settled_when_they_have_seen_the_same(tmp_path: Path) -> None:
    """Workers that prepared from different folders, or doubt a version, are not settled; starting ones do not count."""
    one, other, third = Coordination(tmp_path), Coordination(tmp_path), Coordination(tmp_path)
    one.report(WorkerStatus(1, 1, seen="a"))
    third.report(WorkerStatus())
    assert one.is_settled()
    other.report(WorkerStatus(1, 1, seen="b"))
    assert not one.is_settled()
    other.report(WorkerStatus(2, 2, seen="a"))
    assert one.is_settled()
    other.report(WorkerStatus(2, 2, Failures({}, {Key("coin", 2): "half there"}), "a"))
    assert not one.is_settled()


def test_one_worker_leads(tmp_path: Path) -> None:
    """One worker looks at the folder; when its process has ended, another one does."""
    code = "import sys; from pathlib import Path; from service.registry.coordination import Coordination\n"
    code += "coordination = Coordination(Path(sys.argv[1])); print(coordination.leads(), flush=True); input()"
    coordination = Coordination(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        assert not coordination.leads()
        other.communicate("\n")
    assert coordination.leads()
    assert coordination.leads()


@pytest.mark.parametrize("shared", [True, False])
def test_bell_rings_when_anybody_writes(shared: bool, tmp_path: Path) -> None:
    """Whoever changes or reports something wakes every worker, and a bell that a dead worker left is cleared away."""
    one = Coordination(tmp_path if shared else None)
    other = Coordination(tmp_path) if shared else one

    async def run() -> None:
        loop = asyncio.get_running_loop()
        heard = asyncio.Event()
        with one.listen(loop, heard.set):
            os.mkfifo(tmp_path / "bell-1-0")
            writes: list[Callable[[], object]] = [
                lambda: other.change(lambda unloaded: unloaded),
                lambda: other.report(WorkerStatus(1, 1)),
                lambda: one.report(WorkerStatus(1, 1)),
            ]
            for write in writes if shared else writes[:1]:
                write()
                await asyncio.wait_for(heard.wait(), 5)
                heard.clear()

    asyncio.run(run())
    assert list(tmp_path.glob("bell-*")) == ([] if shared else [tmp_path / "bell-1-0"])


def test_bell_that_is_being_hung_up_is_not_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that rings while another makes its bell does not take it for one that a dead worker left."""
    one, other = Coordination(tmp_path), Coordination(tmp_path)
    real, rings = os.open, iter([other])

    def open_late(path: Path, flags: int, mode: int = 0o777) -> int:
        for ringing in rings:
            ringing.report(WorkerStatus())
        return real(path, flags, mode)

    async def run() -> None:
        heard = asyncio.Event()
        monkeypatch.setattr(os, "open", open_late)
        with one.listen(asyncio.get_running_loop(), heard.set):
            other.report(WorkerStatus(1, 1))
            await asyncio.wait_for(heard.wait(), 5)

    asyncio.run(run())


def test_bell_whose_worker_ends_just_now_hurts_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that ends between the opening of its bell and the ringing does not fail the one that rings."""
    os.mkfifo(tmp_path / "bell-1-0")
    listener = os.open(tmp_path / "bell-1-0", os.O_RDWR | os.O_NONBLOCK)
    real = os.open

    def open_at_last(path: Path, flags: int, mode: int = 0o777) -> int:
        bell = real(path, flags, mode)
        if path.name.startswith("bell-"):
            os.close(listener)
        return bell

    monkeypatch.setattr(os, "open", open_at_last)
    Coordination(tmp_path).report(WorkerStatus(1, 1))


def test_bell_that_cannot_be_opened_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that may open no more files does not clear away the others' bells."""
    os.mkfifo(tmp_path / "bell-1-0")

    def open_nothing(path: Path, flags: int, mode: int = 0o777) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    coordination = Coordination(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("service.registry.coordination.os.open", open_nothing)
        coordination._ring()
    assert list(tmp_path.glob("bell-*")) == [tmp_path / "bell-1-0"]
