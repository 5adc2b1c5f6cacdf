"""What workers share by the operating system: pipes, locks, processes' ids and memory, with faults."""

import contextlib
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from service.registry.record import Record
from tests.simulation.world import Condition, Process, World

RECORD_BYTES = 2**14


class Pipe:
    """A pipe that wakes an event loop; some of what is written to it is lost, if so wished."""

    def __init__(self) -> None:
        self.data = b""
        self.wake: Callable[[], None] | None = None


class System:
    """In place of `os` and `fcntl` in the modules that coordinate workers.

    Attributes:
        loss: the part of writes to pipes that is lost.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.loss = 0.0
        self._pipes: dict[int, Pipe] = {}
        self._numbers = itertools.count(10)
        self._lock_holder: Process | None = None
        self._unlocked = Condition(world)
        world.system = self
        self.os = SimpleNamespace(
            pipe=self.pipe,
            set_blocking=lambda *_: None,
            read=self.read,
            write=self.write,
            getpid=lambda: world.current.process.pid if world.current else 1,
            kill=self.kill,
            memfd_create=lambda _: 3,
        )
        self.fcntl = SimpleNamespace(lockf=self.lock, LOCK_EX=2, LOCK_UN=8)

    def pipe(self) -> tuple[int, int]:
        """Return a pipe, both of whose ends have one number."""
        number = next(self._numbers)
        self._pipes[number] = Pipe()
        return number, number

    def write(self, number: int, data: bytes) -> int:
        """Write to a pipe."""
        pipe = self._pipes[number]
        if self.loss and self.world.chance(self.loss):
            return len(data)
        pipe.data += data
        if pipe.wake is not None:
            pipe.wake()
        return len(data)

    def read(self, number: int, count: int) -> bytes:
        """Read what is in a pipe.

        Raises:
            BlockingIOError: nothing is.
        """
        pipe = self._pipes[number]
        data, pipe.data = pipe.data[:count], pipe.data[count:]
        if not data:
            raise BlockingIOError
        return data

    def watch(self, number: int, wake: Callable[[], None] | None) -> None:
        """Call back when there is something to read; for `add_reader`."""
        self._pipes[number].wake = wake
        if wake is not None and self._pipes[number].data:
            wake()

    def kill(self, pid: int, number: int) -> None:
        """Tell whether a process lives.

        Raises:
            ProcessLookupError: it does not.
        """
        del number
        if pid not in self.world.processes or not self.world.processes[pid].alive:
            raise ProcessLookupError(pid)

    def lock(self, number: int, how: int) -> None:
        """Lock or unlock the one file that is locked."""
        del number
        assert self.world.current is not None
        process = self.world.current.process
        if how == self.fcntl.LOCK_UN:
            self._unlock(process)
            return
        self.world.step("locks")
        while self._lock_holder not in (None, process):
            self._unlocked.wait()
        self._lock_holder = process
        process.at_end.append(lambda: self._unlock(process))

    def _unlock(self, process: Process) -> None:
        if self._lock_holder is process:
            self._lock_holder = None
            self._unlocked.notify_all()


class SharedRecord(Record):
    """A record whose writer may crash, or be overtaken, between any two accesses to its memory."""

    def __init__(self, world: World) -> None:
        super().__init__(RECORD_BYTES)
        self._written: Any = Stepped(world, self._written, "number of values")
        self._memory: Any = Stepped(world, self._memory, "value")

    def free(self) -> None:
        """Give the memory back."""
        self._written.target.release()
        self._memory.target.close()


class Stepped:
    """Memory, every access to which is a step of the world."""

    def __init__(self, world: World, target: Any, name: str) -> None:
        self.target, self._world, self._name = target, world, name

    def __getitem__(self, index: Any) -> Any:
        value = self.target[index]
        self._world.step(f"reads a {self._name}")
        return value

    def __setitem__(self, index: Any, value: Any) -> None:
        self._world.step(f"writes a {self._name}")
        if isinstance(index, slice):  # not at once
            half = len(value) // 2
            self.target[index.start : index.start + half] = value[:half]
            self._world.step(f"has written half a {self._name}")
        self.target[index] = value


class Lengths:
    """In place of the record's `struct.Struct`, which can pack into memory only."""

    def __init__(self, lengths: Any) -> None:
        self._lengths = lengths
        self.size = lengths.size

    def pack_into(self, memory: Stepped, place: int, length: int) -> None:
        """Write a length."""
        self._lengths.pack_into(memory.target, place, length)

    def unpack_from(self, memory: Stepped, place: int) -> Any:
        """Read a length."""
        return self._lengths.unpack_from(memory.target, place)


def close_record(record: SharedRecord) -> None:
    """Free a record when the world ends, even if somebody still looks at it."""
    with contextlib.suppress(BufferError):
        record.free()
