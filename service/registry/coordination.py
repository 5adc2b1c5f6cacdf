"""Coordination between the workers of one host: which models are unloaded, and how far each worker has come.

Every change raises the generation of the desired state. A worker prepares a generation, waits until all workers have
prepared it, commits it, and reports both steps. So all workers swap versions at the same moment, and the worker that
was asked for a change can answer once it is in force everywhere. Every change and every report notifies all workers.

Several workers share memory that their parent maps before it forks them, and a pipe for each, which wakes it. There is
no file that could be removed, or fail on a full disk; what a worker leaves when it dies is its successor's.
"""

import asyncio
import contextlib
import fcntl
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from service.registry.record import Record
from service.registry.versions import NO_FAILURES, FailedVersions, VersionKey

Update = Callable[[frozenset[str]], frozenset[str]]


class DesiredState(NamedTuple):
    """What every worker is to serve: all that is in the models folder, except the unloaded models.

    `debounce` is true where a scan found changed files, which may still be being copied; false where a caller asked.
    """

    generation: int = 0
    unloaded: frozenset[str] = frozenset()
    debounce: bool = True


class WorkerStatus(NamedTuple):
    """The generations that a worker has prepared and committed; what failed there, and a digest of its folder scan."""

    prepared: int = -1
    committed: int = -1
    failed: FailedVersions = NO_FAILURES
    scan_digest: str = ""


class Coordination(ABC):
    """One worker's view of what the workers of a host share."""

    @abstractmethod
    def read_state(self) -> DesiredState:
        """Return the desired state as it is now."""

    @abstractmethod
    def change(self, update: Update, debounce: bool = False) -> int:
        """Change which models are unloaded, notify every worker, and return the new generation."""

    @abstractmethod
    def report(self, status: WorkerStatus) -> None:
        """Publish how far this worker has come, and notify every worker; from its first report on, the others wait."""

    @abstractmethod
    def read_statuses(self) -> Iterable[WorkerStatus]:
        """Return what every living worker has reported."""

    @abstractmethod
    def is_leader(self) -> bool:
        """Tell whether this worker is the one that scans the models folder and logs; when it ends, another one is."""

    @abstractmethod
    def listen(
        self, loop: asyncio.AbstractEventLoop, on_notify: Callable[[], None]
    ) -> contextlib.AbstractContextManager[None]:
        """Have the event loop call `on_notify` after every change and report, this worker's own too."""

    def is_prepared(self, generation: int) -> bool:
        """Tell whether every living worker has prepared a generation."""
        return all(status.prepared >= generation for status in self.read_statuses())

    def is_committed(self, generation: int) -> bool:
        """Tell whether every living worker has committed a generation."""
        return all(status.committed >= generation for status in self.read_statuses())

    def read_failures(self) -> FailedVersions:
        """Return the versions that failed in any worker's latest preparation."""
        refused: dict[VersionKey, str] = {}
        pending: dict[VersionKey, str] = {}
        for status in self.read_statuses():
            refused |= status.failed.refused
            pending |= status.failed.pending
        return FailedVersions(refused, pending)

    def is_settled(self) -> bool:
        """Tell whether all workers have prepared from the same files, and none has a version pending.

        Workers scan the folder at slightly different moments, so a version published in between is new to some only.
        """
        statuses = [status for status in self.read_statuses() if status.scan_digest]  # the others are still starting
        digests = {status.scan_digest for status in statuses}
        return len(digests) <= 1 and not any(status.failed.pending for status in statuses)


class SingleProcess(Coordination):
    """For a process without other workers."""

    def __init__(self) -> None:
        self._state = DesiredState()
        self._status = WorkerStatus()
        self._on_notify: Callable[[], None] = lambda: None

    def read_state(self) -> DesiredState:
        """Return the desired state."""
        return self._state

    def change(self, update: Update, debounce: bool = False) -> int:
        """Change the desired state and return its generation."""
        self._state = DesiredState(self._state.generation + 1, update(self._state.unloaded), debounce)
        self._on_notify()
        return self._state.generation

    def report(self, status: WorkerStatus) -> None:
        """Keep the status."""
        self._status = status
        self._on_notify()

    def read_statuses(self) -> Iterable[WorkerStatus]:
        """Return the status reported last."""
        return [self._status]

    def is_leader(self) -> bool:
        """Return true."""
        return True

    @contextlib.contextmanager
    def listen(self, loop: asyncio.AbstractEventLoop, on_notify: Callable[[], None]) -> Iterator[None]:
        """Call `on_notify` directly."""
        del loop
        self._on_notify = on_notify
        yield


