"""Tests of service.telemetry: metrics, the memory that processes share for them, and the recorder."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import partial
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client import Histogram as Reference
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from service.telemetry import metrics, shared_metrics
from service.telemetry.log import AccessLog
from service.telemetry.metrics import ModelMetrics
from service.telemetry.recorder import CLIENT_CLOSED, Answered, Recorder
from service.telemetry.shared_metrics import COLLECTOR, Block, Histogram

_fork = multiprocessing.get_context("fork")

_numbers = count()
BOUNDS = (0.1, 1.0, 5.0)


def read(name: str, **labels: str) -> float:
    """Return a sample of this process's metrics, 0 where there is none."""
    return REGISTRY.get_sample_value(name, labels) or 0.0


def parse(name: str) -> list[Sample]:
    """Return the samples of a metric as Prometheus reads them."""
    (family,) = (each for each in text_string_to_metric_families(metrics.render().decode()) if each.name == name)
    return family.samples


@given(st.lists(st.lists(st.floats(0, 10)), min_size=1))
def test_histogram_equals_prometheus_clients(batches: list[list[float]]) -> None:
    """Observations in batches give the samples that prometheus_client's own histogram gives one by one."""
    name = f"test_{next(_numbers)}"
    ours = Histogram(name, "about", ("a",), BOUNDS)
    registry = CollectorRegistry()
    reference = Reference(name, "about", ("a",), buckets=BOUNDS, registry=registry)
    reference.labels("x")
    for batch in batches:
        ours.observe(batch, "x")
        for value in batch:
            reference.labels("x").observe(value)
    (theirs,) = registry.collect()
    expected = {(s.name, *s.labels.values()): s.value for s in theirs.samples if not s.name.endswith("_created")}
    (family,) = (each for each in COLLECTOR.collect() if each.name == name)
    found = {(s.name, *s.labels.values()): s.value for s in family.samples}
    assert found == pytest.approx(expected)


def test_totals_of_one_version_are_those_among_all() -> None:
    """The sums of one version are those that it has among the sums of all, and no others."""
    for name, version in (("sums", 1), ("sums", 11), ("other-sums", 1)):
        ModelMetrics(name, version).answered(200, [0.5] * version)
    every = metrics.read_totals()
    some = metrics.read_totals("sums", "1")
    assert some == {key: value for key, value in every.items() if key[1:] == ("sums", "1")}
    assert some["succeeded", "sums", "1"] == 1


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """A function that runs another in a forked process of an index: what it wrote is in the metrics here."""
    monkeypatch.setattr(shared_metrics, "_memory", shared_metrics._Memory())
    shared_metrics.share(2)

    def run(index: int, work: Callable[[], None]) -> None:
        def start() -> None:
            shared_metrics.use(index)
            work()

        process = _fork.Process(target=start)
        process.start()
        process.join()

    return run


def test_metrics_of_processes_are_added_up(processes: Callable[[int, Callable[[], None]], None]) -> None:
    """Any process shows the sum over all, including those that were replaced or killed; no counter goes back."""

    def work() -> None:
        ModelMetrics("m", 1).answered(200, [0.002, 0.2])
        os.kill(os.getpid(), signal.SIGKILL)

    for ended, index in enumerate((0, 1, 0, 0), 1):
        processes(index, work)
        shared_metrics.forget_live(index)
        samples = {(s.name, s.labels.get("le", "")): s.value for s in parse("service_request_seconds")}
        assert samples["service_request_seconds_count", ""] == 2 * ended
        assert samples["service_request_seconds_bucket", "0.0025"] == ended
        assert samples["service_request_seconds_bucket", "+Inf"] == 2 * ended
        assert samples["service_request_seconds_sum", ""] == pytest.approx(ended * 0.202)
        assert read("service_requests_total", model="m", version="1", code="200") == 2 * ended


def test_replaced_processes_take_no_more_memory(processes: Callable[[int, Callable[[], None]], None]) -> None:
    """However often a worker is replaced, its successor writes where it wrote."""
    used = []
    for _ in range(20):
        processes(0, lambda: ModelMetrics("m", 1).answered(200, [0.1]))
        used.append(shared_metrics._memory.blocks[1]._words[0])
    assert len(set(used)) == 1
    assert read("service_requests_total", model="m", version="1", code="200") == 20


