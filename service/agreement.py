"""What all workers of one host have agreed on: which models are unloaded, and whether everybody has caught up.

A small file in a folder that the workers share holds a generation and the unloaded models. A change raises the
generation; each worker applies it and leaves the generation in a file of its own, so that the one that was asked for
the change can answer when all have. Without a folder (one process) a change is agreed on at once.
"""

import fcntl
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

_STATE = "agreement.json"
_LOCK = "agreement.lock"
_WORKER = "worker-"


class State(NamedTuple):
    """A generation, and the models that are not served though they stand in the folder."""

    generation: int = 0
    unloaded: frozenset[str] = frozenset()


class Agreement:
    """One worker's view of the shared state; `folder` is None where there is but one process."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._alone = self._known = State()
        self._path = (folder or Path()) / _STATE
        self._seen = (0, 0)

    def read(self) -> State:
        """Return the state as it is now."""
        if self._folder is None:
            return self._alone
        try:
            status = os.stat(self._path)
            seen = (status.st_ino, status.st_mtime_ns)
            if seen != self._seen:  # the file is replaced as a whole, never written in place
                fields = json.loads(self._path.read_bytes())
                self._seen, self._known = seen, State(fields["generation"], frozenset(fields["unloaded"]))
        except FileNotFoundError:
            return State()
        return self._known

    def change(self, update: Callable[[frozenset[str]], frozenset[str]]) -> int:
        """Change which models are unloaded, and return the generation in which it is so."""
        if self._folder is None:
            self._alone = State(self._alone.generation + 1, update(self._alone.unloaded))
            return self._alone.generation
        with (self._folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = self.read()
            new = State(state.generation + 1, update(state.unloaded))
            self._write(_STATE, json.dumps({"generation": new.generation, "unloaded": sorted(new.unloaded)}))
        return new.generation

    def confirm(self, generation: int) -> None:
        """Say that this worker serves what a generation wants."""
        if self._folder is not None:
            self._write(f"{_WORKER}{os.getpid()}", str(generation))

    def is_reached(self, generation: int) -> bool:
        """Tell whether every living worker has confirmed a generation."""
        if self._folder is None:
            return True
        return all(_read_number(path) >= generation for path in self._workers())

    def _workers(self) -> list[Path]:
        assert self._folder is not None
        found = []
        for path in self._folder.glob(f"{_WORKER}*"):
            if _is_alive(int(path.name.removeprefix(_WORKER))):
                found.append(path)
            else:
                path.unlink(missing_ok=True)
        return found

    def _write(self, name: str, content: str) -> None:
        assert self._folder is not None
        staging = self._folder / f".{name}-{os.getpid()}"
        staging.write_text(content)
        staging.replace(self._folder / name)


def _read_number(path: Path) -> float:
    try:
        return int(path.read_text())
    except FileNotFoundError:  # its worker has died meanwhile, and another has cleared it away
        return math.inf


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
