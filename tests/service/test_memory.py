"""Tests of service.model.memory."""

import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource
from service.model.memory import keep_freed_memory

def count():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        parts = [b"x" * 600_000 for _ in range(12)]
        del parts
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

count()
before = count()
keep_freed_memory()
count()
print(before, count())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is another one")
def test_large_requests_find_their_memory_again() -> None:
    """Blocks that are freed and needed again cost no page faults, where they cost one for every 4 kB before."""
    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS], check=True, capture_output=True, text=True)
    before, after = map(int, done.stdout.split())
    assert after < before / 10


MEASURE_KEPT = """
from service.model import memory

memory.keep_freed_memory()
kept = memory.KeptMemory()
before = memory._measure_memory()
parts = [b"x" * 600_000 for _ in range(400)]
last = b"x" * 600_000
del parts
after = memory._measure_memory()
kept.trim()
trimmed = memory._measure_memory()
memory.trim_memory = None  # is not called again
kept.trim()
print(after - before, trimmed - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is another one")
def test_memory_of_a_burst_is_returned_once_it_has_passed() -> None:
    """The blocks below one that is still used are returned as well, once."""
    done = subprocess.run([sys.executable, "-c", MEASURE_KEPT], check=True, capture_output=True, text=True)
    kept, left = map(int, done.stdout.split())
    assert kept > 200_000_000
    assert left < 10_000_000


COUNT_HEAPS = """
import ctypes, threading
from service.model.memory import keep_freed_memory

def work():
    held = [bytes(2000) for _ in range(100)]
    barrier.wait()

keep_freed_memory()
barrier = threading.Barrier(9)
for _ in range(8):
    threading.Thread(target=work).start()
barrier.wait()
library = ctypes.CDLL(None)
library.malloc_info(0, ctypes.c_void_p.in_dll(library, "stdout"))
library.fflush(None)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is another one")
def test_threads_share_the_heaps_of_a_worker() -> None:
    """What a thread has freed serves the others; with a heap of its own, as by default, it would stay there."""
    done = subprocess.run([sys.executable, "-c", COUNT_HEAPS], check=True, capture_output=True, text=True)
    assert done.stdout.count("<heap") <= 2
