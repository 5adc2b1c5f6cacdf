"""Processes that stop, run out of descriptors, or are ended for their memory."""

import resource
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import requests

from tests.chaos.rig import Rig, Row, SkippedError

PAUSE_SECONDS = 2.5
CGROUPS = Path("/sys/fs/cgroup")
LIMIT_BYTES = 4 * 2**20  # of memory that a worker gets from then on
LARGE = b"[" + b"[1],\n" * 300_000 + b"[1]]"


def stops(folder: Path) -> Iterator[Row]:
    """Stop each kind of process for a while, and for good."""
    with Rig(folder) as rig:
        for name in ("worker-0", "engine-cpu", "supervisor"):
            yield rig.suffer(f"{name} stopped for {PAUSE_SECONDS:g} s", partial(_stop_for_a_while, rig, name))
        for name in ("worker-0", "engine-cpu"):
            yield rig.suffer(f"{name} stopped for good", lambda name=name: rig.find(name).suspend())  # type: ignore[misc]
        yield rig.suffer(
            "checker stopped for good, opening a version", partial(_stop_checker, rig), lambda: rig.serves(2)
        )
        supervisor = rig.find("supervisor")
        supervisor.suspend()
        yield rig.suffer("supervisor stopped for good", lambda: time.sleep(PAUSE_SECONDS))
        supervisor.resume()


def _stop_for_a_while(rig: Rig, name: str) -> None:
    process = rig.find(name)
    process.suspend()
    time.sleep(PAUSE_SECONDS)
    process.resume()


def _stop_checker(rig: Rig) -> None:
    rig.publish(2)
    until = time.monotonic() + 10
    while time.monotonic() < until:
        with suppress(psutil.NoSuchProcess):
            if (checker := rig.server.checker()) is not None:
                checker.send_signal(signal.SIGSTOP)
                return


def files(folder: Path) -> Iterator[Row]:
    """Let each kind of process have no descriptor more than it has."""
    with Rig(folder) as rig:
        for name in ("worker-0", "engine-cpu", "supervisor"):
            yield rig.suffer(f"{name} without descriptors", partial(_starve, rig, name, folder))


def _starve(rig: Rig, name: str, folder: Path) -> None:
    """Let a process have no more descriptors for a while, in which others connect, publish and die."""
    process = rig.find(name)
    before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (process.num_fds(), before[1]))
    with rig.connected():
        rig.publish(2 + len(list(rig.root.glob("doubler/*"))))
        if name == "supervisor":
            rig.find("worker-1").kill()
        time.sleep(PAUSE_SECONDS)
    with suppress(ProcessLookupError):  # it has ended
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, before)


def memory(folder: Path) -> Iterator[Row]:
    """Give a worker too little memory for what it is sent, so that the system ends it."""
    group, limit = _make_group()
    try:
        with Rig(folder, "--max-request-bytes", str(2**26)) as rig:
            worker = rig.find("worker-0")

            def starve() -> None:
                limit.write_text(str(LIMIT_BYTES))
                (group / "cgroup.procs").write_text(str(worker.pid))
                until = time.monotonic() + 20
                while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE and time.monotonic() < until:
                    with suppress(requests.RequestException):
                        requests.post(
                            f"{rig.server.url}/v1/models/doubler:predict", data=b'{"instances": ' + LARGE, timeout=3
                        )

            row = rig.suffer("worker out of memory in a cgroup", starve)
            if "worker-0 ended with code -9" not in rig.server.log():
                row.problem = "the system did not end it"
            yield row
    finally:
        group.rmdir()


def _make_group() -> tuple[Path, Path]:
    """Return a new memory cgroup, of version 2 or 1, and the file for its limit.

    Raises:
        SkippedError: none can be made.
    """
    for root, file in ((CGROUPS, "memory.max"), (CGROUPS / "memory", "memory.limit_in_bytes")):
        group = root / "service-chaos"
        with suppress(OSError):
            group.mkdir()
            if (group / file).exists():
                return group, group / file
            group.rmdir()
    raise SkippedError("no memory cgroup can be made")
