"""`python -m tests.soak`: minutes of mixed load with kills and reloads; nothing may be lost, nothing may grow.

Memory and file descriptors of all processes are measured when the service is warm and again at the end, both times
without traffic. Memory may grow by `GROWTH_BYTES` a process (what fragments of the C library's heap come to), file
descriptors by none but those of connections that are being closed.
"""

import argparse
import random
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.servers import ROOT, Server
from tests.traffic import FLAGS, Client, Killer, Models, Record, add, end_when_told, measure

CLIENTS = 6
BAD = 0.1
WARM_SECONDS = 15.0
ROUND_SECONDS = 10.0  # of traffic between a kill and a reload
SETTLE_SECONDS = 4.0
GROWTH_BYTES = 32 * 2**20
MORE_FILES = 4


def main() -> int:
    """Run, print figures, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="how long (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    end_when_told()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        root = Path(folder) / "models"
        shutil.copytree(ROOT / "models", root)
        models = Models(root)
        with Server(root, "--workers", str(flags.workers), *FLAGS) as server:
            return soak(server, models, flags.seconds, flags.workers, flags.seed)


def soak(server: Server, models: Models, seconds: float, workers: int, seed: int) -> int:
    """Warm up, measure, load, measure again, and judge."""
    killer, chance = Killer(server, workers, seed), random.Random(seed)
    whole = [load(server, models, WARM_SECONDS, seed)]
    reload(server, chance.choice(sorted(models.manifests)))
    time.sleep(SETTLE_SECONDS)
    memory, files = measure(server)
    until, turn = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        turn += 1
        stop = threading.Event()
        changing = threading.Thread(target=change, args=(server, killer, chance, sorted(models.manifests), stop))
        changing.start()
        whole.append(load(server, models, ROUND_SECONDS, seed + turn))
        stop.set()
        changing.join()
        show(turn, whole[-1], server)
    time.sleep(SETTLE_SECONDS)
    memory_now, files_now = measure(server)
    return judge(add(whole), models, (memory, memory_now), (files, files_now), workers)


def load(server: Server, models: Models, seconds: float, seed: int) -> Record:
    """Return what the clients saw in so many seconds of traffic."""
    done = threading.Event()
    clients = [Client(lambda: server.url, models, 100 * seed + n, BAD, done) for n in range(CLIENTS)]
    for client in clients:
        client.start()
    time.sleep(seconds)
    done.set()
    for client in clients:
        client.join()
    return add([client.record for client in clients])


def change(server: Server, killer: Killer, chance: random.Random, names: list[str], stop: threading.Event) -> None:
    """Kill a worker, and load a model again, under traffic."""
    if not stop.wait(ROUND_SECONDS / 4):
        killer.kill()
    if not stop.wait(ROUND_SECONDS / 4):
        reload(server, chance.choice(names))


def reload(server: Server, name: str) -> None:
    """Have a model loaded again: its files get a new time, so they count as changed."""
    folder = next(iter(sorted((models_dir(server) / name).glob("*/manifest.json"))))
    folder.touch()
    server.post(f"/v2/repository/models/{name}/load", json={}).raise_for_status()


def models_dir(server: Server) -> Path:
    """Return the folder that a server serves."""
    arguments = server.process.args
    assert isinstance(arguments, list)
    return Path(str(arguments[arguments.index("--models-dir") + 1]))


def show(turn: int, record: Record, server: Server) -> None:
    """Print a line for a round."""
    memory, files = measure(server)
    print(
        f"round {turn}: sent {record.sent}, answered {dict(sorted(record.answered.items()))}, closed {record.closed}, "
        f"hung {record.hung}, {memory / 2**20:.0f} MiB, {files} files",
        flush=True,
    )


def judge(record: Record, models: Models, memory: tuple[int, int], files: tuple[int, int], workers: int) -> int:
    """Print the result and return the exit code."""
    wrong = models.count_wrong(record.asked)
    grown, opened = (memory[1] - memory[0]) / (workers + 1), files[1] - files[0]
    print(f"{len(record.asked)} answers compared with onnxruntime, {wrong} wrong, {record.hung} hung")
    print(
        f"memory grew by {grown / 2**20:.1f} MiB a process, limit {GROWTH_BYTES / 2**20:.0f}; {opened} more files open"
    )
    for sentence in record.misjudged[:10]:
        print(sentence)
    good = not (wrong or record.hung or record.misjudged) and grown < GROWTH_BYTES and opened <= MORE_FILES
    print("nothing lost, nothing grew" if good else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
