"""Clients that live beside our environment, because their packages pin older ones than ours, or are not of Python.

`make clients` installs each into a folder of its own below `.venv`; a test whose client is not there is skipped.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.servers import ROOT

SECONDS = 120


def find_client(name: str, path: str) -> Path:
    """Return a file of a client's folder, or skip the test."""
    found = ROOT / ".venv" / name / path
    if not found.exists():
        pytest.skip(f"{name} is not installed; `make clients` installs it")
    return found


def run_script(name: str, script: str, *arguments: str) -> list[Any]:
    """Run a script in the environment of a client's package, and return the lines of JSON that it prints."""
    command = [str(find_client(name, "bin/python")), "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
