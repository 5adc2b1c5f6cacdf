"""What the service says of its work, over real HTTP: figures that add up, one line for each answer, and no key."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from tests import fakes
from tests.servers import Server
from tests.wire import Wire, build_predict, build_request, exchange, wait_until

Labels = dict[str, str]


def read_figures(server: Server) -> dict[str, list[tuple[Labels, float]]]:
    """Return every sample by name, as Prometheus reads them."""
    found: dict[str, list[tuple[Labels, float]]] = {}
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def total(server: Server, name: str, **wanted: str) -> float:
    """Return the sum of a figure over the labels that are not named."""
    samples = read_figures(server).get(name, [])
    return sum(value for labels, value in samples if labels.items() >= wanted.items())


@pytest.fixture
def two(models_dir: Path) -> Iterator[Server]:
    """A server of two workers on the good models."""
    with Server(models_dir, "--workers", "2") as server:
        yield server


def send(server: Server, count: int, path: str = "/v1/models/doubler:predict", rows: int = 1) -> None:
    """Send predictions, each on a connection of its own, so that both workers get some."""
    for _ in range(count):
        requests.post(server.url + path, json={"instances": [[2]] * rows}, timeout=20)


def test_counts_are_those_of_the_requests_sent(two: Server) -> None:
    """With two workers every answer is counted once, by model, version and code, also when one of them was replaced."""
    send(two, 30)
    send(two, 5, rows=3)
    send(two, 7, "/v1/models/doubler/versions/1:predict")
    send(two, 4, "/v1/models/nosuch:predict")
    two.post("/v1/models/doubler:predict", data=b"{")
    wait_until(lambda: total(two, "service_requests_total") == 47, 5)
    assert total(two, "service_requests_total", model="doubler", version="2", code="200") == 35
    assert total(two, "service_requests_total", model="doubler", version="1", code="200") == 7
    assert total(two, "service_requests_total", model="doubler", version="2", code="400") == 1
    assert total(two, "service_requests_total", model="", code="404") == 4
    assert total(two, "service_request_seconds_count", model="doubler", version="2") == 36
    assert total(two, "service_batch_rows_sum", model="doubler") == 30 + 5 * 3 + 7
    assert total(two, "service_inference_seconds_count") == total(two, "service_queue_seconds_count")
    assert total(two, "service_model_info", model="doubler") == 4  # two versions in two workers
    victim = two.workers()[0]
    victim.kill()
    wait_until(lambda: len({each.pid for each in two.workers()} - {victim.pid}) == 2)
    wait_until(lambda: total(two, "service_model_info", model="doubler") == 4)
    send(two, 20)
    wait_until(lambda: total(two, "service_requests_total") == 67, 5)
    assert total(two, "service_requests_in_flight") == 0
    assert total(two, "service_queue_rows") == 0


def test_service_without_a_model_says_zero(empty_dir: Path) -> None:
    """The figure that the alert NothingServed reads is there and 0 where no model ever was, and follows the folder."""
    with Server(empty_dir, "--workers", "2", "--reload-interval", "0.2") as server:
        assert server.get("/health/ready").status_code == 503
        assert read_figures(server)["service_models_serving"] == [({}, 0.0)]
        fakes.write_version(empty_dir, fakes.doubler())
        fakes.write_version(empty_dir, fakes.doubler(version=2))
        wait_until(lambda: read_figures(server)["service_models_serving"] == [({}, 1.0)])
        shutil.rmtree(empty_dir / "doubler")
        wait_until(lambda: read_figures(server)["service_models_serving"] == [({}, 0.0)])


def test_restarts_of_workers_are_counted(two: Server) -> None:
    """Each worker that takes a killed one's place is counted, once; before the first there is a 0."""
    assert read_figures(two)["service_worker_restarts_total"] == [({}, 0.0)]
    for count in (1.0, 2.0):
        victim = two.workers()[0]
        victim.kill()
        wait_until(lambda gone=victim.pid: len({each.pid for each in two.workers()} - {gone}) == 2)  # type: ignore[misc]
        assert read_figures(two)["service_worker_restarts_total"] == [({}, count)]


def test_buckets_of_every_histogram_add_up(two: Server) -> None:
    """Buckets rise, and the last is the count."""
    send(two, 20)
    wait_until(lambda: total(two, "service_requests_total") == 20, 5)
    figures = read_figures(two)
    names = [name.removesuffix("_bucket") for name in figures if name.endswith("_bucket")]
    assert {"service_request_seconds", "service_queue_seconds", "service_inference_seconds"} <= set(names)
    for name in names:
        for labels, count in figures[f"{name}_count"]:
            buckets = [v for each, v in figures[f"{name}_bucket"] if labels.items() <= each.items()]
            assert buckets == sorted(buckets)
            assert buckets[-1] == count


