"""A folder in memory, as far as processes leave each other notes in one, on a disk that may be full."""

import errno
import os
from typing import Any

from tests.simulation.world import World


class Disk:
    """The files of a folder.

    Attributes:
        full: the part of writes for which there is no space.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.files: dict[str, bytes] = {}
        self.full = 0.0

    def fail(self, number: int) -> None:
        """Raise the error of that number.

        Raises:
            OSError: always.
        """
        raise OSError(number, os.strerror(number))


class File:
    """In place of `pathlib.Path`: the folder, or a file in it."""

    def __init__(self, disk: Disk, path: str = "/shared") -> None:
        self._disk, self._path = disk, path

    def __truediv__(self, name: str) -> "File":
        return File(self._disk, f"{self._path}/{name}")

    def __str__(self) -> str:
        return self._path

    __fspath__ = __str__

    def write_text(self, text: str) -> None:
        """Write all, or half of it to a disk that is full then."""
        self._disk.world.step(f"writes {self}")
        self._disk.files[self._path] = b""
        is_full = self._disk.full and self._disk.world.chance(self._disk.full)
        self._disk.files[self._path] = text.encode()[: len(text) // 2]
        self._disk.world.step(f"has written half of {self}")
        if is_full:
            self._disk.fail(errno.ENOSPC)
        self._disk.files[self._path] = text.encode()

    def read_bytes(self) -> bytes:
        """Read all."""
        self._disk.world.step(f"reads {self}")
        if self._path not in self._disk.files:
            self._disk.fail(errno.ENOENT)
        return self._disk.files[self._path]

    def read_text(self) -> str:
        """Read all."""
        return self.read_bytes().decode()

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove it."""
        self._disk.world.step(f"removes {self}")
        if self._disk.files.pop(self._path, None) is None and not missing_ok:
            self._disk.fail(errno.ENOENT)

    def replace(self, target: Any) -> None:
        """Take the place of another."""
        self._disk.world.step(f"renames {self} to {target}")
        if self._path not in self._disk.files:
            self._disk.fail(errno.ENOENT)
        self._disk.files[str(target)] = self._disk.files.pop(self._path)

    def exists(self) -> bool:
        """Tell whether it is there."""
        return self._path in self._disk.files

    def glob(self, pattern: str) -> list["File"]:
        """Return nothing: there are too few files for any to be removed."""
        del pattern
        return []
