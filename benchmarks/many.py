"""`--cases many`: a folder of more models than fit into memory, asked for as people do: a few often, most hardly ever.

A thousand small nets of 10 kB to 2 MB, Zipf traffic, and a service with `--memory-budget`, in a memory cgroup of its
own where one can be made. Every answer is compared with the net's golden output.
"""

import argparse
import asyncio
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import uvloop

from benchmarks.clients import OK, Connection, connect
from benchmarks.many_models import Small, open_folder
from benchmarks.processes import Started, start

MODELS, QUICK_MODELS = 1000, 100
EXPONENT = 1.1  # of Zipf's law
LIMIT = 400 * 10**6  # bytes that the whole tree may use
BUDGET = 180 * 10**6  # of these, for open models
CLIENTS = 8
TOLERANCE = 1e-4  # of a probability
START_SECONDS = 300.0
WATCH_SECONDS = 0.25
_CGROUPS = Path("/sys/fs/cgroup/memory")


@dataclass
class Traffic:
    """Latencies in ms, of each model's first request and of all later ones, and what went wrong."""

    first: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)
    failed: int = 0
    wrong: int = 0


class Watch:
    """Asks again and again how much memory a server's tree has; a context manager. `peak` is in MB of 10^6 bytes."""

    def __init__(self, server: Started) -> None:
        self.peak = server.memory_mb()
        self._server = server
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(WATCH_SECONDS):
            self.peak = max(self.peak, self._server.memory_mb())


class Cgroup:
    """A limit on the memory of the processes that are started in it, where one can be made."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def enter(self, command: list[str]) -> list[str]:
        """Return a command that runs another one in the cgroup."""
        if self._path is None:
            return command
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self._path / "cgroup.procs"), *command]

    def describe(self) -> str:
        """Return what the cgroup has counted, files that are cached in memory included."""
        if self._path is None:
            return "none could be made"
        peak, failed = (int((self._path / f"memory.{name}").read_text()) for name in ("max_usage_in_bytes", "failcnt"))
        ended = (self._path / "memory.oom_control").read_text().split("oom_kill ")[-1].split()[0]
        return f"{peak / 1e6:.0f} MB with cached files; reclaimed {failed} times, {ended} processes killed"


@contextlib.contextmanager
def open_cgroup(limit: int) -> Iterator[Cgroup]:
    """Make a memory cgroup (version 1) inside this process's own, and remove it in the end."""
    path = None
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next(line.split(":", 2)[2] for line in lines if line.split(":")[1] == "memory")
        path = _CGROUPS / own.lstrip("/") / f"many-{os.getpid()}"
        path.mkdir()
        (path / "memory.limit_in_bytes").write_text(str(limit))
    yield Cgroup(path if path is not None and path.is_dir() else None)
    if path is not None:
        with contextlib.suppress(OSError):
            path.rmdir()


def measure_many(options: argparse.Namespace, progress: Callable[[str], None]) -> None:
    """Start the service on many models, send traffic, and print a table."""
    count = QUICK_MODELS if options.quick else MODELS
    root, models = open_folder(count)
    flags = ["--models-dir", str(root), "--workers", "2", "--memory-budget", str(BUDGET), "--access-log", "false"]
    command = [sys.executable, "-m", "service", "serve", "--port", "{port}", *flags]
    progress(f"many: starting with {count} models")
    with open_cgroup(LIMIT) as cgroup:
        server = start(cgroup.enter(command), {}, "/health/ready", within=START_SECONDS)
        try:
            idle = server.memory_mb()
            with Watch(server) as watch:
                progress("many: traffic")
                traffic = run_traffic(server.port, models, options.seconds)
            counted = cgroup.describe()
        finally:
            server.stop()
    progress("")
    requests, first = len(traffic.first) + len(traffic.later), np.percentile(traffic.first, (50, 99))
    later = np.percentile(traffic.later, (50, 99, 99.9))
    print(f"\n### many: {count} models, Zipf({EXPONENT}), {CLIENTS} clients, {options.seconds} s\n")
    print("| | this service | bar |\n|---|---|---|")
    for label, value, bar in (
        ("ready after, s", f"{server.cold_start:.1f}", ""),
        ("memory after the start / at most, MB", f"{idle:.0f} / {watch.peak:.0f}", f"≤ {LIMIT / 1e6:.0f}"),
        (f"cgroup of {LIMIT / 1e6:.0f} MB", counted, "none killed"),
        ("requests, to how many models", f"{requests:,}, {len(traffic.first)}", ""),
        ("failed / wrong", f"{traffic.failed} / {traffic.wrong}", "0 / 0"),
        ("first request to a model, p50 / p99 ms", f"{first[0]:.1f} / {first[1]:.1f}", "p99 ≤ 100"),
        ("later requests, p50 / p99 / p99.9 ms", " / ".join(f"{each:.1f}" for each in later), ""),
    ):
        print(f"| {label} | {value} | {bar} |")


def run_traffic(port: int, models: list[Small], seconds: float) -> Traffic:
    """Ask models, chosen by Zipf's law, over connections that each wait for their response."""
    random = np.random.default_rng(0)
    order = random.permutation(len(models))  # so that a popular model may be of any size
    shares = 1 / np.arange(1, len(models) + 1) ** EXPONENT
    chosen = iter(order[random.choice(len(models), 10_000 * int(seconds + 1), p=shares / shares.sum())].tolist())
    traffic, asked, until = Traffic(), set[int](), time.perf_counter() + seconds

    async def ask() -> None:
        connection = await connect(port)
        for number in chosen:
            if time.perf_counter() > until:
                break
            is_first = number not in asked
            asked.add(number)
            response = await connection.ask(models[number].request)
            (traffic.first if is_first else traffic.later).append(response.milliseconds)
            if response.status != OK:
                traffic.failed += 1
            elif not _is_right(connection, models[number]):
                traffic.wrong += 1
            if not connection.is_open:
                connection = await connect(port)
        connection.close()

    async def ask_all() -> None:
        await asyncio.gather(*(ask() for _ in range(CLIENTS)))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(ask_all())
    return traffic


def _is_right(connection: Connection, model: Small) -> bool:
    probabilities = json.loads(connection.body)["predictions"][0]["probabilities"]
    return bool(np.abs(np.array(probabilities) - model.expected).max() < TOLERANCE)
