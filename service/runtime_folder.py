"""A running service's private folder: the engine's socket, and the token by which the command line may change models.

Whoever can read the folder is the user who runs the service. The command looks through the same places for the folder
of the service that it is to reach, so it needs no key on the same machine, or in the same container.
"""

import contextlib
import fcntl
import ipaddress
import json
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self
from urllib.parse import urlsplit

from service.errors import StartError

logger = logging.getLogger("service")

_PREFIX = "model-service-"
_ACCESS = "access.json"
_LEFTOVER_SECONDS = 60
_WILDCARDS = ("0.0.0.0", "::")


class Access(NamedTuple):
    """How the command line reaches a service on this machine."""

    url: str
    token: str


class RuntimeFolder:
    """The folder of the service that runs in this process and its children; a context manager that removes it.

    While it exists it is locked, which tells the command line that the service lives, and systemd-tmpfiles that the
    folder is not to be cleaned away.
    """

    def __init__(self) -> None:
        """Make the folder in the first place where one can be made.

        Raises:
            StartError: there is none.
        """
        reasons = []
        _remove_leftovers()
        for place in _list_places():
            try:
                self.path = _make_folder(place)
            except OSError as error:
                reasons.append(f"{place}: {error.strerror}")
            else:
                break
        else:
            wrong = "; ".join(reasons)
            raise StartError(f"no folder can be made for sockets ({wrong}); set TMPDIR to one that can be written to")
        self._lock = _open_locked(self.path)
        self._access: Access | None = None
        self._problem = ""

    def __enter__(self) -> Self:
        """Return the folder."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def allow_command_line(self, host: str, port: int, token: str) -> None:
        """Let the command line of this user change what the service at an address serves, by a token."""
        self._access = Access(build_url(host, port), token)
        self.repair()

    def repair(self) -> None:
        """Make again what has been removed, as far as possible; called about once a second. Say once what fails."""
        try:
            if not _is_private(self.path):
                self.path.mkdir(mode=0o700)
                os.close(self._lock)
                self._lock = _open_locked(self.path)
            file = self.path / _ACCESS
            if self._access is not None and not file.exists():
                staging = file.with_suffix(".new")
                staging.touch(mode=0o600)
                staging.write_text(json.dumps(self._access))
                staging.rename(file)
            self._problem = ""
        except OSError as error:
            problem = f"{self.path} cannot be written to: {error.strerror}"
            if problem != self._problem:
                logger.error("%s; `python -m service models` and new engines need it", problem)
            self._problem = problem


def build_url(host: str, port: int) -> str:
    """Return the URL of a service that listens on an address, as seen from this machine."""
    if host in _WILDCARDS:
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def find_access(url: str) -> Access | None:
    """Return how to reach this user's service on this machine, by its URL; all loopback addresses are the same."""
    with contextlib.suppress(ValueError):  # it is no URL
        wanted = urlsplit(url)
        for access in _list_accesses():
            found = urlsplit(access.url)
            is_same = wanted.hostname == found.hostname
            is_same |= _is_loopback(wanted.hostname) and _is_loopback(found.hostname)
            if wanted.scheme == "http" and wanted.port == found.port and is_same:
                return access
    return None


def _list_folders() -> Iterator[Path]:
    return (folder for place in _list_places() for folder in place.glob(f"{_PREFIX}*"))


def _remove_leftovers() -> None:
    """Remove this user's folders of services that were killed, but not one that is about to be locked."""
    for folder in _list_folders():
        with contextlib.suppress(OSError):
            is_old = folder.lstat().st_mtime < time.time() - _LEFTOVER_SECONDS
            if is_old and _is_private(folder) and not _is_locked(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _list_accesses() -> Iterator[Access]:
    """Return those of this user's services that are running."""
    for folder in _list_folders():
        with contextlib.suppress(OSError, ValueError, TypeError):
            if _is_private(folder) and _is_locked(folder):
                yield Access(*json.loads((folder / _ACCESS).read_bytes()))


def _list_places() -> list[Path]:
    """Return where the folder may be, best first: in memory, but not in what logging out removes."""
    places = [Path(f"/run/user/{os.geteuid()}"), Path("/dev/shm")]
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        places.insert(0, Path(runtime))
    on_disk: list[Path] = []
    with contextlib.suppress(OSError):  # there is none
        on_disk.append(Path(tempfile.gettempdir()))
    places = on_disk + places if "XDG_SESSION_ID" in os.environ else places + on_disk
    return [place for place in dict.fromkeys(places) if place.is_dir()]


def _make_folder(place: Path) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
    try:
        probe = folder / "probe"
        probe.write_bytes(b"there is space")
        probe.unlink()
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _is_private(folder: Path) -> bool:
    """Tell whether a path is a folder that only this user can read."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077


def _open_locked(folder: Path) -> int:
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


def _is_locked(folder: Path) -> bool:
    """Tell whether a running service holds a folder."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _is_loopback(host: str | None) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host or "").is_loopback
    return host == "localhost"
