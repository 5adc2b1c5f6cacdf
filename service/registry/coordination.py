"""Coordination between the workers of one host: which models are unloaded, and how far each worker has come.

Every change raises the generation of the desired state. A worker prepares a generation, waits until all workers have
prepared it, commits it, and reports both steps. So all workers swap versions at the same moment, and the worker that
was asked for a change can answer once it is in force everywhere. Every change and every report notifies all workers.

Several workers share a folder, with these files:

    state.json          the desired state, replaced as a whole under state.lock
    worker-PID-N        the status that a worker has reported
    notify-PID-N        a named pipe; a byte written to it wakes its worker
    leader.lock         held by the worker that scans the models folder
"""

import asyncio
import contextlib
import errno
import fcntl
import itertools
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from service.registry.versions import NO_FAILURES, FailedVersions, VersionKey

Update = Callable[[frozenset[str]], frozenset[str]]
_STATE = "state.json"
_STATE_LOCK = "state.lock"
_LEADER_LOCK = "leader.lock"
_STATUS = "worker-"
_PIPE = "notify-"
_numbers = itertools.count()


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


class SharedFolder(Coordination):
    """For one of several workers that share a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._worker = f"{os.getpid()}-{next(_numbers)}"
        self._leader_lock: int | None = None

    def read_state(self) -> DesiredState:
        """Read the desired state."""
        try:
            fields = json.loads((self._folder / _STATE).read_bytes())
        except FileNotFoundError:  # nothing has been changed yet
            return DesiredState()
        return DesiredState(fields["generation"], frozenset(fields["unloaded"]), fields["debounce"])

    def change(self, update: Update, debounce: bool = False) -> int:
        """Replace the state file, which changes of other workers wait for, and notify every worker."""
        with (self._folder / _STATE_LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = self.read_state()
            generation, unloaded = state.generation + 1, sorted(update(state.unloaded))
            self._write(_STATE, {"generation": generation, "unloaded": unloaded, "debounce": debounce})
        self._notify()
        return generation

    def report(self, status: WorkerStatus) -> None:
        """Replace this worker's status file and notify every worker."""
        self._write(_STATUS + self._worker, _encode_status(status))
        self._notify()

    def read_statuses(self) -> Iterable[WorkerStatus]:
        """Read the status files of the living workers, and remove those of dead ones."""
        for path in self._folder.glob(_STATUS + "*"):
            if not _is_alive(int(path.name.removeprefix(_STATUS).partition("-")[0])):
                path.unlink(missing_ok=True)
                continue
            with contextlib.suppress(FileNotFoundError):  # another worker has just removed it
                yield _decode_status(json.loads(path.read_bytes()))

    def is_leader(self) -> bool:
        """Take the leader lock if it is free; the system releases it when its worker ends."""
        if self._leader_lock is not None:
            return True
        lock = os.open(self._folder / _LEADER_LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        self._leader_lock = lock
        return True

    @contextlib.contextmanager
    def listen(self, loop: asyncio.AbstractEventLoop, on_notify: Callable[[], None]) -> Iterator[None]:
        """Read this worker's notification pipe; a worker that stops listening gives up its leadership."""
        path = self._folder / (_PIPE + self._worker)
        staging = self._folder / f".{path.name}"
        os.mkfifo(staging)
        pipe = os.open(staging, os.O_RDWR | os.O_NONBLOCK)  # also for writing: else it would end with its last writer
        staging.rename(path)  # only now: others remove a pipe that nobody has open

        def read() -> None:
            with contextlib.suppress(BlockingIOError):
                os.read(pipe, 4096)
            on_notify()

        loop.add_reader(pipe, read)
        try:
            yield
        finally:
            loop.remove_reader(pipe)
            path.unlink(missing_ok=True)
            os.close(pipe)
            if self._leader_lock is not None:
                os.close(self._leader_lock)
                self._leader_lock = None

    def _notify(self) -> None:
        for path in self._folder.glob(_PIPE + "*"):
            try:
                pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nobody has it open: its worker has died
                    path.unlink(missing_ok=True)
                continue
            # A full pipe wakes its worker anyway; a broken one is of a worker that has just ended.
            with contextlib.suppress(BlockingIOError, BrokenPipeError), open(pipe, "wb", buffering=0) as file:
                file.write(b"!")

    def _write(self, name: str, fields: Mapping[str, object]) -> None:
        staging = self._folder / f".{name}-{self._worker}"
        staging.write_text(json.dumps(fields))
        staging.replace(self._folder / name)


def open_coordination(shared: Path | None) -> Coordination:
    """Return the coordination of one worker.

    Args:
        shared: the folder that all workers of this host share; None where there is one process only.
    """
    return SingleProcess() if shared is None else SharedFolder(shared)


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
    except OSError as error:
        return error.errno == errno.EPERM  # it belongs to another user
    return True
