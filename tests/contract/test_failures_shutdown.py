"""The end of a server under load: readiness turns first, what was accepted is answered, and clients lose nothing."""

import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import requests

from tests import fakes
from tests.servers import Server
from tests.wire import Wire, build_predict, exchange, napper, rounds_for, wait_until


@pytest.fixture
def models(empty_dir: Path) -> Path:
    """A folder of the test's own with a fast model and a slow one."""
    fakes.write_version(empty_dir, fakes.doubler())
    fakes.write_version(empty_dir, napper(least=rounds_for(0.02)))
    return empty_dir


def is_ready(server: Server) -> bool:
    """Ask the readiness probe, as a load balancer does."""
    try:
        return requests.get(f"{server.url}/health/ready", timeout=5).status_code == 200
    except requests.ConnectionError:
        return False


def test_readiness_turns_before_listening_ends(models: Path) -> None:
    """After SIGTERM the service says that it is not ready and goes on answering for the drain delay; then it ends."""
    with Server(models, "--workers", "1", "--drain-delay", "2") as server:
        assert is_ready(server)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not is_ready(server), 1.5)
        ready = exchange(server.url, b"GET /health/ready HTTP/1.1\r\nHost: test\r\n\r\n")
        assert (ready.status, ready.status and b"shutting down" in ready.body) == (503, True)
        reply = exchange(server.url, build_predict("doubler", [2.0]))
        assert reply.status == 200
        assert reply.headers is not None
        assert reply.headers["connection"] == "close"
        assert server.process.wait(20) == 0
        assert not server.members()
        server.kill()


@pytest.mark.parametrize("times", [1, 2])
def test_requests_in_flight_are_finished(models: Path, times: int) -> None:
    """What was accepted when the end came is answered within the grace, also where the signal comes by two ways."""
    with Server(models, "--workers", "1", "--shutdown-grace", "15") as server, Wire(server.url) as wire:
        wire.send(build_predict("napper", [float(rounds_for(1.0))]))
        time.sleep(0.3)
        for _ in range(times):
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.05)  # else the kernel makes one of two
        assert wire.read().status == 200
        assert wire.is_closed()
        assert "was killed" not in server.log()
        assert server.process.wait(20) == 0
        server.kill()


def test_request_of_the_first_moment_is_finished(models: Path) -> None:
    """SIGTERM in the moment in which the service says that it serves: who connected then is answered."""
    for _ in range(3):
        with Server(models, "--workers", "2") as server, Wire(server.url) as wire:
            wire.send(build_predict("doubler", [2.0]))
            server.process.send_signal(signal.SIGTERM)
            assert wire.read().status == 200
            assert server.process.wait(20) == 0
            server.kill()


def test_end_while_starting(models: Path) -> None:
    """SIGTERM before anything serves ends the service with exit code 0, whatever it is doing."""
    for seconds in (0.5, 0.8, 1.1, 1.4):
        server = Server(models, "--workers", "2")
        time.sleep(seconds)
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(20)
        left = server.members()
        server.kill()
        assert (code in (0, -signal.SIGTERM), left) == (True, []), (seconds, server.log())


def test_grace_is_the_longest_wait(models: Path) -> None:
    """What takes longer than the grace is given up: the process ends in time and its exit code is 0."""
    with Server(models, "--workers", "1", "--shutdown-grace", "1") as server, Wire(server.url) as wire:
        wire.send(build_predict("napper", [float(rounds_for(30.0))]))
        time.sleep(0.3)
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 6
        assert wire.read().status in (0, 503, 504)


class Balancer:
    """A round robin of servers that asks each five times a second whether it is ready, as a load balancer does."""

    def __init__(self, servers: list[Server]) -> None:
        self.ready = list(servers)
        self._servers = servers
        self._turn = 0
        self._done = threading.Event()
        self._watch = threading.Thread(target=self._look)
        self._watch.start()

    def choose(self) -> str:
        """Return the address of the next one that is ready."""
        self._turn += 1
        ready = self.ready
        return ready[self._turn % len(ready)].url

    def replace(self, old: Server, new: Server) -> None:
        """Put a new server in an old one's place."""
        self._servers[self._servers.index(old)] = new

    def close(self) -> None:
        """Stop looking."""
        self._done.set()
        self._watch.join()

    def _look(self) -> None:
        while not self._done.wait(0.2):
            self.ready = [server for server in list(self._servers) if is_ready(server)] or self.ready


def test_rolling_restart_fails_no_request(models: Path) -> None:
    """Two instances behind a round robin, each replaced under load: every request is answered 200 and right."""
    counts: Counter[str] = Counter()
    done = threading.Event()

    def ask(balancer: Balancer, number: int) -> None:
        with requests.Session() as session:
            while not done.is_set():
                body = {"instances": [[number]]}
                try:
                    answer = session.post(f"{balancer.choose()}/v1/models/doubler:predict", json=body, timeout=20)
                except requests.RequestException as error:
                    counts[repr(error)] += 1
                    continue
                right = answer.status_code == 200 and answer.json()["predictions"] == [{"prediction": 2.0 * number}]
                counts["right" if right else answer.text] += 1

    flags = ("--workers", "1", "--drain-delay", "1")
    with Server(models, *flags) as one, Server(models, *flags) as two:
        balancer = Balancer([one, two])
        clients = [threading.Thread(target=ask, args=(balancer, number)) for number in range(6)]
        for client in clients:
            client.start()
        try:
            time.sleep(0.5)
            assert one.stop() == 0
            with Server(models, *flags) as three:
                balancer.replace(one, three)
                wait_until(lambda: three in balancer.ready)
                assert two.stop() == 0
                time.sleep(0.5)
                done.set()
                for client in clients:
                    client.join()
                balancer.close()
        finally:
            done.set()
            balancer.close()
    assert set(counts) == {"right"}, counts
    assert counts["right"] > 200
