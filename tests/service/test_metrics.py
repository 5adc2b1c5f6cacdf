"""Tests of service.telemetry: metrics, the histogram that takes many observations, and the recorder."""

import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client import Histogram as Reference
from prometheus_client.parser import text_string_to_metric_families

from service.telemetry import metrics
from service.telemetry.histogram import Histogram
from service.telemetry.log import AccessLog
from service.telemetry.metrics import ModelMetrics
from service.telemetry.recorder import CLIENT_CLOSED, Answered, Recorder

_numbers = count()
BOUNDS = (0.1, 1.0, 5.0)


def read(name: str, **labels: str) -> float:
    """Return a sample of this process's metrics, 0 where there is none."""
    return REGISTRY.get_sample_value(name, labels) or 0.0


@given(st.lists(st.lists(st.floats(0, 10)), min_size=1))
def test_histogram_equals_prometheus_clients(batches: list[list[float]]) -> None:
    """Observations in batches give the samples that prometheus_client's own histogram gives one by one."""
    name = f"test_{next(_numbers)}"
    ours = Histogram(name, "about", ("a",), BOUNDS)
    try:
        registry = CollectorRegistry()
        reference = Reference(name, "about", ("a",), buckets=BOUNDS, registry=registry)
        ours.labels("x")
        reference.labels("x")
        for batch in batches:
            ours.labels("x").observe(batch)
            for value in batch:
                reference.labels("x").observe(value)
        (theirs,) = registry.collect()
        expected = {(s.name, *s.labels.values()): s.value for s in theirs.samples if not s.name.endswith("_created")}
        (family,) = ours.collect()
        found = {(s.name, *s.labels.values()): s.value for s in family.samples}
        assert found == pytest.approx(expected)
    finally:
        REGISTRY.unregister(ours)


def test_histograms_of_processes_are_added_up(tmp_path: Path) -> None:
    """In multi-process mode, any process shows the sum over all, including those that have ended."""
    script = (
        "from service.telemetry.metrics import ModelMetrics, render\n"
        "ModelMetrics('m', 1).answered(200, [0.002, 0.2])\n"
        "print(render().decode())"
    )
    for _ in range(3):
        shown = subprocess.run(
            [sys.executable, "-c", script],
            env={"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PYTHONPATH": str(Path(metrics.__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    families = {family.name: family for family in text_string_to_metric_families(shown)}
    samples = {(s.name, s.labels.get("le", "")): s.value for s in families["service_request_seconds"].samples}
    assert samples["service_request_seconds_count", ""] == 6
    assert samples["service_request_seconds_bucket", "0.0025"] == 3
    assert samples["service_request_seconds_bucket", "+Inf"] == 6
    assert samples["service_request_seconds_sum", ""] == pytest.approx(3 * 0.202)


def answer(status: int, of: ModelMetrics | None, is_prediction: bool = True) -> Answered:
    """Return an answered request."""
    return Answered("POST", "/path", b"id", status, 0.01, is_prediction, 1, of)


def test_gauges_of_the_queue_follow_it() -> None:
    """They show the last rows and seconds, and 0 once nothing waits."""
    version = ModelMetrics(f"queued{next(_numbers)}", 1)
    labels = {"model": version.model.partition("/")[0], "version": "1"}
    for rows, backlog in ((3, 0.5), (3, 0.25), (0, 0.0)):
        version.write(rows, backlog)
        assert read("service_queue_rows", **labels) == rows
        assert read("service_queue_backlog_seconds", **labels) == backlog


def test_longest_backlog_of_the_live_processes_is_shown(tmp_path: Path) -> None:
    """Queues of several processes are worked off at the same time, so their times are not added up."""
    script = (
        "import sys\n"
        "from service.telemetry.metrics import ModelMetrics, render\n"
        "ModelMetrics('m', 1).write(1, float(sys.argv[1]))\n"
        "print(render().decode())"
    )
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PYTHONPATH": str(Path(metrics.__file__).parents[2])}
    for backlog in (2.5, 0.5):
        shown = subprocess.run(
            [sys.executable, "-c", script, str(backlog)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    assert 'service_queue_rows{model="m",version="1"} 2.0' in shown
    assert 'service_queue_backlog_seconds{model="m",version="1"} 2.5' in shown


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
