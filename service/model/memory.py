"""Memory that graphs leave behind."""

import ctypes
import gc
import sys


def release_memory() -> None:
    """Free removed graphs that only reference cycles hold, and have the C library return unused memory."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
