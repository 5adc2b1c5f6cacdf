"""`python -m tests.chaos`: mixed traffic while workers are killed, load spikes and bad requests of every kind arrive.

Prints what was sent and how it ended, and compares every answer with onnxruntime's own. Ends with exit code 1 where a
request hung, was answered wrongly, or was answered by a status that it should not get.
"""

import argparse
import sys
import threading
import time
from pathlib import Path

from tests.servers import ROOT, Server
from tests.traffic import FLAGS, Client, Killer, Models, Record, add, end_when_told

CLIENTS = 6
SPIKE = 4  # times as many clients
BAD = 0.2  # of the requests
KILL_SECONDS, SPIKE_SECONDS, CALM_SECONDS = 4.0, 6.0, 14.0
LONGEST_RECOVERY = 5.0  # seconds; on a machine that the clients load fully


def main() -> int:
    """Run, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="how long (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models-dir", type=Path, default=ROOT / "models")
    flags = parser.parse_args()
    end_when_told()
    models = Models(flags.models_dir)
    with Server(flags.models_dir, "--workers", str(flags.workers), *FLAGS) as server:
        record, recoveries = run(server, models, flags.seconds, flags.workers, flags.seed)
        log = server.log()
    wrong = models.count_wrong(record.asked)
    print_table(record, recoveries, wrong, log.count("Traceback"))
    good = not (record.hung or wrong or record.misjudged) and max(recoveries, default=0.0) < LONGEST_RECOVERY
    print("nothing hung, nothing was wrong" if good else "FAILED")
    return 0 if good else 1


def run(server: Server, models: Models, seconds: float, workers: int, seed: int) -> tuple[Record, list[float]]:
    """Return what the clients saw, and the seconds that each recovery took."""
    done = threading.Event()
    clients = [Client(lambda: server.url, models, seed + number, BAD, done) for number in range(CLIENTS)]
    killer = Killer(server, workers, seed)
    for client in clients:
        client.start()
    recoveries: list[float] = []
    spikes: list[tuple[threading.Event, list[Client]]] = []
    began = time.monotonic()
    next_kill, next_spike = began + KILL_SECONDS, began + CALM_SECONDS
    while time.monotonic() - began < seconds:
        now = time.monotonic()
        if now >= next_kill:
            recoveries.append(killer.kill())
            next_kill = now + KILL_SECONDS
        if now >= next_spike:
            over = threading.Event()
            first = seed + 1000 * (len(spikes) + 1)
            more = [Client(lambda: server.url, models, first + n, BAD, over) for n in range(CLIENTS * (SPIKE - 1))]
            for client in more:
                client.start()
            threading.Timer(SPIKE_SECONDS, over.set).start()
            spikes.append((over, more))
            next_spike = now + SPIKE_SECONDS + CALM_SECONDS
        time.sleep(0.05)
    done.set()
    for over, more in spikes:
        over.set()
        clients += more
    for client in clients:
        client.join()
    return add([client.record for client in clients]), recoveries


def print_table(record: Record, recoveries: list[float], wrong: int, stacks: int) -> None:
    """Print how everything that was sent ended."""
    rows: list[tuple[str, object]] = [("sent", record.sent)]
    rows += [(f"answered {status}", count) for status, count in sorted(record.answered.items())]
    rows += [
        ("left half-way by the client", record.left),
        ("closed without an answer", record.closed),
        ("connection refused or reset", record.refused_connections),
        ("hung", record.hung),
        ("answers compared with onnxruntime", len(record.asked)),
        ("wrong answers", wrong),
        ("answers of a wrong status", len(record.misjudged)),
        ("stacks in the log", stacks),
        ("workers killed", len(recoveries)),
    ]
    if recoveries:
        shown = sorted(recoveries)
        rows.append(("recovery, median", f"{shown[len(shown) // 2]:.2f} s"))
        rows.append(("recovery, longest", f"{shown[-1]:.2f} s"))
    for name, value in rows:
        print(f"{name:<36}{value:>12}")
    for sentence in record.misjudged[:10]:
        print(sentence)


if __name__ == "__main__":
    sys.exit(main())