def test_process_killed_while_it_adds_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its half-written entry counts for nothing, and its successor's begins at zero."""
    block = Block(4096)
    block.open(b"whole", 1)[0] = 1.0
    used = block._words[0]
    block.open(b"the key of an entry that was not finished", 3)[2] = 7.0
    block._words[0] = used
    block.take_over()
    assert [(key, cells.tolist()) for key, cells in block.read()] == [(b"whole", [1.0])]
    assert block.open(b"next", 12).tolist() == [0.0] * 12


def test_full_block_goes_on_counting_what_it_has(caplog: pytest.LogCaptureFixture) -> None:
    """Beyond its size, new entries are counted for nobody; one line says so."""
    block = Block(4096)
    numbers = [block.open(b"%d" % number, 8) for number in range(100)]
    for each in numbers:
        each[0] += 1.0
    assert 0 < len(list(block.read())) < 100
    assert all(cells[0] == 1.0 for _, cells in block.read())
    assert [record.getMessage() for record in caplog.records] == [
        "there are too many models for the metrics of one process; new ones are not counted"
    ]


def test_live_gauges_end_with_their_process(processes: Callable[[int, Callable[[], None]], None]) -> None:
    """Queues are worked off at the same time, so the longest backlog is shown; the rows are those of living workers."""

    def work(backlog: float) -> None:
        ModelMetrics("m", 1).write(1, backlog)
        metrics.record_restart()

    for index, backlog in enumerate((2.5, 0.5)):
        processes(index, partial(work, backlog))
    labels = {"model": "m", "version": "1"}
    assert read("service_queue_rows", **labels) == 2.0
    assert read("service_queue_backlog_seconds", **labels) == 2.5
    shared_metrics.forget_live(0)
    assert read("service_queue_rows", **labels) == 1.0
    assert read("service_queue_backlog_seconds", **labels) == 0.5
    assert read("service_worker_restarts_total") == 2.0


def answer(status: int, of: ModelMetrics | None, is_prediction: bool = True) -> Answered:
    """Return an answered request."""
    return Answered("POST", "/path", b"id", status, 0.01, is_prediction, 1, of)


def test_gauges_of_the_queue_follow_it() -> None:
    """They show the last rows and seconds, and 0 from the start and once nothing waits."""
    version = ModelMetrics(f"queued{next(_numbers)}", 1)
    labels = {"model": version.model.partition("/")[0], "version": "1"}
    assert read("service_queue_rows", **labels) == read("service_queue_backlog_seconds", **labels) == 0
    for rows, backlog in ((3, 0.5), (3, 0.25), (0, 0.0)):
        version.write(rows, backlog)
        assert read("service_queue_rows", **labels) == rows
        assert read("service_queue_backlog_seconds", **labels) == backlog


def test_recorder_counts_each_request_once(capfd: pytest.CaptureFixture[str]) -> None:
    """Each answered request is one line of the log and one count, by what it was and what became of it."""
    version = ModelMetrics(f"recorded{next(_numbers)}", 3)
    name, _, number = version.model.partition("/")
    labels = {"model": name, "version": number}
    unknown = {"model": "", "version": "", "code": "404"}
    before = read("service_requests_total", **unknown), read("service_other_requests_total", code="418")
    recorder = Recorder(AccessLog("text", True), None)
    version.batches += [(2, 0.001, 0.002)]
    recorder.answered += [
        answer(200, version),
        answer(200, version),
        answer(400, version),
        answer(CLIENT_CLOSED, version),
        answer(404, None),
        answer(418, None, is_prediction=False),
    ]
    recorder.flush()
    assert read("service_requests_total", **labels, code="200") == 2
    assert read("service_requests_total", **labels, code="400") == 1
    assert read("service_requests_total", **labels, code="499") == 0
    assert read("service_dropped_total", **labels, reason="gone") == 1
    assert read("service_request_seconds_count", **labels) == 3
    assert read("service_batch_rows_sum", **labels) == 2
    assert read("service_requests_total", **unknown) == before[0] + 1
    assert read("service_other_requests_total", code="418") == before[1] + 1
    assert [line.split()[7] for line in capfd.readouterr().err.splitlines()] == [
        "200",
        "200",
        "400",
        "499",
        "404",
        "418",
    ]
    recorder.write()
    assert read("service_request_seconds_count", **labels) == 3
