"""`python -m tests.soak`: mixed load with kills and reloads, for minutes or an hour; nothing may be lost or grow.

After each round of load the memory, file descriptors, threads and files in the runtime folder are sampled without
traffic, of the processes that are never killed and of all together. `make soak ARGS="--seconds 3600 --rate 200"` is
the hour that docs/security.md reports.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

from tests import fakes
from tests.servers import ROOT, Server
from tests.traffic import FLAGS, Client, Killer, Models, Record, add, end_when_told

CLIENTS = 6
BAD = 0.1
WARM_SECONDS = 15.0
ROUND_SECONDS = 10.0  # of traffic between a kill and a reload
SETTLE_SECONDS = 4.0
PAUSE_SECONDS = 0.5  # between the traffic of a round and its sample
GROWTH = {"MiB": 32.0, "descriptors": 8.0, "threads": 2.0, "files": 4.0}
"""How much more the last samples may have than the first; memory a process, for fragments of the C library's heap."""
MEDIAN_OF = 5  # samples at either end


class Sample(NamedTuple):
    """What a process, or all of them, hold at some time."""

    hours: float
    MiB: float  # resident
    descriptors: int
    threads: int
    files: int  # in the runtime folder


def main() -> int:
    """Run, print figures, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="how long (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=0.0, help="requests/s (default: as many as possible)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    end_when_told()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        root, runtime = Path(folder) / "models", Path(folder) / "runtime"
        runtime.mkdir()
        shutil.copytree(ROOT / "models", root)
        fakes.write_version(root, fakes.heavy())
        models = Models(root)
        os.environ["XDG_RUNTIME_DIR"] = str(runtime)  # for the server, and for this program to find its token
        with Server(root, "--workers", str(flags.workers), *FLAGS) as server:
            return Soak(server, models, root, runtime, flags).run()


class Soak:
    """One run.

    Args:
        server: what is loaded.
        models: that it serves.
        root: their folder.
        runtime: where the server keeps its runtime folder.
        flags: of the command line.
    """

    def __init__(self, server: Server, models: Models, root: Path, runtime: Path, flags: argparse.Namespace) -> None:
        self._server = server
        self._models = models
        self._root = root
        self._runtime = runtime
        self._flags = flags
        self._chance = random.Random(flags.seed)
        self._samples: dict[str, list[Sample]] = {}
        self._wrong = self._compared = 0
        self._began = time.monotonic()

    def run(self) -> int:
        """Warm up, then load, change and sample in turn, and judge."""
        whole = Record()
        killer = Killer(self._server, self._flags.workers, self._flags.seed, spared="worker-0")
        whole = add([whole, self._load(WARM_SECONDS, 0)])
        for name in sorted(self._models.manifests):
            self._reload(name)
        time.sleep(SETTLE_SECONDS)
        self._began, turn, kills = time.monotonic(), 0, 0
        self._sample()
        while time.monotonic() < self._began + self._flags.seconds:
            turn += 1
            stop = threading.Event()
            changing = threading.Thread(target=self._change, args=(killer, stop))
            changing.start()
            whole = add([whole, self._load(ROUND_SECONDS, turn)])
            stop.set()
            changing.join()
            kills += 1
            time.sleep(PAUSE_SECONDS)
            self._sample()
            last = self._samples["all processes"][-1]
            print(f"round {turn}: sent {whole.sent}, {_tell(whole)}, {last}", flush=True)
        return self._judge(whole, kills)

    def _load(self, seconds: float, turn: int) -> Record:
        """Return what the clients saw in so many seconds of traffic, its answers compared and forgotten."""
        done = threading.Event()
        pause = CLIENTS / self._flags.rate if self._flags.rate else 0.0
        first = self._flags.seed + 100 * turn
        clients = [Client(lambda: self._server.url, self._models, first + n, BAD, done, pause) for n in range(CLIENTS)]
        for client in clients:
            client.start()
        time.sleep(seconds)
        done.set()
        for client in clients:
            client.join()
        record = add([client.record for client in clients])
        self._wrong += self._models.count_wrong(record.asked)
        self._compared += len(record.asked)
        record.asked.clear()
        return record

    def _change(self, killer: Killer, stop: threading.Event) -> None:
        """Kill a worker, and load a model again, under traffic."""
        if not stop.wait(ROUND_SECONDS / 4):
            killer.kill()
        if not stop.wait(ROUND_SECONDS / 4):
            self._reload(self._chance.choice(sorted(self._models.manifests)))

    def _reload(self, name: str) -> None:
        """Have a model loaded again: its files get a new time, so they count as changed."""
        next(iter(sorted((self._root / name).glob("*/manifest.json")))).touch()
        self._server.post(f"/v2/repository/models/{name}/load", json={}).raise_for_status()

    def _sample(self) -> None:
        """Measure the processes that live as long as the service, and all together."""
        hours = (time.monotonic() - self._began) / 3600
        files = sum(1 for _ in self._runtime.rglob("*"))
        whole: Counter[str] = Counter()
        for process in self._server.members():
            try:
                held = process.memory_info().rss / 2**20, process.num_fds(), process.num_threads()
                name = "supervisor" if process.pid == self._server.process.pid else process.name()
            except psutil.Error:
                continue
            whole.update(dict(zip(("MiB", "descriptors", "threads"), held, strict=True)))
            if name in ("supervisor", "worker-0", "engine-cpu"):
                self._samples.setdefault(name, []).append(Sample(hours, *held, files))
        together = Sample(hours, whole["MiB"], whole["descriptors"], whole["threads"], files)
        self._samples.setdefault("all processes", []).append(together)

    def _judge(self, record: Record, kills: int) -> int:
        """Print the result and return the exit code."""
        print(f"\nsent {record.sent}, {_tell(record)}, {kills} workers killed, {kills} reloads")
        print(f"{self._compared} answers compared with onnxruntime, {self._wrong} wrong, {record.hung} hung")
        print(f"{'':<16}{'':<12}{'first':>10}{'last':>10}{'slope/hour':>12}")
        problems = list(record.misjudged[:10])
        for name, samples in self._samples.items():
            processes = self._flags.workers + 2 if name == "all processes" else 1
            for field, limit in GROWTH.items():
                values = np.array([getattr(sample, field) for sample in samples], float)
                first, last = float(np.median(values[:MEDIAN_OF])), float(np.median(values[-MEDIAN_OF:]))
                slope = float(np.polyfit([sample.hours for sample in samples], values, 1)[0])
                print(f"{name:<16}{field:<12}{first:>10.1f}{last:>10.1f}{slope:>12.2f}")
                if last - first > limit * processes:
                    problems.append(f"{name}: {last - first:.1f} more {field}")
        print(*problems, sep="\n")
        is_good = not (self._wrong or record.hung or record.misjudged or problems)
        print("nothing lost, nothing grew" if is_good else "FAILED")
        return 0 if is_good else 1


def _tell(record: Record) -> str:
    answered = ", ".join(f"{count} x {status}" for status, count in sorted(record.answered.items()))
    return f"answered {answered}; closed {record.closed}, refused {record.refused_connections}, hung {record.hung}"


if __name__ == "__main__":
    sys.exit(main())
