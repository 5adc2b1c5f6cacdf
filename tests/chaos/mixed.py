"""Mixed traffic while everything that can die is killed, and hostile models are dropped in.

Workers, the engine and the checker are killed with -9; requests crash the engine; graphs that crash, loop for ever or
ask for 400 GB appear in the folder; load spikes and bad requests of every kind arrive. Prints what was sent and how it
ended, and compares every answer with onnxruntime's own. It fails where a request hung, was answered
wrongly or by a status that it should not get, where anything died that was not killed, or did not come back in time.
"""

import random
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil

from tests import fakes
from tests.fakes import FakeModel
from tests.hostile import divide, endless, glutton, killer, write_divider
from tests.servers import Server
from tests.traffic import FLAGS, HUNG_SECONDS, Client, Killer, Models, Record, add
from tests.wire import napper, rounds_for

CLIENTS = 6
SPIKE = 4  # times as many clients
BAD = 0.2  # of the requests
CALM_SECONDS, SPIKE_SECONDS, PAUSE_SECONDS = 14.0, 6.0, 1.0
LONGEST_RECOVERY = 10.0  # seconds; on a machine that the clients load fully
OPEN_SECONDS = 3.0  # that a version may take to open
MORE_FLAGS = ("--open-timeout", str(OPEN_SECONDS), "--reload-interval", "0.5")
HOSTILE: dict[str, tuple[Callable[[], FakeModel], int]] = {
    "crashes": (killer, 1),
    "never ends": (endless, 1),
    "asks for 400 GB": (glutton, 3),
}
"""Graphs, and how many checkers each may end: what the system kills for its memory is tried again."""


