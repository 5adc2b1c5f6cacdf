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

from service.registry.coordination import DesiredState, SharedFolder, SingleProcess, WorkerStatus, open_coordination
from service.registry.versions import FailedVersions, VersionKey


def _raise_often(folder: Path) -> None:
    coordination = SharedFolder(folder)
    for index in range(50):
        coordination.change(lambda unloaded, index=index: unloaded | {f"{os.getpid()}-{index}"})  # type: ignore[misc]


def test_single_process_needs_no_folder() -> None:
    """A change is in force at once, and nobody else is waited for."""
    coordination = SingleProcess()
    assert coordination.read_state() == DesiredState(0, frozenset())
    assert coordination.is_leader()
    assert coordination.change(lambda unloaded: unloaded | {"a"}) == 1
    assert coordination.read_state() == DesiredState(1, frozenset({"a"}), debounce=False)
    assert not coordination.is_prepared(1)
    coordination.report(WorkerStatus(1, 0))
    assert (coordination.is_prepared(1), coordination.is_committed(1)) == (True, False)


def test_others_see_a_change(tmp_path: Path) -> None:
    """A change is read by another worker, and each raises the generation by one."""
    one, other = SharedFolder(tmp_path), SharedFolder(tmp_path)
    assert other.read_state() == DesiredState()
    assert one.change(lambda unloaded: unloaded | {"a"}) == 1
    assert other.change(lambda unloaded: unloaded | {"b"}) == 2
    assert one.read_state() == other.read_state() == DesiredState(2, frozenset({"a", "b"}), debounce=False)
    assert one.change(lambda unloaded: unloaded - {"a"}, debounce=True) == 3
    assert other.read_state() == DesiredState(3, frozenset({"b"}), debounce=True)


def test_changes_of_many_processes_are_all_kept(tmp_path: Path) -> None:
    """Processes that change at the same time lose nothing of each other's."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_raise_often, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    state = SharedFolder(tmp_path).read_state()
    assert (state.generation, len(state.unloaded)) == (150, 150)


def test_every_living_worker_is_waited_for(tmp_path: Path) -> None:
    """A worker that has not come as far is waited for while it lives, and no longer."""
    coordination = SharedFolder(tmp_path)
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
    one, other = SharedFolder(tmp_path), SharedFolder(tmp_path)
    key = VersionKey("coin", 2)
    one.report(WorkerStatus(1, 0, FailedVersions({key: "broken"}, {})))
    other.report(WorkerStatus(1, 0, FailedVersions({}, {key: "half there"})))
    assert one.read_failures() == other.read_failures() == FailedVersions({key: "broken"}, {key: "half there"})
    one.report(WorkerStatus(2, 0))
    assert other.read_failures() == FailedVersions({}, {key: "half there"})


def test_workers_are_settled_when_they_have_seen_the_same(tmp_path: Path) -> None:
    """Workers that scanned different files, or have a version pending, are not settled; starting ones do not count."""
    one, other, third = SharedFolder(tmp_path), SharedFolder(tmp_path), SharedFolder(tmp_path)
    one.report(WorkerStatus(1, 1, scan_digest="a"))
    third.report(WorkerStatus())
    assert one.is_settled()
    other.report(WorkerStatus(1, 1, scan_digest="b"))
    assert not one.is_settled()
    other.report(WorkerStatus(2, 2, scan_digest="a"))
    assert one.is_settled()
    other.report(WorkerStatus(2, 2, FailedVersions({}, {VersionKey("coin", 2): "half there"}), "a"))
    assert not one.is_settled()


def test_one_worker_is_the_leader(tmp_path: Path) -> None:
    """One worker is the leader; when its process has ended, another one is."""
    code = "import sys; from pathlib import Path; from service.registry.coordination import SharedFolder\n"
    code += "coordination = SharedFolder(Path(sys.argv[1])); print(coordination.is_leader(), flush=True); input()"
    coordination = SharedFolder(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        assert not coordination.is_leader()
        other.communicate("\n")
    assert coordination.is_leader()
    assert coordination.is_leader()


@pytest.mark.parametrize("shared", [True, False])
def test_every_change_and_report_notifies(shared: bool, tmp_path: Path) -> None:
    """Every change and report wakes every worker, and the pipe of a dead worker is removed."""
    one = open_coordination(tmp_path if shared else None)
    other = SharedFolder(tmp_path) if shared else one

    async def run() -> None:
        loop = asyncio.get_running_loop()
        heard = asyncio.Event()
        with one.listen(loop, heard.set):
            os.mkfifo(tmp_path / "notify-1-0")
            writes: list[Callable[[], object]] = [
                lambda: other.change(lambda unloaded: unloaded),
                lambda: other.report(WorkerStatus(1, 1)),
                lambda: one.report(WorkerStatus(1, 1)),
            ]
            for write in writes:
                write()
                await asyncio.wait_for(heard.wait(), 5)
                heard.clear()

    asyncio.run(run())
    assert list(tmp_path.glob("notify-*")) == ([] if shared else [tmp_path / "notify-1-0"])


def test_pipe_that_is_being_made_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that notifies while another makes its pipe does not take that for a dead worker's."""
    one, other = SharedFolder(tmp_path), SharedFolder(tmp_path)
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


def test_worker_that_ends_while_it_is_notified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that ends after its pipe was opened does not fail the one that writes to it."""
    os.mkfifo(tmp_path / "notify-1-0")
    listener = os.open(tmp_path / "notify-1-0", os.O_RDWR | os.O_NONBLOCK)
    real = os.open

    def open_at_last(path: Path, flags: int, mode: int = 0o777) -> int:
        pipe = real(path, flags, mode)
        if path.name.startswith("notify-"):
            os.close(listener)
        return pipe

    monkeypatch.setattr(os, "open", open_at_last)
    SharedFolder(tmp_path).report(WorkerStatus(1, 1))


def test_pipe_that_cannot_be_opened_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that may open no more files does not remove the others' pipes."""
    os.mkfifo(tmp_path / "notify-1-0")

    def open_nothing(path: Path, flags: int, mode: int = 0o777) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    coordination = SharedFolder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("service.registry.coordination.os.open", open_nothing)
        coordination._notify()
    assert list(tmp_path.glob("notify-*")) == [tmp_path / "notify-1-0"]
