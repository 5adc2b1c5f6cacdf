"""Memory that graphs leave behind, and who is ended where it runs out."""

import contextlib
import ctypes
import gc
import mmap
import sys
from collections.abc import Mapping
from pathlib import Path

OVERHEAD_BYTES = 200_000  # of an open version beside its weights
FACTOR = 1.25  # memory over weights, as measured while small models are opened and closed again and again
MOST_KEPT_BYTES = 2**26  # by which a worker without requests may have grown
_KEPT = {-1: 2**24, -3: 2**25, -8: 2}  # glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, bytes, and M_ARENA_MAX
_RETURNED = {-3: 2**18}


def estimate_memory(size: int) -> int:
    """Return how many bytes of memory an open version takes whose artifact has `size` bytes."""
    return OVERHEAD_BYTES + int(FACTOR * size)


def return_large_blocks() -> None:
    """From now on, have the C library return large blocks to the system as soon as they are freed. Linux.

    By default it keeps them, between others that are used, so that `trim_memory` finds little.
    """
    _set_malloc(_RETURNED)


def trim_memory() -> None:
    """Have the C library return unused memory to the system. Linux."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


class KeptMemory:
    """What the C library keeps of a process's freed memory: much after a burst of large requests, until `trim`."""

    def __init__(self) -> None:
        self._least = _measure_memory()  # since it was returned the last time

    def trim(self) -> None:
        """Return unused memory to the system if the process has grown by more than `MOST_KEPT_BYTES`."""
        used = _measure_memory()
        self._least = min(self._least, used)
        if used > self._least + MOST_KEPT_BYTES:
            trim_memory()
            self._least = _measure_memory()


def _measure_memory() -> int:
    """Return the bytes of memory of this process that are not those of files; 0 where there is no /proc."""
    try:
        _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    except OSError:
        return 0
    return (int(resident) - int(shared)) * mmap.PAGESIZE


def release_memory() -> None:
    """Free removed graphs that only reference cycles hold, and return unused memory."""
    gc.collect()
    trim_memory()


def keep_freed_memory() -> None:
    """Have the C library keep up to 16 MB that are freed, for the next large request. Linux.

    By default it returns the memory of a picture at once, and to get it back, page by page, takes longer than a copy.
    All threads share two heaps, or what each has freed would stay with it: 17 MB after 300 reloads.
    """
    _set_malloc(_KEPT)


def _set_malloc(parameters: Mapping[int, int]) -> None:
    if sys.platform == "linux" and (change := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        for parameter, size in parameters.items():
            change(parameter, size)


def offer_to_oom_killer(score: int) -> None:
    """Have the system end this process rather than others when memory runs out; 1000 is first, 0 the usual. Linux."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(score))