class WorkerGroup:
    """What the workers of one host share; made by their parent before it forks them.

    Args:
        count: of workers.
    """

    def __init__(self, count: int) -> None:
        self.state, self.leader = Record(), Record()
        self.statuses = [Record() for _ in range(count)]
        self.pipes = [os.pipe() for _ in range(count)]
        for end in (end for pipe in self.pipes for end in pipe):
            os.set_blocking(end, False)
        self._lock = _open_unnamed_file()

    def join(self, number: int) -> "GroupMember":
        """Return the coordination of one worker, called in its own process; `number` counts from 0."""
        return GroupMember(self, number)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from changing the state or the leader; the system unlocks it when its holder dies."""
        fcntl.lockf(self._lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN)

    def notify(self) -> None:
        """Wake every worker."""
        for _, writer in self.pipes:
            with contextlib.suppress(BlockingIOError):  # it is full, so its worker will wake anyway
                os.write(writer, b"!")


class GroupMember(Coordination):
    """For one of several workers."""

    def __init__(self, group: WorkerGroup, number: int) -> None:
        self._group = group
        self._number = number
        self._pid = os.getpid()

    def read_state(self) -> DesiredState:
        """Read the desired state."""
        fields = self._group.state.read()
        if fields is None:  # nothing has been changed yet
            return DesiredState()
        return DesiredState(fields["generation"], frozenset(fields["unloaded"]), fields["debounce"])

    def change(self, update: Update, debounce: bool = False) -> int:
        """Replace the state, which changes of other workers wait for, and notify every worker."""
        with self._group.lock():
            state = self.read_state()
            generation, unloaded = state.generation + 1, sorted(update(state.unloaded))
            self._group.state.write({"generation": generation, "unloaded": unloaded, "debounce": debounce})
        self._group.notify()
        return generation

    def report(self, status: WorkerStatus) -> None:
        """Replace this worker's status and notify every worker."""
        record = self._group.statuses[self._number]
        try:
            record.write({"pid": self._pid} | _encode_status(status))
        except OverflowError:  # the others learn what failed here by failing themselves
            record.write({"pid": self._pid} | _encode_status(status._replace(failed=NO_FAILURES)))
        self._group.notify()

    def read_statuses(self) -> Iterable[WorkerStatus]:
        """Read the statuses of the living workers."""
        for record in self._group.statuses:
            fields = record.read()
            if fields is not None and _is_alive(fields.pop("pid")):
                yield _decode_status(fields)

    def is_leader(self) -> bool:
        """Become the leader if there is none that lives."""
        me = [self._pid, self._number]
        if (leader := self._group.leader.read()) and (leader == me or _is_alive(leader[0])):
            return bool(leader == me)
        with self._group.lock():
            leader = self._group.leader.read()
            if not leader or not _is_alive(leader[0]):
                self._group.leader.write(me)
        return bool(self._group.leader.read() == me)

    @contextlib.contextmanager
    def listen(self, loop: asyncio.AbstractEventLoop, on_notify: Callable[[], None]) -> Iterator[None]:
        """Read this worker's pipe; a worker that stops listening gives up its leadership."""
        pipe = self._group.pipes[self._number][0]

        def read() -> None:
            with contextlib.suppress(BlockingIOError):
                os.read(pipe, 65536)
            on_notify()

        loop.add_reader(pipe, read)
        try:
            yield
        finally:
            loop.remove_reader(pipe)
            with self._group.lock():
                if self._group.leader.read() == [self._pid, self._number]:
                    self._group.leader.write([])


def _open_unnamed_file() -> int:
    """Return a file without a name, in memory where the system can, to lock."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("model-service")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _encode_status(status: WorkerStatus) -> dict[str, object]:
    refused, pending = ([(*key, reason) for key, reason in reasons.items()] for reasons in status.failed)
    return status._asdict() | {"failed": {"refused": refused, "pending": pending}}


def _decode_status(fields: dict[str, Any]) -> WorkerStatus:
    rows = fields["failed"]["refused"], fields["failed"]["pending"]
    failed = FailedVersions(*({VersionKey(name, version): reason for name, version, reason in each} for each in rows))
    return WorkerStatus(**fields | {"failed": failed})


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
