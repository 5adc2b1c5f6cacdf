"""What operators watch, in Prometheus' text format, right across worker processes.

A worker writes what it gathered ten times a second, so one killed outright takes at most a tenth of a second with it.
Where `PROMETHEUS_MULTIPROC_DIR` is set before this module is imported (the host sets it), each worker writes its
figures into memory-mapped files there and any worker answers for all of them, also for those that have died.
"""

import os
import time
from bisect import bisect_left
from collections import Counter as Counted
from collections.abc import Sequence

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client import generate_latest as _generate
from prometheus_client.multiprocess import MultiProcessCollector

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_MODEL = ("model", "version")

_requests = Counter("service_requests", "Predict requests answered, by status code", (*_MODEL, "code"))
_request_seconds = Histogram(
    "service_request_seconds", "From a predict request's head to its answer", _MODEL, buckets=_SECONDS
)
_queue_seconds = Histogram(
    "service_queue_seconds", "How long the oldest request of a batch waited for the backend", _MODEL, buckets=_SECONDS
)
_inference_seconds = Histogram("service_inference_seconds", "One backend call", _MODEL, buckets=_SECONDS)
_batch_rows = Histogram("service_batch_rows", "Instances in one backend call", _MODEL, buckets=_ROWS)
_dropped = Counter(
    "service_dropped", "Requests not run: queue full, deadline expired, client gone", (*_MODEL, "reason")
)
_others = Counter("service_other_requests", "Requests answered that are no predict requests, by status code", ("code",))
_in_flight = Gauge("service_requests_in_flight", "Predict requests being answered", multiprocess_mode="livesum")
_queue_rows = Gauge("service_queue_rows", "Instances that wait or run", _MODEL, multiprocess_mode="livesum")
_served = Gauge(
    "service_model_info",
    "Workers that serve a version, by where it runs",
    (*_MODEL, "backend", "device", "provider"),
    multiprocess_mode="livesum",
)
# Without labels these two are there from the start, so that a rule can tell 0 from a service that is not scraped.
_models_serving = Gauge(
    "service_models_serving", "Models of which a version serves; 0 for an empty folder", multiprocess_mode="livemax"
)
_restarts = Counter("service_worker_restarts", "Workers started again because the one before them ended")
_last_request = Gauge(
    "service_last_request_seconds", "When the last request was answered, since 1970", _MODEL, multiprocess_mode="max"
)
_refused = Gauge("service_model_refused", "Workers that refuse a version", _MODEL, multiprocess_mode="livesum")


class ModelMetrics:
    """The figures of one version. What happens is gathered in lists, at next to no cost; `write` adds it up."""

    def __init__(self, name: str, version: int) -> None:
        labels = (name, str(version))
        self._name, self._version = labels
        self._request_seconds = _request_seconds.labels(*labels)
        self._queue_seconds = _queue_seconds.labels(*labels)
        self._inference_seconds = _inference_seconds.labels(*labels)
        self._batch_rows = _batch_rows.labels(*labels)
        self._queue_rows = _queue_rows.labels(*labels)
        self._last_request = _last_request.labels(*labels)
        self._shown_rows = 0
        self._answered: list[tuple[int, float]] = []
        self._batches: list[tuple[int, float, float]] = []

    def answered(self, code: int, seconds: float) -> None:
        """Note an answer: its status and the seconds from the request's head to it."""
        self._answered.append((code, seconds))
        _unwritten.add(self)

    def batch(self, rows: int, waited: float, ran: float) -> None:
        """Note one backend call: its rows, the seconds its oldest request waited, the seconds it took."""
        self._batches.append((rows, waited, ran))
        _unwritten.add(self)

    def dropped(self, reason: str) -> None:
        """Note a request that was not run: "full", "expired" or "gone"."""
        _dropped.labels(self._name, self._version, reason).inc()

    def write(self, queue_rows: int) -> None:
        """Add what was gathered to the figures that `render` shows, and set the length of the queue."""
        if queue_rows != self._shown_rows:
            self._shown_rows = queue_rows
            self._queue_rows.set(queue_rows)
        self.write_gathered()

    def write_gathered(self) -> None:
        """Add what was gathered to the figures that `render` shows."""
        if not (self._answered or self._batches):
            return
        answered, self._answered = self._answered, []
        batches, self._batches = self._batches, []
        for code, count in Counted(code for code, _ in answered).items():
            _requests.labels(self._name, self._version, str(code)).inc(count)
        self._last_request.set(time.time())
        _observe_all(self._request_seconds, [seconds for _, seconds in answered])
        _observe_all(self._batch_rows, [rows for rows, _, _ in batches])
        _observe_all(self._queue_seconds, [waited for _, waited, _ in batches])
        _observe_all(self._inference_seconds, [ran for _, _, ran in batches])


_unwritten: set[ModelMetrics] = set()


def write_rest() -> None:
    """Write the figures of versions that are not served any more and answered what they had accepted."""
    for figures in _unwritten:
        figures.write_gathered()
    _unwritten.clear()


def _observe_all(histogram: Histogram, values: Sequence[float]) -> None:
    """Observe many values for little more than the price of one: a bucket is written once for all that fall into it."""
    if not values:
        return
    places = Counted(bisect_left(histogram._upper_bounds, value) for value in values)
    for place, count in places.items():
        histogram._buckets[place].inc(count)
    histogram._sum.inc(sum(values))


def record_failure(code: int) -> None:
    """Count a predict request that found no model; it has no model's name, for callers could invent any number."""
    _requests.labels("", "", str(code)).inc()


def record_dropped(reason: str) -> None:
    """Count a connection that was given up: its request could not be read, or it did not read its answer."""
    _dropped.labels("", "", reason).inc()


def record_other(code: int) -> None:
    """Count an answer to a request that is no predict request."""
    _others.labels(str(code)).inc()


def record_served(name: str, version: int, backend: str, device: str, provider: str, serves: bool) -> None:
    """Say whether this worker serves a version."""
    _served.labels(name, str(version), backend, device, provider).set(int(serves))


def record_refused(name: str, version: str, refuses: bool) -> None:
    """Say whether this worker refuses a version."""
    _refused.labels(name, version).set(int(refuses))


def set_serving(models: int) -> None:
    """Set how many models have a version that this worker serves."""
    _models_serving.set(models)


def record_restart() -> None:
    """Count a worker that is started in the place of one that ended; the parent of the workers does."""
    _restarts.inc()


def set_in_flight(count: int) -> None:
    """Set how many predict requests this worker is answering."""
    _in_flight.set(count)


def render() -> bytes:
    """Return all figures of all workers as text."""
    return _generate(_registry())


Totals = dict[tuple[str, str, str], float]


def read_totals() -> Totals:
    """Return sums over all workers by sample, model and version; "succeeded" are the requests answered 200."""
    totals: Totals = {}
    for family in _registry().collect():
        for sample in family.samples:
            labels = sample.labels
            if "model" not in labels or sample.name.endswith("_bucket"):
                continue
            key = (sample.name, labels["model"], labels["version"])
            totals[key] = totals.get(key, 0.0) + sample.value
            if sample.name == "service_requests_total" and labels["code"] == "200":
                totals["succeeded", labels["model"], labels["version"]] = sample.value
    return totals


def _registry() -> CollectorRegistry:
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return REGISTRY
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return registry
