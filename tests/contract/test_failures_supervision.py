"""Processes that die, over real HTTP: nothing hangs, others go on, and what died is back."""

import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests import fakes
from tests.servers import Server
from tests.wire import Wire, build_predict, exchange, napper, open_wires, rounds_for, wait_until, worker_of

PREDICT = build_predict("doubler", [2.0])


@pytest.fixture
def models(empty_dir: Path) -> Path:
    """A folder of the test's own with a fast model and one that takes as long as it is told."""
    fakes.write_version(empty_dir, fakes.doubler())
    fakes.write_version(empty_dir, napper(least=rounds_for(0.02)))
    return empty_dir


def connect_to_each(server: Server, count: int) -> dict[str, Wire]:
    """Return one connection to each of `count` workers."""
    found: dict[str, Wire] = {}
    until = time.monotonic() + 20
    while time.monotonic() < until:
        wires = [Wire(server.url) for _ in range(8)]  # at once, so that one worker alone does not take them all
        for wire in wires:
            found.setdefault(worker_of(wire.send(PREDICT).read()), wire)
        for wire in wires:
            if wire not in found.values():
                wire.close()
        if len(found) == count:
            return found
    raise AssertionError("a worker never answered")


def pid_of(server: Server, wire: Wire) -> int:
    """Return the worker at the other end of a connection."""
    port = wire.socket.getsockname()[1]
    for worker in server.workers():
        if any(each.raddr and each.raddr.port == port for each in worker.net_connections("tcp")):
            return worker.pid
    raise AssertionError("nobody holds the connection")


def test_killed_worker_ends_its_requests_at_once_and_no_others(models: Path) -> None:
    """Kill -9 of a worker: its request ends at once, the other worker's is answered, capacity is back within 2 s."""
    with Server(models, "--workers", "2") as server:
        doomed, other = connect_to_each(server, 2).values()
        nap = build_predict("napper", [float(rounds_for(2.0))])
        doomed.send(nap)
        other.send(nap)
        time.sleep(0.3)  # both run now
        victim = next(each for each in server.workers() if each.pid == pid_of(server, doomed))
        began = time.monotonic()
        victim.kill()
        assert doomed.read().status in (0, 503)
        ended = time.monotonic() - began
        back = wait_until(lambda: "starting another" in server.log() and len(server.workers()) == 2)
        for wire in connect_to_each(server, 2).values():  # both answer, the new one too
            wire.close()
        recovered = time.monotonic() - began
        assert other.read().status == 200
        assert ended < 1
        assert back < 2
        assert recovered < 5, recovered
        doomed.close()
        other.close()


def test_load_goes_on_while_workers_are_killed(models: Path) -> None:
    """Under load every request ends with its right answer or a closed connection, and most with the answer."""
    counts = {"right": 0, "closed": 0}
    wrong: list[object] = []
    done = threading.Event()

    def ask(server: Server) -> None:
        while not done.is_set():
            try:
                reply = exchange(server.url, PREDICT, seconds=10)
            except OSError as error:  # a TimeoutError is a hang
                if isinstance(error, TimeoutError):
                    wrong.append(error)
                counts["closed"] += 1
                continue
            if reply.status == 200 and b'"predictions":[{"prediction":4.0}]' in reply.body:
                counts["right"] += 1
            elif reply.status == 0:
                counts["closed"] += 1
            else:
                wrong.append(reply)

    with Server(models, "--workers", "2") as server:
        clients = [threading.Thread(target=ask, args=(server,)) for _ in range(4)]
        for client in clients:
            client.start()
        for _ in range(2):
            time.sleep(1.2)
            server.workers()[0].kill()
        wait_until(lambda: len(server.workers()) == 2)
        done.set()
        for client in clients:
            client.join()
    assert not wrong
    assert counts["right"] > 100
    assert counts["closed"] <= 2 * len(clients)


