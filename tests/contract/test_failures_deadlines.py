"""Time over real HTTP: every request ends by its deadline, and nobody computes for a client that has gone."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import fakes
from tests.servers import Server
from tests.wire import Wire, build_predict, build_request, exchange, napper, open_wires, rounds_for, wait_until

SLACK = 1.5  # seconds; both cores may be busy with other tests


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of one worker with a model that is slow, one that is slow for some inputs alone, and a fast one."""
    root = tmp_path_factory.mktemp("slow")
    fakes.write_version(root, fakes.doubler())
    fakes.write_version(root, napper(least=rounds_for(0.02)))
    fakes.write_version(root, napper("surprise"))
    with Server(root, "--workers", "1", "--request-timeout", "10") as server:
        yield server


def nap(seconds: float, *fields: str, model: str = "napper") -> bytes:
    """Return a request for a nap."""
    return build_predict(model, [float(rounds_for(seconds))], fields=fields)


def dropped(server: Server, reason: str) -> float:
    """Return how many requests were dropped for a reason, by /metrics."""
    found = re.findall(rf'service_dropped_total{{[^}}]*reason="{reason}"[^}}]*}} (\S+)', server.get("/metrics").text)
    return sum(map(float, found))


def test_running_work_is_answered_504_on_time(slow: Server) -> None:
    """A request whose backend call runs is answered by its deadline, and the service stays at hand meanwhile."""
    began = time.monotonic()
    with Wire(slow.url) as wire:
        wire.send(nap(1.5, "X-Request-Timeout: 0.3"))
        assert slow.predict("doubler", [[2]]).status_code == 200  # another model is not held up
        reply = wire.read()
        took = time.monotonic() - began
        assert (reply.status, reply.error) == (504, "no answer was ready by the request's deadline")
        assert 0.3 <= took < 0.3 + SLACK
        assert wire.send(nap(0)).read().status == 200  # on the same connection, once the backend is free


def test_queued_work_is_answered_504_on_time_and_never_run(slow: Server) -> None:
    """Requests that wait behind a long call are answered by their deadlines, and counted as expired."""
    before = dropped(slow, "expired")
    with Wire(slow.url) as first, Wire(slow.url) as second, Wire(slow.url) as third:
        began = time.monotonic()
        first.send(nap(1.5))
        time.sleep(0.1)
        second.send(nap(0.02, "X-Request-Timeout: 0.2"))
        third.send(nap(0.02))
        assert second.read().status == 504
        assert time.monotonic() - began < 0.3 + SLACK
        assert (first.read().status, third.read().status) == (200, 200)
    wait_until(lambda: dropped(slow, "expired") == before + 1)


def test_v2_timeout_is_a_deadline(slow: Server) -> None:
    """The protocol's `timeout` parameter, in microseconds, bounds running work too."""
    tensor = {"name": "inputs", "datatype": "FP32", "shape": [1, 1], "data": [float(rounds_for(1.5))]}
    body = json.dumps({"inputs": [tensor], "parameters": {"timeout": 300_000}}).encode()
    began = time.monotonic()
    assert exchange(slow.url, build_request("/v2/models/napper/infer", body)).status == 504
    assert time.monotonic() - began < 0.3 + SLACK


def test_service_timeout_bounds_every_request(tmp_path: Path) -> None:
    """`--request-timeout` holds for a request that asks for more, by either way through the service."""
    fakes.write_version(tmp_path, napper(least=rounds_for(0.02)))
    with Server(tmp_path, "--workers", "1", "--request-timeout", "0.5", "--shutdown-grace", "5") as server:
        for field in ("X-Request-Timeout: 60", "Expect: 100-continue"):
            began = time.monotonic()
            with Wire(server.url) as wire:
                reply = wire.send(nap(1.0, field)).read()
                assert (wire.read() if reply.status == 100 else reply).status == 504
            assert 0.5 <= time.monotonic() - began < 0.5 + SLACK


@pytest.mark.parametrize("value", ["0", "-1", "soon", "1e3", "nan", "9999999999"])
def test_timeout_that_is_none_is_a_400(value: str, slow: Server) -> None:
    """A header that is not a positive number of seconds is refused, not ignored."""
    reply = exchange(slow.url, nap(0, f"X-Request-Timeout: {value}"))
    assert (reply.status, reply.error) == (400, "X-Request-Timeout is not a positive number of seconds, such as 0.5")


@pytest.mark.parametrize("fields", [(), ("Expect: 100-continue",)], ids=["plain", "by ASGI"])
def test_requests_of_clients_that_have_gone_are_not_run(fields: tuple[str, ...], slow: Server) -> None:
    """What waits in the queue when its client goes is dropped and counted, by either way through the service."""
    before = dropped(slow, "gone")
    with Wire(slow.url) as first:
        first.send(nap(1.0))
        time.sleep(0.1)
        with open_wires(slow.url, 5) as leaving:
            for wire in leaving:
                wire.send(nap(2.0, *fields))
            time.sleep(0.2)
        assert first.read().status == 200
    began = time.monotonic()
    assert exchange(slow.url, nap(0)).status == 200
    assert time.monotonic() - began < 2 + SLACK  # five naps would be ten seconds
    wait_until(lambda: dropped(slow, "gone") == before + 5)


def test_model_that_turns_out_slow_does_not_hold_the_others(slow: Server) -> None:
    """A model that was fast when it was measured and is slow for an input holds the others up once, not each time."""
    assert exchange(slow.url, nap(0.3, model="surprise")).status == 200
    with Wire(slow.url) as wire:
        wire.send(nap(2.0, "X-Request-Timeout: 0.5", model="surprise"))
        time.sleep(0.1)
        began = time.monotonic()
        assert slow.predict("doubler", [[2]]).status_code == 200
        assert time.monotonic() - began < 1
        assert wire.read().status == 504
