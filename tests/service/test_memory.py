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
