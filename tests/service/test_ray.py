"""Tests of service.hosts.ray: health, lifespan and metrics of a replica. Those that need a cluster are in tests/ray."""

import asyncio
import warnings
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own, of pydantic
    pytest.importorskip("ray.serve", reason="needs '.[ray]'")

from service.app import create_app
from service.errors import UnavailableError
from service.hosts import ray as ray_host
from service.settings import Settings
from service.telemetry import metrics
from tests.asgi import Client


def build_replica(models_dir: Path) -> ray_host.Replica:
    """Return a replica like one that Ray creates, without asking Ray for its cores."""
    replica = ray_host.Replica.__new__(ray_host.Replica)
    replica._app = create_app(Settings(models_dir=models_dir, access_log=False))
    replica._was_ready = False
    return replica


def test_health_is_our_readiness_until_it_was_ready(models_dir: Path) -> None:
    """A replica that was never ready is unhealthy; one that was ready is healthy while it serves any model."""
    replica = build_replica(models_dir)
    replica._app.draining = True
    with pytest.raises(UnavailableError, match="shutting down"):
        replica.check_health()
    replica._app.draining = False
    replica.check_health()
    replica._app.draining = True
    replica.check_health()
    replica._app.registry.models = {}
    with pytest.raises(UnavailableError):
        replica.check_health()


def test_replica_with_a_stuck_model_is_unhealthy(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only ending the process ends a call that is stuck, so Ray has to replace the replica."""
    replica = build_replica(models_dir)
    replica.check_health()
    monkeypatch.setattr(replica._app, "find_stuck", lambda: "doubler")
    with pytest.raises(UnavailableError, match="doubler"):
        replica.check_health()


def test_folder_without_models_is_unhealthy(empty_dir: Path) -> None:
    """The error says what is missing."""
    with pytest.raises(UnavailableError, match="no model"):
        build_replica(empty_dir).check_health()


def test_lifespan_ticks_until_it_ends(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The replica ticks and exports its metrics until its lifespan ends, and ticks once more then."""
    replica = build_replica(models_dir)
    ticks: list[int] = []
    monkeypatch.setattr(replica._app, "tick", lambda: ticks.append(1))
    monkeypatch.setattr(ray_host, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(ray_host, "EXPORT_TICKS", 1)
    written: list[object] = []

    def record(export: object) -> None:
        written.append(export)

    monkeypatch.setattr(ray_host.Export, "write", record)
    app: Any = replica.__serve_build_asgi_app__()

    async def live() -> None:
        messages: asyncio.Queue[Message] = asyncio.Queue()
        messages.put_nowait({"type": "lifespan.startup"})
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        living = asyncio.create_task(app({"type": "lifespan", "state": {}}, messages.get, send))
        while len(ticks) < 3 or not written:
            await asyncio.sleep(0.01)
        messages.put_nowait({"type": "lifespan.shutdown"})
        before = len(ticks)
        await living
        assert len(ticks) > before
        assert [message["type"] for message in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]

    asyncio.run(asyncio.wait_for(live(), 20))


def test_responses_have_no_request_id(models_dir: Path) -> None:
    """Ray's proxy adds X-Request-ID, so the application must not."""
    client = Client(build_replica(models_dir).__serve_build_asgi_app__())
    try:
        answer = client.request("POST", "/v1/models/doubler:predict", b'{"instances": [[2]]}')
    finally:
        client.close()
    assert answer.json()["predictions"] == [{"prediction": 5.0}]
    assert "x-request-id" not in answer.headers


def test_only_changed_metrics_are_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters are exported as increments and gauges as values, each with its labels, and only after a change."""
    calls: list[tuple[str, str, float, dict[str, str]]] = []

    class FakeMetric:
        def __init__(self, kind: str, name: str, tag_keys: tuple[str, ...]) -> None:
            self.kind, self.name = kind, name

        def inc(self, value: float, tags: dict[str, str]) -> None:
            calls.append(("inc", self.name, value, tags))

        def set(self, value: float, tags: dict[str, str]) -> None:
            calls.append(("set", self.name, value, tags))

    monkeypatch.setattr(ray_host, "Counter", lambda name, tag_keys: FakeMetric("counter", name, tag_keys))
    monkeypatch.setattr(ray_host, "Gauge", lambda name, tag_keys: FakeMetric("gauge", name, tag_keys))
    export = ray_host.Export()
    export.write()
    calls.clear()
    metrics.record_other(418)
    metrics.record_other(418)
    metrics.set_in_flight(3)
    export.write()
    assert ("inc", "service_other_requests_total", 2.0, {"code": "418"}) in calls
    assert ("set", "service_requests_in_flight", 3.0, {}) in calls
    calls.clear()
    metrics.set_in_flight(0)
    export.write()
    assert calls == [("set", "service_requests_in_flight", 0.0, {})]