def run_mixed(models_dir: Path, seconds: float, workers: int, seed: int) -> bool:
    """Run, print the table, and tell whether all is well."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        root = Path(folder) / "models"
        shutil.copytree(models_dir, root)
        fakes.write_version(root, fakes.heavy())
        models = Models(root)
        write_divider(root)
        with Server(root, "--workers", str(workers), *FLAGS, *MORE_FLAGS) as server:
            chaos = Chaos(server, root, workers, seed)
            record = run(server, models, chaos, seconds, seed)
            log = server.log()
    wrong = models.count_wrong(record.asked)
    print_table(record, chaos, wrong, log)
    is_good = not (record.hung or wrong or record.misjudged or chaos.list_problems(log))
    print("nothing hung, nothing was wrong" if is_good else "FAILED")
    return is_good


class Chaos:
    """What is done to a server, one thing after another, and how many seconds each took to be over.

    Args:
        server: with the models `heavy` and `divider`, which run in its engine.
        root: its models folder.
        workers: how many it has.
        seed: of the choices.
    """

    def __init__(self, server: Server, root: Path, workers: int, seed: int) -> None:
        self.took: dict[str, list[float]] = {}
        self.deaths: Counter[str] = Counter()  # that were caused, by process
        self._server = server
        self._root = root
        self._killer = Killer(server, workers, seed)
        self._fresh = 0
        self._actions = self._list_actions(random.Random(seed))

    def act(self) -> None:
        """Do the next thing, and wait until it is over."""
        name, action = next(self._actions)
        began = time.monotonic()
        is_over = action()
        self.took.setdefault(name, []).append(time.monotonic() - began if is_over else float("inf"))

    def list_problems(self, log: str) -> list[str]:
        """Return what took too long, and which processes died though nothing was done to them."""
        problems = [
            f"{name} took {max(took):.1f} s" for name, took in self.took.items() if max(took) > LONGEST_RECOVERY
        ]
        for process in ("worker-", "engine-cpu", "checker"):
            count = sum(process in line and "ended with code" in line for line in log.splitlines())
            if count > self.deaths[process]:
                problems.append(f"{process} ended {count} times; {self.deaths[process]} were caused")
        return problems

    def _list_actions(self, chance: random.Random) -> Iterator[tuple[str, Callable[[], bool]]]:
        """Yield what to do, in a new order each time round."""
        actions: list[tuple[str, Callable[[], bool]]] = [
            ("worker killed", self._kill_worker),
            ("engine killed", self._kill_engine),
            ("checker killed", self._kill_checker),
            ("request that crashes the engine", self._crash_engine),
        ]
        actions += [(f"graph that {name}", partial(self._drop, *each)) for name, each in HOSTILE.items()]
        while True:
            chance.shuffle(actions)
            yield from actions

    def _kill_worker(self) -> bool:
        self.deaths["worker-"] += 1
        return self._killer.kill() < HUNG_SECONDS

    def _kill_engine(self) -> bool:
        engine = self._server.engine()
        assert engine is not None
        self.deaths["engine-cpu"] += 1
        engine.kill()
        return self._until(lambda: self._server.engine() != engine and self._answers("heavy"))

    def _kill_checker(self) -> bool:
        """Kill the checker while it opens a good version, which is to be served all the same."""
        fresh = f"fresh-{self._fresh}"
        self._fresh += 1
        fakes.write_version(self._root, napper(fresh, rounds_for(0.03)))
        while (checker := self._server.checker()) is None:
            time.sleep(0.02)
        self.deaths["checker"] += 1
        with suppress(psutil.NoSuchProcess):
            checker.kill()
        is_over = self._until(lambda: self._answers(fresh))
        shutil.rmtree(self._root / fresh)
        return is_over

    def _crash_engine(self) -> bool:
        status = divide(self._server, -(2**31), -1).status_code
        self.deaths["engine-cpu"] += status == 503
        return status in (400, 503) and self._until(lambda: divide(self._server, 6, 3).status_code == 200)

    def _drop(self, build: Callable[[], FakeModel], deaths: int) -> bool:
        """Drop a hostile version and a good one into the folder; the first is to be refused, and the other served."""
        self.deaths["checker"] += deaths
        hostile, good = build(), replace(fakes.doubler().only("onnx"), name="good")
        for model in (hostile, good):
            fakes.write_version(self._root, model)
        is_over = self._until(lambda: self._is_refused(hostile.name) and self._answers("good"))
        for model in (hostile, good):
            shutil.rmtree(self._root / model.name)
        return is_over and self._until(lambda: self._server.get("/v1/models/good").status_code == 404)

    def _is_refused(self, model: str) -> bool:
        return "1" in self._server.get(f"/v1/models/{model}").json().get("refused", {})

    def _answers(self, model: str) -> bool:
        return self._server.predict(model, [[2.0]]).status_code == 200

    def _until(self, is_over: Callable[[], bool]) -> bool:
        until = time.monotonic() + HUNG_SECONDS
        while time.monotonic() < until:
            if is_over():
                return True
            time.sleep(0.02)
        return False


def run(server: Server, models: Models, chaos: Chaos, seconds: float, seed: int) -> Record:
    """Return what the clients saw while chaos reigned."""
    done = threading.Event()
    clients = [Client(lambda: server.url, models, seed + number, BAD, done) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    spiking = threading.Thread(target=spike, args=(server, models, seed, done, clients))
    spiking.start()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(PAUSE_SECONDS)
        chaos.act()
    done.set()
    spiking.join()
    for client in clients:
        client.join()
    return add([client.record for client in clients])


def spike(server: Server, models: Models, seed: int, done: threading.Event, clients: list[Client]) -> None:
    """Add clients to those that are there, again and again for a few seconds."""
    while not done.wait(CALM_SECONDS):
        over = threading.Event()
        first = seed + 1000 * len(clients)
        more = [Client(lambda: server.url, models, first + n, BAD, over) for n in range(CLIENTS * (SPIKE - 1))]
        for client in more:
            client.start()
        clients += more
        done.wait(SPIKE_SECONDS)
        over.set()


def print_table(record: Record, chaos: Chaos, wrong: int, log: str) -> None:
    """Print how everything that was sent ended, and how long it took to get over what was done."""
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
        ("stacks in the log", log.count("Traceback")),
    ]
    for name, value in rows:
        print(f"{name:<36}{value:>8}")
    print(f"\n{'':<36}{'times':>8}{'median':>10}{'longest':>10}")
    for name, took in sorted(chaos.took.items()):
        print(f"{name:<36}{len(took):>8}{sorted(took)[len(took) // 2]:>8.2f} s{max(took):>8.2f} s")
    for sentence in [*record.misjudged[:10], *chaos.list_problems(log)]:
        print(sentence)