@pytest.mark.parametrize("workers", [1, 4])
def test_no_worker_outlives_its_parent(workers: int, models: Path) -> None:
    """Kill -9 of the parent while requests run: they end, and after 2 s no worker is left, however many there were."""
    with Server(models, "--workers", str(workers)) as server, open_wires(server.url, 4) as wires:
        for wire in wires:
            wire.send(build_predict("napper", [float(rounds_for(20.0))]))
        time.sleep(0.3)
        server.process.kill()
        server.process.wait()
        took = wait_until(lambda: not server.members())
        for wire in wires:
            assert wire.read().status in (0, 503)
        server.kill()
    assert took < 2


@pytest.mark.parametrize("model", ["napper", "surprise"])
def test_call_that_never_ends_costs_one_worker(model: str, models: Path) -> None:
    """A graph that never ends, in a thread or on the event loop: its request ends, others go on, a worker is new."""
    fakes.write_version(models, napper("surprise"))
    with Server(models, "--workers", "2", "--request-timeout", "1", "--placement", "inline") as server:
        before = {worker.pid for worker in server.workers()}
        with Wire(server.url) as endless:
            reply = endless.send(build_predict(model, [float(rounds_for(3600))])).read()
        assert reply.status == (504 if model == "napper" else 0)
        took = wait_until(lambda: len({worker.pid for worker in server.workers()} - before) == 1)
        print(f"replaced {took:.1f} s after the request ended")
        assert len(server.workers()) == 2
        for wire in connect_to_each(server, 2).values():
            wire.close()
        said = "a call of model napper does not end" if model == "napper" else "has not responded for 5 s; killing it"
        assert said in server.log()
        assert server.stop() == 0


def test_call_that_never_ends_is_seen_when_its_version_is_gone(models: Path) -> None:
    """A version that is removed while a call of it never ends takes its worker along; the next one serves."""
    arguments = ("--workers", "1", "--request-timeout", "1", "--reload-interval", "0.1", "--placement", "inline")
    with Server(models, *arguments) as server, Wire(server.url) as endless:
        first = {worker.pid for worker in server.workers()}
        endless.send(build_predict("napper", [float(rounds_for(3600))]))
        time.sleep(0.3)  # it runs now
        fakes.write_version(models, replace(napper(), version=2))
        shutil.rmtree(models / "napper" / "1")
        assert endless.read().status == 504
        wait_until(lambda: server.workers() and not first & {worker.pid for worker in server.workers()})
        assert "a call of model napper does not end" in server.log()
        nap = build_predict("napper", [1.0])
        wait_until(lambda: exchange(server.url, nap).status == 200)


@pytest.fixture
def crashing(models: Path) -> Iterator[Server]:
    """A server of two workers whose models folder is gone, so that no further worker can be set up."""
    with Server(models, "--workers", "2") as server:
        shutil.rmtree(models)
        yield server
        if server.process.poll() is None:
            server.stop()
        server.kill()


def test_worker_that_cannot_start_is_tried_ever_more_slowly(crashing: Server) -> None:
    """A worker that crashes on start is not started in a tight loop, its reason is logged once, the other answers."""
    crashing.workers()[0].kill()
    seen: set[int] = set()
    until = time.monotonic() + 4
    while time.monotonic() < until:
        seen |= {worker.pid for worker in crashing.workers()}
        time.sleep(0.02)
    assert len(seen) <= 8
    assert crashing.log().count("does not exist; pass --models-dir") == 1
    assert crashing.log().count("died while starting") == 1
    assert exchange(crashing.url, build_predict("doubler", [2.0])).status in (200, 404)


def test_service_ends_when_no_worker_can_start(crashing: Server) -> None:
    """Where no worker is left and none can be started, the service ends by itself, with the reason, and exit code 1."""
    for worker in crashing.workers():
        worker.kill()
    assert crashing.process.wait(30) == 1
    assert "no worker could be started in 5 attempts" in crashing.log()
    assert not crashing.members()


def test_stopped_worker_does_not_stop_the_end(models: Path) -> None:
    """A worker that does not react at all is killed when its time is over, and the exit code stays 0."""
    with Server(models, "--workers", "2", "--shutdown-grace", "1") as server:
        server.workers()[0].send_signal(signal.SIGSTOP)
        assert server.stop() == 0
        assert "did not end in time and was killed" in server.log()
