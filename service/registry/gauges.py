"""What is true of a worker at this moment: requests in flight, rows that wait, calls that do not end."""

from service.registry.registry import Registry, list_served
from service.telemetry import metrics
from service.telemetry.metrics import ModelMetrics


class Gauges:
    """Writes what has changed since it was written last."""

    def __init__(self, registry: Registry) -> None:
        self._repository = registry
        self._in_flight = 0
        self._figures: set[ModelMetrics] = set()

    def write(self, in_flight: int) -> None:
        """Write the gauges and what the counters have gathered; called a few times a second."""
        if in_flight != self._in_flight:
            self._in_flight = in_flight
            metrics.set_in_flight(in_flight)
        every = list_served(self._repository.models).values()
        for served in every:
            served.metrics.write(served.batcher.rows)
        figures = {served.metrics for served in every}
        for gone in self._figures - figures:  # the last of a version that is not served any more
            gone.write(0)
        self._figures = figures
        metrics.write_rest()

    def find_running(self, seconds: float) -> str:
        """Return the name of a model with a call that has run for longer than that, or nothing."""
        return next((name for batcher, name in self._repository.batchers.items() if batcher.running > seconds), "")
