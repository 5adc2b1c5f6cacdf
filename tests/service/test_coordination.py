"""Tests of service.registry.coordination and service.registry.record."""

import asyncio
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import pytest

from service.registry.coordination import Coordination, DesiredState, SingleProcess, WorkerGroup, WorkerStatus
from service.registry.record import Record
from service.registry.versions import FailedVersions, VersionKey
from tests.wire import SECONDS

_fork = multiprocessing.get_context("fork")


@pytest.fixture
def group() -> WorkerGroup:
    """A group of three workers; here they are all in one process, but for those that a test forks."""
    return WorkerGroup(3)


def run_forked(*targets: Callable[[], object]) -> None:
    """Run functions at the same time, each in a process of its own; all must end."""
    processes = [_fork.Process(target=target) for target in targets]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    assert set(codes) == {0}


def test_single_process_needs_no_group() -> None:
    """A change is in force at once, and nobody else is waited for."""
    coordination = SingleProcess()
    assert coordination.read_state() == DesiredState(0, frozenset())
    assert coordination.is_leader()
    assert coordination.change(lambda unloaded: unloaded | {"a"}) == 1
    assert coordination.read_state() == DesiredState(1, frozenset({"a"}), debounce=False)
    assert not coordination.is_prepared(1)
    coordination.report(WorkerStatus(1, 0))
    assert (coordination.is_prepared(1), coordination.is_committed(1)) == (True, False)


def test_others_see_a_change(group: WorkerGroup) -> None:
    """A change is read by another worker, and each raises the generation by one."""
    one, other = group.join(0), group.join(1)
    assert other.read_state() == DesiredState()
    assert one.change(lambda unloaded: unloaded | {"a"}) == 1
    assert other.change(lambda unloaded: unloaded | {"b"}) == 2
    assert one.read_state() == other.read_state() == DesiredState(2, frozenset({"a", "b"}), debounce=False)
    assert one.change(lambda unloaded: unloaded - {"a"}, debounce=True) == 3
    assert other.read_state() == DesiredState(3, frozenset({"b"}), debounce=True)


def test_changes_of_many_processes_are_all_kept(group: WorkerGroup) -> None:
    """Processes that change at the same time lose nothing of each other's."""

    def change_often() -> None:
        coordination = group.join(0)
        for index in range(50):

            def add(unloaded: frozenset[str], name: str = f"{os.getpid()}-{index}") -> frozenset[str]:
                time.sleep(0.001)  # another would read the same state now, if it could
                return unloaded | {name}

            coordination.change(add)

    run_forked(*[change_often] * 3)
    state = group.join(0).read_state()
    assert (state.generation, len(state.unloaded)) == (150, 150)


def test_process_that_has_changed_something_keeps_nobody_out(group: WorkerGroup) -> None:
    """It goes on living, and so does one that became the leader or stopped listening; others can change then."""

    async def take_part() -> None:
        member = group.join(0)
        with member.listen(asyncio.get_running_loop(), lambda: None):
            assert member.is_leader()
            assert member.change(lambda unloaded: unloaded) == 1

    asyncio.run(take_part())
    run_forked(lambda: group.join(1).change(lambda unloaded: unloaded | {"a"}), group.join(2).is_leader)
    assert group.join(0).read_state() == DesiredState(2, frozenset({"a"}), debounce=False)


def test_who_leads_is_known_while_somebody_is_stopped_in_a_change(group: WorkerGroup) -> None:
    """Predictions go on in a worker that only looks whether it is the leader, whoever holds the lock."""
    leader, other = group.join(0), group.join(1)
    assert leader.is_leader()
    with group.lock():
        run_forked(lambda: sys.exit(other.is_leader() or not leader.is_leader()))


def test_lock_is_a_temporary_file_where_there_are_none_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS, changes of several processes are all kept, too, and the file has no name that could be removed."""
    monkeypatch.delattr(os, "memfd_create", raising=False)
    group = WorkerGroup(2)
    run_forked(*[lambda: group.join(0).change(lambda unloaded: unloaded)] * 3)
    assert group.join(0).read_state().generation == 3
    assert os.fstat(group._lock).st_nlink == 0


def test_no_folder_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no file can be made at all, as on a full disk, workers coordinate as ever."""

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    if not hasattr(os, "memfd_create"):
        pytest.skip("without files in memory, one is made at the start")
    with monkeypatch.context() as patch:
        for owner, name in ((os, "open"), (os, "mkdir"), (tempfile, "mkdtemp"), ("builtins", "open")):
            patch.setattr(owner, name, fail) if not isinstance(owner, str) else patch.setattr(f"{owner}.{name}", fail)
        group = WorkerGroup(2)
        one, other = group.join(0), group.join(1)
        one.report(WorkerStatus(0, 0))
        assert other.change(lambda unloaded: unloaded | {"a"}) == 1
        assert other.is_leader()
        assert one.read_state().unloaded == {"a"}
        assert not other.is_prepared(1)


def test_every_living_worker_is_waited_for(group: WorkerGroup) -> None:
    """A worker that has not come as far is waited for while it lives, and no longer."""
    coordination, left = group.join(0), group.join(1)
    coordination.report(WorkerStatus(0, 0))
    assert not coordination.is_prepared(1)
    coordination.report(WorkerStatus(1, 0))
    assert coordination.is_prepared(1)
    assert not coordination.is_committed(1)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        left._pid = other.pid
        left.report(WorkerStatus(1, 0))
        coordination.report(WorkerStatus(1, 1))
        assert coordination.is_prepared(1)
        assert not coordination.is_committed(1)
        other.communicate(b"\n")
    assert coordination.is_committed(1)
    assert other.returncode == 0  # nobody has ended it


