"""What is known of versions that were opened: the answer of their check, or what it did to the process that opened it.

Each process that opens versions notes in a shared folder which one it is opening. If it dies of it, its successor finds
the note, and the version is quarantined there: it is not opened again until its files change, whoever restarts. One
that was ended from outside (SIGKILL, by an operator or for too little memory) is opened again after a growing pause.
"""

import contextlib
import errno
import hashlib
import json
import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from service.errors import ModelRefusedError, ServiceError
from service.model.channel import Fields, build_error, describe_error
from service.model.crashes import CRASHES

MOST = 4096  # versions of which something is kept
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 600.0  # seconds before what was ended from outside is opened again; doubled each time


OWN_PAUSE = 5.0  # before what failed for want of files or memory of the process is opened again
_OWN_FAILURES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
logger = logging.getLogger("service")


class Openings:
    """The versions that the processes of one name have opened in turn. Without space on the disk, nothing is kept.

    Args:
        folder: that all processes share.
        name: of the process.
        seconds: that opening one version may take. It is ended by SIGALRM after that, whatever the graph does.
    """

    def __init__(self, folder: Path, name: str, seconds: float) -> None:
        self._folder = folder
        self._name = name
        self._seconds = seconds
        self._note = folder / f"{name}-opening"

    def read(self, key: str) -> Fields | None:
        """Return what is known of a version: the answer of its check, or the error that quarantines it for now."""
        known = self._read(key)
        retry_at = getattr(build_error(known["error"]), "retry_at", 0) if "error" in known else 0
        if 0 < retry_at <= time.monotonic():
            return None
        return known if known.keys() - {"ends"} else None

    def write(self, key: str, answer: Fields) -> None:
        """Keep the answer of a version's check."""
        staging = self._folder / f".{self._name}-answer"
        with contextlib.suppress(OSError):
            staging.write_text(json.dumps([key, answer]))
            staging.replace(self._path(key))

    @contextlib.contextmanager
    def opening(self, key: str) -> Iterator[None]:
        """Open a version inside: noted for a successor of this process, and within the time that it may take."""
        with contextlib.suppress(OSError):
            self._note.write_text(key)
        signal.setitimer(signal.ITIMER_REAL, self._seconds)
        try:
            yield
            if "ends" in self._read(key):  # it was something else that ended others while they opened it
                with contextlib.suppress(OSError):
                    self._path(key).unlink()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            with contextlib.suppress(OSError):
                self._note.unlink()

    def blame(self, previous_exit: int, is_alone: bool) -> None:
        """Remember how the process before this one ended, if it was opening a version then, and forget the oldest.

        Args:
            previous_exit: its exit code, negative for a signal.
            is_alone: whether a crash can have no other reason, as it can where requests run as well. Other ends may
                have another reason too, such as too little memory, so they must happen twice.
        """
        self._prune()
        try:
            key = self._note.read_text()
            self._note.unlink()
        except OSError:  # it was not
            return
        known = self._read(key)
        ends = [*known.get("ends", ()), previous_exit]
        is_its_fault = previous_exit == -signal.SIGALRM or (is_alone and -previous_exit in CRASHES)
        if is_its_fault or len(ends) > 1:
            known["error"] = describe_error(self._refuse(previous_exit, len(ends)))
        self.write(key, known | {"ends": ends})

    def _prune(self) -> None:
        """Forget what has not changed for longest: a version that is asked for again is checked again."""
        with contextlib.suppress(OSError):
            known = sorted((entry.stat().st_mtime_ns, entry) for entry in self._folder.glob(f"{self._name}-*.json"))
            for _, entry in known[:-MOST]:
                entry.unlink()

    def _refuse(self, code: int, count: int) -> ModelRefusedError:
        """Return why a version is not opened any more after so many ends, or not until some time."""
        again = "it is tried again when its files change"
        if code == -signal.SIGALRM:
            return ModelRefusedError(f"not open after {self._seconds:g} s (--open-timeout); {again}")
        end = f"killed by {signal.Signals(-code).name}" if code < 0 else f"its process ended with exit code {code}"
        if code >= 0 or -code in CRASHES:
            return ModelRefusedError(f"{end} while opening; {again}")
        pause = min(FIRST_PAUSE * 2 ** max(0, count - 2), LONGEST_PAUSE)
        error = ModelRefusedError(f"{end} while opening; it is tried again in {pause:g} s, or when its files change")
        error.retry_at = time.monotonic() + pause
        return error

    def _read(self, key: str) -> Fields:
        known: Fields
        try:
            kept, known = json.loads(self._path(key).read_bytes())
        except (OSError, ValueError):  # nothing is
            return {}
        return known if kept == key else {}

    def _path(self, key: str) -> Path:
        """Return a file for each version: what is known of its former files is overwritten."""
        version = key.rpartition("/")[0] or key
        return self._folder / f"{self._name}-{hashlib.sha256(version.encode()).hexdigest()[:32]}.json"


def build_refusal(error: Exception, name: str, version: int) -> ServiceError:
    """Return why a version is refused for what was raised while it was opened, and log what nobody expected.

    Where the process has too many open files or too little memory, that is not the version's fault, and it is tried
    again in a moment.
    """
    refusal = error if isinstance(error, ServiceError) else None
    if refusal is None:
        logger.error("model %s version %d could not be opened", name, version, exc_info=error)
        refusal = ModelRefusedError(f"it could not be opened ({type(error).__name__}); see the log")
    cause: BaseException | None = error
    while isinstance(refusal, ModelRefusedError) and cause is not None:
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno in _OWN_FAILURES):
            refusal.retry_at = time.monotonic() + OWN_PAUSE
        cause = cause.__cause__
    return refusal


def is_quarantined(known: Fields) -> bool:
    """Tell whether a version ended the process that opened it, so that it must not be opened again."""
    return "ends" in known and "error" in known
