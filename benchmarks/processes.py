"""What a tree of processes costs: CPU seconds, proportional memory, time to the first answer."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil
import requests

START_SECONDS = 60.0


@dataclass
class Started:
    """A server that answers, and how long it took to (seconds)."""

    process: "subprocess.Popen[bytes]"
    port: int
    cold_start: float

    def tree(self) -> list[psutil.Process]:
        """Return the process and all its descendants."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """Return the CPU time of all living threads of the tree so far.

        Where Linux's scheduler tells, in nanoseconds: the usual figures come in hundredths of a second, too coarse for
        a server that does nothing.
        """
        total = 0.0
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                try:
                    total += sum(_scheduled(task) for task in Path(f"/proc/{process.pid}/task").iterdir())
                except OSError:
                    times = process.cpu_times()
                    total += times.user + times.system
        return total

    def memory_mb(self) -> float:
        """Return the proportional set size of the whole tree, in MB of 10^6 bytes."""
        total = 0
        for process in self.tree():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss:"):
                        total += int(line.split()[1]) * 1024
        return total / 1e6

    def stop(self) -> None:
        """End the whole group, and anything that left it."""
        left = self.tree() if self.process.poll() is None else []
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(15)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


def start(
    command: list[str],
    environment: dict[str, str],
    path: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
    folder: Path | None = None,
    within: float = START_SECONDS,
    log: int | IO[bytes] = subprocess.DEVNULL,
) -> Started:
    """Start a server with `{port}` in its command filled in, in a folder, and wait for its first 200.

    Args:
        command: of the server.
        environment: variables beside this process's own.
        path: what to ask for.
        body: of a POST; None asks by GET.
        headers: of that request.
        folder: where the server runs; None: here.
        within: seconds until it counts as failed.
        log: where its output goes.

    Raises:
        RuntimeError: it ended, or did not answer in time.
    """
    port = _free_port()
    began = time.perf_counter()
    process = subprocess.Popen(
        [part.format(port=port) for part in command],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    started = Started(process, port, 0.0)
    while time.perf_counter() - began < within:
        with contextlib.suppress(requests.RequestException):
            url, method = f"http://127.0.0.1:{port}{path}", "GET" if body is None else "POST"
            answer = requests.request(method, url, data=body, headers=headers, timeout=5)
            if answer.status_code == requests.codes.ok:
                started.cold_start = time.perf_counter() - began
                return started
        if process.poll() is not None:
            break
        time.sleep(0.01)
    started.stop()
    raise RuntimeError(f"{' '.join(command)} did not answer 200 within {within:.0f} s")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _scheduled(task: Path) -> float:
    try:
        return int((task / "schedstat").read_text().split()[0]) / 1e9
    except ProcessLookupError:  # the thread has just ended
        return 0.0
