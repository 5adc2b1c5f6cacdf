"""Memory that graphs leave behind, and who is ended where it runs out."""

import contextlib
import ctypes
import gc
import sys
from pathlib import Path

_KEPT = {-1: 2**24, -3: 2**25}  # glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, bytes


def release_memory() -> None:
    """Free removed graphs that only reference cycles hold, and have the C library return unused memory."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def keep_freed_memory() -> None:
    """Have the C library keep up to 16 MB that are freed, for the next large request. Linux.

    By default it returns the memory of a picture at once, and to get it back, page by page, takes longer than a copy.
    """
    if sys.platform == "linux" and (change := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        for parameter, size in _KEPT.items():
            change(parameter, size)


def offer_to_oom_killer(score: int) -> None:
    """Have the system end this process rather than others when memory runs out; 1000 is first, 0 the usual. Linux."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(score))
