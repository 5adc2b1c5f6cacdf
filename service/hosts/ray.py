"""The host for several machines: the application as a Ray Serve deployment, `serve run service.hosts.ray:app`.

Ray Serve (https://docs.ray.io/en/latest/serve) starts replicas in its cluster, routes requests to them, scales their
number and replaces those that die. A replica is one process with the whole application; its settings are the same
`SERVICE_*` variables. The number and placement of replicas is configured in Ray: `deploy/ray/serve.yaml`.
"""

import asyncio
import logging
import sys
from typing import Any

import ray
from prometheus_client import REGISTRY
from prometheus_client.samples import Sample
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.metrics import Counter, Gauge
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.app import Application, create_app
from service.errors import UnavailableError
from service.settings import load_settings
from service.telemetry import log

logger = logging.getLogger("service")

TICK_SECONDS = 0.1
SWITCH_SECONDS = 0.0005  # as in hosts.litserve: a thread that decodes a large body yields to the event loop
EXPORT_TICKS = 20  # between exports of the metrics; Ray itself reads them every few seconds
RETRY_SECONDS = UnavailableError.retry_after


class Replica:
    """One replica: the application and its health check."""

    def __init__(self) -> None:
        settings = load_settings({})
        log.configure(settings.log_format)
        sys.setswitchinterval(SWITCH_SECONDS)
        cores = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
        self._app = create_app(settings, threads=max(1, int(cores)))
        self._was_ready = False

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the ASGI application; Ray calls this, and runs the lifespan."""
        return HostedApp(self._app)

    def check_health(self) -> None:
        """Raise if Ray should replace this replica.

        A replica that has never been ready is unhealthy. One that was ready stays healthy while it serves any model: a
        replacement would find the same folder, so one broken model would take down the others. `/health/ready` tells.

        Raises:
            UnavailableError: the replica is not ready, or a backend call does not end.
        """
        if stuck := self._app.find_stuck():
            raise UnavailableError(f"model {stuck} has been running for too long")
        serves = any(model.versions for model in self._app.registry.models.values())
        if (problem := self._app.problem) and not (self._was_ready and serves):
            raise UnavailableError(problem)
        self._was_ready = True


class HostedApp:
    """The application behind Ray's proxy, with the ticks that our own HTTP server would give it."""

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI connection; the lifespan's lasts as long as the replica."""
        if scope["type"] == "lifespan":
            ticking = asyncio.create_task(self._tick())
            await self._app(scope, receive, send)
            ticking.cancel()
            self._app.tick()
            return

        async def send_without_id(message: Message) -> None:  # the proxy adds the same X-Request-ID
            if message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message["headers"] if pair[0].lower() != b"x-request-id"]
            await send(message)

        await self._app(scope, receive, send_without_id)

    async def _tick(self) -> None:
        export, ticks = Export(), 0
        while True:
            await asyncio.sleep(TICK_SECONDS)
            try:
                self._app.tick()
                ticks += 1
                if ticks % EXPORT_TICKS == 0:
                    export.write()
            except Exception:  # metrics must not end the ticks
                logger.exception("cannot export metrics to Ray")


class Export:
    """Exports our metrics through Ray: each node's agent serves those of its replicas, as `ray_service_…`."""

    def __init__(self) -> None:
        self._metrics: dict[str, Any] = {}
        self._written: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def write(self) -> None:
        """Export what has changed; Ray adds the labels `deployment` and `replica`."""
        for family in REGISTRY.collect():
            if family.name.startswith("service_"):
                for sample in family.samples:
                    self._write(sample, family.type == "gauge")

    def _write(self, sample: Sample, is_gauge: bool) -> None:
        key = (sample.name, tuple(sample.labels.items()))
        change = sample.value - self._written.get(key, 0.0)
        if change == 0.0 or sample.name.endswith("_created"):
            return
        self._written[key] = sample.value
        if sample.name not in self._metrics:
            self._metrics[sample.name] = (Gauge if is_gauge else Counter)(sample.name, tag_keys=tuple(sample.labels))
        metric = self._metrics[sample.name]
        metric.set(sample.value, sample.labels) if is_gauge else metric.inc(change, sample.labels)


deployment = serve.deployment(
    name="model-service",
    max_ongoing_requests=256,
    max_queued_requests=1024,
    autoscaling_config=AutoscalingConfig(min_replicas=1, max_replicas=8, target_ongoing_requests=32),
    backpressure_config=BackpressureConfig(retry_after_s=RETRY_SECONDS),
    health_check_period_s=2,
    health_check_timeout_s=5,
    graceful_shutdown_timeout_s=15,
    ray_actor_options={"num_cpus": 1},
    logging_config={"enable_access_log": False},
)(serve.ingress(None)(Replica))

app = deployment.bind()
