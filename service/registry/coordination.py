"""What all workers of one host have agreed on: which models are unloaded, and how far each worker has come.

A small file in a folder that the workers share holds a generation and the unloaded models. A change raises the
generation; each worker prepares it, waits until all have, commits it, and reports both in a file of its own, so that
all swap at one moment and the one that was asked for the change can answer when it is done. Whoever writes rings the
others' bells (named pipes), so nobody polls. Without a folder (one process) a change is agreed on at once.
"""

import asyncio
import contextlib
import errno
import fcntl
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from service.registry.versions import Failures, Key

_STATE = "coordination.json"
_LOCK = "coordination.lock"
_LEAD = "lead.lock"
_WORKER = "worker-"
_BELL = "bell-"
_numbers = itertools.count()


class State(NamedTuple):
    """A generation, the models that are not served though they stand in the folder, and how failures are taken.

    `patient`: nobody has asked for this generation; a file of the folder has changed, and others may still.
    """

    generation: int = 0
    unloaded: frozenset[str] = frozenset()
    patient: bool = True


class WorkerStatus(NamedTuple):
    """How far a worker has come, which versions have failed their checks there, and a digest of the folder it saw."""

    prepared: int = -1
    committed: int = -1
    failures: Failures = Failures({}, {})
    seen: str = ""


class Coordination:
    """One worker's view of what is shared; `folder` is None where there is but one process."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._own = f"{os.getpid()}-{next(_numbers)}"
        self._state = State()
        self._report = WorkerStatus()
        self._lead: int | None = None
        self._heard: Callable[[], None] = lambda: None

    def read_state(self) -> State:
        """Return the state as it is now."""
        if self._folder is not None:
            with contextlib.suppress(FileNotFoundError):
                fields = json.loads((self._folder / _STATE).read_bytes())  # replaced as a whole, never written in place
                self._state = State(fields["generation"], frozenset(fields["unloaded"]), fields["patient"])
        return self._state

    def change(self, update: Callable[[frozenset[str]], frozenset[str]], patient: bool = False) -> int:
        """Change which models are unloaded, and return the generation in which it is so."""
        with self._lock():
            state = self.read_state()
            self._state = State(state.generation + 1, update(state.unloaded), patient)
            generation, unloaded, _ = self._state
            if self._folder is not None:
                self._write(_STATE, {"generation": generation, "unloaded": sorted(unloaded), "patient": patient})
        self._ring()
        return generation

    def report(self, report: WorkerStatus) -> None:
        """Tell the others how far this worker has come; from the first time on, they wait for it."""
        self._report = report
        if self._folder is not None:
            fields = report._replace(failures=Failures(*map(_encode, report.failures)))  # type: ignore[arg-type]
            self._write(_WORKER + self._own, fields._asdict())
            self._ring()

    def is_prepared(self, generation: int) -> bool:
        """Tell whether every living worker has prepared a generation."""
        return all(report.prepared >= generation for report in self._reports())

    def is_committed(self, generation: int) -> bool:
        """Tell whether every living worker has committed a generation."""
        return all(report.committed >= generation for report in self._reports())

    def read_failures(self) -> Failures:
        """Return which versions have failed their checks in any worker's latest preparation."""
        refused: dict[Key, str] = {}
        doubted: dict[Key, str] = {}
        for report in self._reports():
            refused |= report.failures.refused
            doubted |= report.failures.doubted
        return Failures(refused, doubted)

    def is_settled(self) -> bool:
        """Tell whether every living worker has prepared from the same folder, and doubts nothing in it.

        Workers look a moment apart; what is published in between is new to some and unknown to others.
        """
        reports = [report for report in self._reports() if report.seen]  # others are still starting
        return len({report.seen for report in reports}) <= 1 and not any(each.failures.doubted for each in reports)

    def leads(self) -> bool:
        """Tell whether this worker is the one that looks at the models folder; when it ends, another one is."""
        if self._folder is None or self._lead is not None:
            return True
        lead = os.open(self._folder / _LEAD, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lead, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lead)
            return False
        self._lead = lead
        return True

    @contextlib.contextmanager
    def listen(self, loop: asyncio.AbstractEventLoop, heard: Callable[[], None]) -> Iterator[None]:
        """Have the event loop call `heard` whenever a worker, this one too, has written something."""
        self._heard = heard
        if self._folder is None:
            yield
            return
        path = self._folder / (_BELL + self._own)
        staging = self._folder / f".{path.name}"
        os.mkfifo(staging)
        bell = os.open(staging, os.O_RDWR | os.O_NONBLOCK)  # for writing too, or it would end with the last writer
        staging.rename(path)  # others find it only now: one that nobody has opened yet, they would clear away

        def answer() -> None:
            with contextlib.suppress(BlockingIOError):
                os.read(bell, 4096)
            heard()

        loop.add_reader(bell, answer)
        try:
            yield
        finally:
            loop.remove_reader(bell)
            path.unlink(missing_ok=True)
            os.close(bell)
            if self._lead is not None:
                os.close(self._lead)
                self._lead = None

    def _ring(self) -> None:
        if self._folder is None:
            self._heard()
            return
        for path in self._folder.glob(_BELL + "*"):
            try:
                bell = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            except OSError as error:
                if error.errno == errno.ENXIO:  # its worker has died
                    path.unlink(missing_ok=True)
                continue
            with contextlib.suppress(BlockingIOError, BrokenPipeError), open(bell, "wb", buffering=0) as file:
                file.write(b"!")

    def _reports(self) -> Iterable[WorkerStatus]:
        if self._folder is None:
            yield self._report
            return
        for path in self._folder.glob(_WORKER + "*"):
            pid = int(path.name.removeprefix(_WORKER).partition("-")[0])
            if not _is_alive(pid):
                path.unlink(missing_ok=True)
                continue
            with contextlib.suppress(FileNotFoundError):  # another worker has just cleared it away
                prepared, committed, failures, seen = json.loads(path.read_bytes()).values()
                yield WorkerStatus(prepared, committed, Failures(*map(_decode, failures)), seen)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        if self._folder is None:
            yield
            return
        with (self._folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write(self, name: str, fields: Mapping[str, object]) -> None:
        assert self._folder is not None
        staging = self._folder / f".{name}-{self._own}"
        staging.write_text(json.dumps(fields))
        staging.replace(self._folder / name)


def open_coordination(shared: Path | None) -> Coordination:
    """Return how this worker coordinates: through a folder, or alone where that is None."""
    return Coordination(shared)


def _encode(reasons: Mapping[Key, str]) -> list[tuple[str, int, str]]:
    return [(*key, reason) for key, reason in reasons.items()]


def _decode(rows: Iterable[tuple[str, int, str]]) -> dict[Key, str]:
    return {Key(name, version): reason for name, version, reason in rows}


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM  # another user's, and so not gone
    return True