def test_other_requests_are_counted_by_code(two: Server) -> None:
    """Requests that are no predictions are counted too, but for probes and /metrics itself."""
    for path in ("/v1/models", "/nosuch", "/health/ready", "/v2/health/live", "/metrics"):
        two.get(path)
    assert exchange(two.url, b"GARBAGE\r\n\r\n").status == 400
    wait_until(lambda: total(two, "service_other_requests_total") == 3, 5)
    assert total(two, "service_other_requests_total", code="200") == 1
    assert total(two, "service_other_requests_total", code="404") == 1
    assert total(two, "service_other_requests_total", code="400") == 1


def test_client_that_goes_is_no_failure_of_the_service(two: Server) -> None:
    """A connection that ends within the body of an operation is counted as the client's, without a stack in the log."""
    with Wire(two.url) as wire:
        wire.send(build_request("/v2/repository/index", None, "Content-Length: 100") + b"{")
    wait_until(lambda: total(two, "service_other_requests_total") == 1, 5)
    assert total(two, "service_other_requests_total", code="400") == 1
    assert "Traceback" not in two.log()


def access_lines(server: Server) -> list[str]:
    """Return the lines of the access log."""
    return [line for line in server.log().splitlines() if " access: " in line or '"logger": "access"' in line]


LINES = [  # request id, method and path, status, rows, model and version, the sentence of a failure
    ("one", "POST /v1/models/coin:predict", 200, 3, "coin/1", ""),
    ("two", "POST /v1/models/coin:predict", 400, 0, "coin/1", "instances[0] has 1 values, expected 2"),
    ("three", "GET /v1/models/coin:predict", 405, 0, "", "GET is not answered here; send POST with a JSON body"),
    ("four", "GET /v1/models", 200, 0, "", ""),
    ("five", "GET /nosuch", 404, 0, "", "there is nothing at /nosuch; see /docs for what there is"),
    ("six", "POST /v1/models/coin:predict", 400, 0, "coin/1", "instances[0] has 1 values, expected 2"),
]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_every_answer_has_one_access_line(log_format: str, models_dir: Path) -> None:
    """Each line has id, method, path, status, rows and milliseconds, what answered, and why where it is a failure."""
    with Server(models_dir, "--workers", "1", "--log-format", log_format) as server:
        for request_id, what, _, rows, _, sentence in LINES:
            method, path = what.split()
            body = json.dumps({"instances": [[1] if sentence else [1, 2]] * max(rows, 1)}).encode()
            more = ("Expect: 100-continue",) if request_id == "six" else ()  # by way of ASGI
            fields = (f"X-Request-ID: {request_id}", *more)
            with Wire(server.url) as wire:
                reply = wire.send(
                    build_request(path, body if method == "POST" else None, *fields, method=method)
                ).read()
                if reply.status == 100:
                    wire.read()
        server.get("/health/ready")
        wait_until(lambda: len(access_lines(server)) == len(LINES), 5)
        for line, (request_id, what, status, rows, model, sentence) in zip(access_lines(server), LINES, strict=True):
            if log_format == "text":
                shown = (f" model={model}" if model else "") + (f" error={sentence}" if sentence else "")
                start = re.escape(f"INFO access: {request_id} {what} {status} rows={rows} ms=")
                assert re.search(start + r"\d+\.\d\d" + re.escape(shown) + "$", line), line
            else:
                fields_found = json.loads(line)
                assert fields_found.pop("ms") >= 0
                said = {"model": model, "error": sentence}
                expected = {"id": request_id, "request": what, "status": status, "rows": rows}
                expected |= {key: value for key, value in said.items() if value}
                assert {k: v for k, v in fields_found.items() if k not in ("time", "level", "logger")} == expected


def test_no_caller_can_write_lines_of_the_log(models_dir: Path) -> None:
    """Line breaks in a path, an id or a model's name stay within their line."""
    forged = "x%0A2026-01-01 00:00:00,000 INFO access: forged coin/1 200 rows=1 ms=1.00".replace(" ", "%20")
    with Server(models_dir, "--workers", "1") as server:
        for path in (f"/{forged}", f"/v1/models/{forged.replace(':', '')}:predict", f"/v1/models/{'n' * 5000}:predict"):
            for fields in ((), ("Expect: 100-continue",)):
                exchange(server.url, build_request(path, b"{}", *fields))
        exchange(server.url, build_request("/v1/models", None, "X-Request-ID: a b", method="GET"))
        wait_until(lambda: len(access_lines(server)) >= 4, 5)
        time.sleep(0.3)
        assert not [line for line in server.log().splitlines() if line.startswith("2026-01-01")]
        assert max(map(len, server.log().splitlines())) < 500


