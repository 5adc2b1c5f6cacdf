"""Too much at once, over real HTTP: clean refusals at once, nothing lost, and as before when it is over."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

from tests import fakes
from tests.servers import Server
from tests.wire import Wire, build_predict, build_request, exchange, napper, open_wires, rounds_for, thrower, wait_until

MEGABYTE = 2**20


@pytest.fixture
def models(empty_dir: Path) -> Path:
    """A folder of the test's own with a fast model, a slow one, and one that raises for some inputs."""
    fakes.write_version(empty_dir, fakes.doubler())
    fakes.write_version(empty_dir, fakes.coin())
    fakes.write_version(empty_dir, napper(least=rounds_for(0.02)))
    return empty_dir


def test_full_queue_is_a_503_at_once_and_over_at_once(models: Path) -> None:
    """Beyond the queue's rows a request is answered 503 with Retry-After at once; those accepted are all answered."""
    nap = build_predict("napper", [float(rounds_for(1.0))])
    with Server(models, "--workers", "1", "--queue-size", "8") as server, open_wires(server.url, 8) as accepted:
        for wire in accepted:
            wire.send(nap)
        time.sleep(0.5)
        for _ in range(10):
            began = time.monotonic()
            full = exchange(server.url, build_predict("napper", [0.0]))
            assert (full.status, full.error) == (503, "the model's queue is full; try again in a moment")
            assert full.headers is not None
            assert full.headers["retry-after"] == "1"
            assert time.monotonic() - began < 0.5
        assert exchange(server.url, build_predict("doubler", [2.0])).status == 200  # another model's queue is its own
        assert [wire.read().status for wire in accepted] == [200] * 8
        assert exchange(server.url, build_predict("napper", [0.0])).status == 200
        many = exchange(server.url, build_predict("doubler", *[[1.0]] * 9))
        assert many.status == 413
        assert "has 9 instances; at most 8" in many.error


def test_overload_is_refused_cleanly_and_ends_with_its_cause(models: Path) -> None:
    """At several times the capacity answers are 200 or 503 alone, the accepted are not late, memory stays flat."""
    counts: Counter[int] = Counter()
    waits: list[float] = []
    done = threading.Event()

    def ask(url: str) -> None:
        with requests.Session() as session:
            while not done.is_set():
                began = time.monotonic()
                body = {"instances": [[0.0]] * 4}
                status = session.post(f"{url}/v1/models/napper:predict", json=body, timeout=30).status_code
                counts[status] += 1
                if status == 200:
                    waits.append(time.monotonic() - began)
                else:
                    time.sleep(0.02)

    with Server(models, "--workers", "1", "--queue-size", "32", "--max-batch-size", "4") as server:
        (worker,) = server.workers()
        before = worker.memory_info().rss
        clients = [threading.Thread(target=ask, args=(server.url,)) for _ in range(32)]
        for client in clients:
            client.start()
        time.sleep(2.5)
        assert worker.memory_info().rss - before < 64 * MEGABYTE
        done.set()
        for client in clients:
            client.join()
        assert set(counts) == {200, 503}
        assert counts[200] > 20
        assert max(waits) < 5  # eight batches of some 20 ms may be ahead; five seconds is a busy machine
        assert exchange(server.url, build_predict("napper", [0.0])).status == 200


def test_request_that_would_be_late_is_a_503_at_once(models: Path) -> None:
    """One that cannot be answered by its deadline, by what is queued, is refused while it has time to go elsewhere."""
    nap = build_predict("napper", [0.0])
    hurried = build_predict("napper", [0.0], fields=("X-Request-Timeout: 0.3",))
    with Server(models, "--workers", "1", "--max-batch-size", "1") as server, open_wires(server.url, 100) as accepted:
        for wire in accepted:  # together two seconds
            wire.send(nap)
        time.sleep(0.1)
        began = time.monotonic()
        reply = exchange(server.url, hurried)
        assert time.monotonic() - began < 0.3
        assert (reply.status, reply.error) == (
            503,
            "the model's queue is too long for the request's deadline; try again in a moment",
        )
        assert reply.headers is not None
        assert int(reply.headers["retry-after"]) >= 1
        assert 'service_dropped_total{model="napper",reason="overload",version="1"} 1.0' in server.get("/metrics").text
        assert [wire.read().status for wire in accepted] == [200] * 100
        assert exchange(server.url, hurried).status == 200