def test_failures_of_all_workers_are_known(group: WorkerGroup) -> None:
    """What failed its checks in one worker is known to the others, with the reason, until it reports again."""
    one, other = group.join(0), group.join(1)
    key = VersionKey("coin", 2)
    one.report(WorkerStatus(1, 0, FailedVersions({key: "broken"}, {})))
    other.report(WorkerStatus(1, 0, FailedVersions({}, {key: "half there"})))
    assert one.read_failures() == other.read_failures() == FailedVersions({key: "broken"}, {key: "half there"})
    one.report(WorkerStatus(2, 0))
    assert other.read_failures() == FailedVersions({}, {key: "half there"})


def test_more_failures_than_fit_are_left_out(group: WorkerGroup) -> None:
    """A worker whose failures take too much memory reports the rest."""
    group.statuses[0] = Record(1024)
    one, other = group.join(0), group.join(1)
    one.report(WorkerStatus(1, 0, FailedVersions({VersionKey("coin", 2): "x" * 1000}, {})))
    assert list(other.read_statuses()) == [WorkerStatus(1, 0)]


def test_workers_are_settled_when_they_have_seen_the_same(group: WorkerGroup) -> None:
    """Workers that scanned different files, or have a version pending, are not settled; starting ones do not count."""
    one, other, third = (group.join(number) for number in range(3))
    one.report(WorkerStatus(1, 1, scan_digest="a"))
    third.report(WorkerStatus())
    assert one.is_settled()
    other.report(WorkerStatus(1, 1, scan_digest="b"))
    assert not one.is_settled()
    other.report(WorkerStatus(2, 2, scan_digest="a"))
    assert one.is_settled()
    other.report(WorkerStatus(2, 2, FailedVersions({}, {VersionKey("coin", 2): "half there"}), "a"))
    assert not one.is_settled()


def test_one_worker_is_the_leader(group: WorkerGroup) -> None:
    """One worker is the leader; when its process has ended, another one is."""
    coordination = group.join(0)
    left, right = multiprocessing.Pipe()

    def lead() -> None:
        right.send(group.join(1).is_leader())
        right.recv()

    other = _fork.Process(target=lead)
    other.start()
    assert left.recv()
    assert not coordination.is_leader()
    left.send(None)
    other.join()
    assert coordination.is_leader()
    assert coordination.is_leader()
    assert not group.join(2).is_leader()


@pytest.mark.parametrize("shared", [True, False])
def test_every_change_and_report_notifies(shared: bool, group: WorkerGroup) -> None:
    """Every change and report wakes every worker, also those that woke before."""
    one: Coordination = group.join(0) if shared else SingleProcess()
    other = group.join(1) if shared else one

    async def run() -> None:
        heard = asyncio.Event()
        with one.listen(asyncio.get_running_loop(), heard.set):
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


def test_worker_that_does_not_listen_holds_nobody_up(group: WorkerGroup) -> None:
    """A pipe that nobody reads fills up, and the others go on; whoever listens to it next wakes."""
    coordination = group.join(0)
    for _ in range(70_000):
        group.notify()

    async def run() -> None:
        heard = asyncio.Event()
        with coordination.listen(asyncio.get_running_loop(), heard.set):
            await asyncio.wait_for(heard.wait(), 5)

    asyncio.run(run())


def test_worker_that_stops_listening_leads_no_more_and_hears_nothing(group: WorkerGroup) -> None:
    """Then another worker of the same process may lead, and one that did not lead takes nothing from it."""
    one, other, third = (group.join(number) for number in range(3))
    heard: list[str] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        with one.listen(loop, lambda: heard.append("one")):
            assert one.is_leader()
            assert not other.is_leader()
        assert other.is_leader()
        with third.listen(loop, lambda: heard.append("third")):
            group.notify()
            await asyncio.sleep(0)
            while not heard:
                await asyncio.sleep(0.001)
        assert not one.is_leader()

    asyncio.run(run())
    assert set(heard) == {"third"}
    assert other.is_leader()


def test_record_keeps_its_value_when_a_writer_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that was written by half, or does not fit, does not replace the one before."""
    record = Record(1024)
    assert record.read() is None
    record.write({"a": 1})
    with pytest.raises(OverflowError):
        record.write("x" * 1024)
    assert record.read() == {"a": 1}
    written = record._written[0]
    record.write({"b": [2] * 100})
    record._written[0] = written  # as if the writer had been killed before its last step
    assert record.read() == {"a": 1}


def test_record_is_never_torn() -> None:
    """While one process writes, another reads whole values only."""
    record = Record(2**16)
    record.write([0] * 100)

    def write() -> None:
        for number in range(3000):
            record.write([number] * (100 + number % 1000))

    writer = _fork.Process(target=write)
    writer.start()
    reads = 0
    while writer.is_alive():
        value = record.read()
        assert len(set(value)) == 1
        assert len(value) == 100 + value[0] % 1000
        reads += 1
    writer.join()
    assert reads
    assert record.read()[0] == 2999
