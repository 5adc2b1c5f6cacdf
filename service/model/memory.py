"""Memory that graphs leave behind, and who is ended where it runs out."""

import contextlib
import ctypes
import gc
import sys
from pathlib import Path


def release_memory() -> None:
    """Free removed graphs that only reference cycles hold, and have the C library return unused memory."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def offer_to_oom_killer(score: int) -> None:
    """Have the system end this process rather than others when memory runs out; 1000 is first, 0 the usual. Linux."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(score))