def test_bad_clients_cost_good_ones_nothing(models: Path) -> None:
    """14 clients with good requests beside 2 that send wrong lengths: none of the good is lost or wrong."""
    counts: Counter[str] = Counter()
    done = threading.Event()

    def ask(url: str, number: int) -> None:
        is_bad = number >= 14
        with requests.Session() as session:
            for turn in range(10**6):
                if done.is_set():
                    return
                x = (number + turn) % 97 / 8
                body = {"instances": [[x]] if not is_bad else [[x, x]]}
                answer = session.post(f"{url}/v1/models/doubler:predict", json=body, timeout=30)
                if is_bad:
                    counts["refused" if answer.status_code == 400 else "not refused"] += 1
                elif answer.status_code != 200:
                    counts["lost"] += 1
                else:
                    counts["right" if answer.json()["predictions"] == [{"prediction": 2 * x}] else "wrong"] += 1

    with Server(models, "--workers", "2") as server:
        clients = [threading.Thread(target=ask, args=(server.url, number)) for number in range(16)]
        for client in clients:
            client.start()
        time.sleep(2.5)
        done.set()
        for client in clients:
            client.join()
    assert set(counts) == {"right", "refused"}, counts
    assert min(counts.values()) > 50


def test_large_uploads_cannot_exhaust_memory(models: Path) -> None:
    """Bodies that together are more than a worker may hold are refused 503 while they come; small ones go on."""
    chunk = b" " * MEGABYTE
    head = build_request("/v1/models/doubler:predict", None, f"Content-Length: {15 * MEGABYTE}")
    with Server(models, "--workers", "1") as server, open_wires(server.url, 24) as uploads:
        (worker,) = server.workers()
        before = worker.memory_info().rss
        for upload in uploads:  # 24 x 14 MB of bodies that never end, against the limit of 256 MB
            upload.send(head).send(chunk * 14)
        wait_until(lambda: held(worker, before) > 200 * MEGABYTE)
        assert held(worker, before) < 400 * MEGABYTE
        refused = [upload.read() for upload in uploads[20:]]
        assert [reply.status for reply in refused] == [503] * 4
        assert all("too many large requests" in reply.error for reply in refused)
        assert exchange(server.url, build_predict("doubler", [2.0])).status == 200
        for upload in uploads[:4]:
            upload.close()
        whole = build_request("/v1/models/doubler:predict", chunk * 14)
        wait_until(lambda: exchange(server.url, whole).status == 400)  # read, and found to be empty


def held(worker: psutil.Process, before: int) -> int:
    """Return by how much a worker has grown."""
    return int(worker.memory_info().rss) - before


def test_connections_are_counted(models: Path) -> None:
    """Beyond `--max-connections` a connection is answered 503 and closed; a free place is given again."""
    flags = ("--workers", "1", "--max-connections", "5")
    with Server(models, *flags) as server, open_wires(server.url, 5) as kept:
        assert [wire.send(build_predict("doubler", [2.0])).read().status for wire in kept] == [200] * 5
        with Wire(server.url) as extra:
            reply = extra.read()
            assert (reply.status, reply.error) == (503, "there are too many open connections; try again in a moment")
            assert extra.is_closed()
        kept[0].close()
        wait_until(lambda: exchange(server.url, build_predict("doubler", [2.0])).status == 200)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a model that raises for some inputs, one that is not finite for some, and a good one."""
    root = tmp_path_factory.mktemp("faulty")
    for fake in (fakes.doubler(), thrower(), fakes.logarithm()):
        fakes.write_version(root, fake)
    with Server(root, "--workers", "1") as server:
        yield server


@pytest.mark.parametrize(
    ("model", "good", "bad", "status", "error"),
    [
        ("thrower", 0.0, 3.0, 500, "the model failed to answer this request"),
        ("logarithm", 1.0, -1.0, 400, "the model has no finite answer for these values; they may be too large"),
    ],
)
def test_request_that_makes_the_graph_fail_fails_alone(
    model: str, good: float, bad: float, status: int, error: str, faulty: Server
) -> None:
    """One that makes it raise is a 500 with an id and no internals, one without a finite answer a 400; others go on."""
    with open_wires(faulty.url, 16) as wires:
        for turn in range(5):
            for number, wire in enumerate(wires):
                x = bad if number % 8 == 7 else good
                wire.send(build_predict(model, [x], fields=(f"X-Request-ID: {model}-{turn}",)))
            replies = [wire.read() for wire in wires]
            assert [reply.status for reply in replies] == ([200] * 7 + [status]) * 2
            assert replies[7].error == error
            assert replies[7].headers is not None
            assert replies[7].headers["x-request-id"] == f"{model}-{turn}"
            assert {json.loads(reply.body)["predictions"][0]["prediction"] for reply in replies[:7]} == {0.0}
    assert (f"request {model}-0 failed" in faulty.log()) is (status == 500)
    assert exchange(faulty.url, build_predict("doubler", [2.0])).status == 200
