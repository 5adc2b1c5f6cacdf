"""Failures of a cluster (replicas and nodes die, queues fill up, deadlines pass), scaling, and metrics."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import requests

from tests import fakes, wire
from tests.ray.cluster import RayServer
from tests.traffic import Client, Models, Record, add

CLIENTS = 4
SECONDS = 90.0
DEAD_REPLICA = "a good request was answered 500: b'Internal Server Error"  # from HAProxy


class TolerantClient(Client):
    """A client that counts a truncated response, whose replica died, as a closed connection."""

    def _exchange(self, request: bytes) -> wire.Reply | None:
        reply = super()._exchange(request)
        if reply is None or reply.headers is None or len(reply.body) == int(reply.headers["content-length"]):
            return reply
        self.record.closed += 1
        self._hang_up()
        return None


@contextmanager
def load(cluster: RayServer, models: Models, clients: int = CLIENTS) -> Iterator[Callable[[], Record]]:
    """Send good requests from several clients; the yielded function stops them and returns their results."""
    done = threading.Event()
    senders = [TolerantClient(lambda: cluster.url, models, seed, 0.0, done) for seed in range(clients)]
    for sender in senders:
        sender.start()

    def end() -> Record:
        done.set()
        for sender in senders:
            sender.join(SECONDS)
            assert not sender.is_alive()
        return add([sender.record for sender in senders])

    try:
        yield end
    finally:
        done.set()


def check(record: Record, models: Models) -> None:
    """Every request ended: with the right response, a 503, or a closed connection if its replica died."""
    assert record.hung == 0
    assert [sentence for sentence in record.misjudged if not sentence.startswith(DEAD_REPLICA)] == []
    assert set(record.answered) <= {200, 500, 503}
    assert record.answered[500] + record.closed <= 4 * CLIENTS  # those in flight on the replicas that died
    assert len(record.asked) > 20
    assert models.count_wrong(record.asked) == 0


def show(what: str, seconds: float, record: Record) -> None:
    """Print the results."""
    print(f"{what}: recovered after {seconds:.1f} s; {dict(record.answered)}, {record.closed} closed without an answer")


def running(cluster: RayServer) -> int:
    """Return the number of replicas that Ray reports as running."""
    return int(cluster.order("status")["replicas"].get("RUNNING", 0))


def break_under_load(cluster: RayServer, models: Path, what: str, break_it: Callable[[], None]) -> None:
    """Break something under load, wait until two replicas run again, and check the results of the clients."""
    known = Models(models)
    with load(cluster, known) as end:
        time.sleep(2)
        began = time.monotonic()
        break_it()
        wire.wait_until(lambda: len(cluster.replicas()) == 2 and running(cluster) == 2, SECONDS)
        seconds = time.monotonic() - began
        time.sleep(1)
        record = end()
    show(what, seconds, record)
    check(record, known)


def test_replica_is_killed_under_load(cluster: RayServer, models: Path) -> None:
    """After kill -9 of a replica no response is wrong, no request hangs, and the replica is replaced."""
    cluster.deploy(models, num_replicas=2)
    before = {process.pid for process in cluster.replicas()}

    def kill() -> None:
        cluster.replicas()[0].kill()
        wire.wait_until(lambda: {process.pid for process in cluster.replicas()} - before, SECONDS)

    break_under_load(cluster, models, "replica killed", kill)


def test_node_is_killed_under_load(cluster: RayServer, models: Path) -> None:
    """A lost node fails only its own requests; its replica starts again on the next node that joins."""
    cluster.deploy(models, num_replicas=2, ray_actor_options={"num_cpus": 1.2})  # one fits on a node
    before = {process.pid for process in cluster.replicas()}

    def lose_node() -> None:
        cluster.order("remove_node")
        wire.wait_until(lambda: len(before & {process.pid for process in cluster.replicas()}) == 1)  # it had one
        cluster.order("add_node")

    break_under_load(cluster, models, "node killed", lose_node)


def test_scales_with_load_and_back(cluster: RayServer, models: Path) -> None:
    """Under load one replica becomes four, without it one again; no request is lost on the way."""
    scaling = {
        "min_replicas": 1,
        "max_replicas": 4,
        "target_ongoing_requests": 0.25,  # so low that even slow clients need all four
        "upscale_delay_s": 1,
        "downscale_delay_s": 12,  # longer than a replica takes to start, or new replicas are stopped again
        "look_back_period_s": 2,
        "metrics_interval_s": 0.5,
    }
    cluster.deploy(models, num_replicas=None, autoscaling_config=scaling, graceful_shutdown_timeout_s=5)
    assert running(cluster) == 1
    known = Models(models)
    with load(cluster, known, clients=8) as end:
        up = wire.wait_until(lambda: running(cluster) == 4, SECONDS)
        record = end()
    began = time.monotonic()
    while running(cluster) > 1 or len(cluster.replicas()) > 1:
        assert time.monotonic() - began < SECONDS
        assert cluster.predict("logistic-hours", [[2]]).status_code == 200
        time.sleep(0.1)
    down = time.monotonic() - began
    print(
        f"1 -> 4 replicas after {up:.1f} s, 4 -> 1 after {down:.1f} s; {dict(record.answered)}, {record.closed} closed"
    )
    assert (record.hung, record.misjudged) == (0, [])
    assert record.closed <= 8  # idle connections, when HAProxy reloads its configuration
    assert set(record.answered) == {200}
    assert known.count_wrong(record.asked) == 0


def test_full_queue_is_503_in_our_form(cluster: RayServer, empty_dir: Path) -> None:
    """Beyond max_ongoing_requests and max_queued_requests a request is refused at once, as on our own host."""
    fakes.write_version(empty_dir, wire.napper(least=wire.rounds_for(0.5)))
    cluster.deploy(empty_dir, max_ongoing_requests=1, max_queued_requests=1)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: cluster.predict("napper", [[1]]), range(8)))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert {answer.status_code for answer in refused} == {503}
    assert 1 <= len(refused) < 8
    assert list(refused[0].json()) == ["error"]
    assert refused[0].headers["Retry-After"] == "1"


def test_deadlines_are_ours_first_then_rays(cluster: RayServer, empty_dir: Path) -> None:
    """The service's own deadline is a 504; so is a shorter one that a client requests from Ray."""
    fakes.write_version(empty_dir, wire.napper(least=wire.rounds_for(1)))
    cluster.deploy(empty_dir, {"SERVICE_REQUEST_TIMEOUT": "0.3"})
    ours = cluster.predict("napper", [[1]])
    cluster.deploy(empty_dir)
    rays = cluster.post(
        "/v1/models/napper:predict", json={"instances": [[1]]}, headers={"X-Request-Timeout-Seconds": "0.3"}
    )
    for answer in (ours, rays):
        assert (answer.status_code, list(answer.json())) == (504, ["error"]), answer.text


def test_metrics_have_a_replica_label(cluster: RayServer, empty_dir: Path) -> None:
    """Each node's agent exports the service's metrics with a replica label; their sum is right."""
    fakes.write_version(empty_dir, replace(fakes.doubler(), name="counted"))  # used by no other test
    cluster.deploy(empty_dir, num_replicas=2)
    for _ in range(40):
        assert cluster.predict("counted", [[2]]).status_code == 200

    def read() -> dict[str, float]:
        found = {}
        for port in cluster.order("status")["metrics_ports"]:
            text = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text
            for line in text.splitlines():
                if line.startswith("ray_service_requests_total{") and 'model="counted"' in line:
                    labels, _, value = line.rpartition(" ")
                    found[labels.partition('replica="')[2].partition('"')[0]] = float(value)
        return found

    wire.wait_until(lambda: sum(read().values()) == 40 and len(read()) == 2, SECONDS)