def test_traces_and_ids_come_back_by_every_way(two: Server) -> None:
    """A W3C traceparent and a request id are returned on every kind of answer; a bad one is not."""
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    fields = (f"traceparent: {trace}", "X-Request-ID: mine")
    asked = [
        build_predict("doubler", [2.0], fields=fields),
        build_predict("doubler", [2.0, 3.0], fields=fields),
        build_predict("doubler", [2.0], fields=(*fields, "Expect: 100-continue")),
        build_request("/v1/models", None, *fields, method="GET"),
        build_request("/nosuch", None, *fields, method="GET"),
    ]
    for request in asked:
        with Wire(two.url) as wire:
            reply = wire.send(request).read()
            reply = wire.read() if reply.status == 100 else reply
        assert reply.headers is not None
        assert (reply.headers["traceparent"], reply.headers["x-request-id"]) == (trace, "mine")
    bad = exchange(two.url, build_predict("doubler", [2.0], fields=("traceparent: 00-evil",)))
    assert bad.headers is not None
    assert "traceparent" not in bad.headers


KEYS = ("first-secret-1", "second-secret-2")
ADMIN = "admin-secret-3"


@pytest.fixture(scope="module")
def locked(models_dir: Path) -> Iterator[Server]:
    """A server with two keys and an admin key, given by the environment."""
    environment = {"SERVICE_API_KEY": ", ".join(KEYS), "SERVICE_ADMIN_KEY": ADMIN}
    with Server(models_dir, "--workers", "1", environment=environment) as server:
        yield server


OPEN = (
    "/health/live",
    "/health/ready",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/models/coin/ready",
    "/docs",
    "/docs/swagger-ui.css",
)
CLOSED = ("/v1/models", "/v1/models/coin", "/metrics", "/openapi.json", "/v2", "/v2/models/coin", "/nosuch")


def test_each_key_opens_and_nothing_else_does(locked: Server) -> None:
    """Any of the keys, in either header, is taken on every path; without one all but probes and pages are 401."""
    predict = "/v1/models/doubler:predict"
    for key in KEYS:
        for headers in ({"X-API-Key": key}, {"Authorization": f"Bearer {key}"}, {"Authorization": f"bearer {key}"}):
            assert locked.get("/v1/models", headers=headers).status_code == 200
            assert locked.post(predict, json={"instances": [[2]]}, headers=headers).status_code == 200
    wrong: tuple[dict[str, str], ...] = (
        {},
        {"X-API-Key": KEYS[0][:-1]},
        {"X-API-Key": ",".join(KEYS)},
        {"Authorization": f"Basic {KEYS[0]}"},
    )
    for refused in wrong:
        for path in CLOSED:
            answer = locked.get(path, headers=refused)
            assert answer.status_code == 401, path
            assert answer.headers["WWW-Authenticate"]
            assert "key" in answer.json()["error"]
        assert locked.post(predict, json={"instances": [[2]]}, headers=refused).status_code == 401
        assert locked.post("/v2/models/doubler/infer", json={}, headers=refused).status_code == 401
    for path in OPEN:
        assert locked.get(path).status_code == 200, path


def test_repository_operations_need_the_admin_key(locked: Server) -> None:
    """A caller's key may predict and look, not load or unload; the admin key may."""
    path = "/v2/repository/models/switch/{}"
    for action in ("load", "unload"):
        for key in ("", *KEYS):
            assert locked.post(path.format(action), json={}, headers={"X-API-Key": key}).status_code == 401
    for action in ("unload", "load"):
        assert locked.post(path.format(action), json={}, headers={"X-API-Key": ADMIN}).status_code == 200


def test_no_key_reaches_a_log(models_dir: Path) -> None:
    """Neither the service's keys nor what callers send as one appear in any line, whatever goes wrong."""
    environment = {"SERVICE_API_KEY": ",".join(KEYS), "SERVICE_ADMIN_KEY": ADMIN}
    with Server(models_dir, "--workers", "1", environment=environment) as server:
        for key in (*KEYS, ADMIN, "wrong-secret-4"):
            for headers in ({"X-API-Key": key}, {"Authorization": f"Bearer {key}"}):
                server.get("/v1/models", headers=headers)
                server.get("/nosuch", headers=headers)
                server.post("/v1/models/doubler:predict", data=b"{", headers=headers)
            exchange(server.url, f"GET /v1/models HTTP/1.1\r\nX-API-Key: {key}\r\nBad Field: 1\r\n\r\n".encode())
        wait_until(lambda: len(access_lines(server)) > 20, 5)
        assert "secret" not in server.log()


def test_service_without_a_key_that_others_reach_says_so(models_dir: Path) -> None:
    """Bound beyond loopback without a key, one line warns; with a key none does."""
    for flags, warns in (((), 1), (("--api-key", "k"), 0)):
        with Server(models_dir, "--workers", "1", "--host", "0.0.0.0", *flags) as server:
            assert server.log().count("without --api-key") == warns
