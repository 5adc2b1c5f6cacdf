"""The replica: its health, its lifespan, its figures. What needs a cluster stands in tests/ray."""

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
    """Return a replica as Ray makes one, without asking Ray for its cores."""
    replica = ray_host.Replica.__new__(ray_host.Replica)
    replica._app = create_app(Settings(models_dir=models_dir, access_log=False))
    replica._was_ready = False
    return replica


def test_health_is_our_readiness_until_it_was_ready(models_dir: Path) -> None:
    """What was never ready is unhealthy; what was, and still serves something, is kept; what serves nothing is not."""
    replica = build_replica(models_dir)
    registry = replica._app.registry
    registry.draining = True
    with pytest.raises(UnavailableError, match="shutting down"):
        replica.check_health()
    registry.draining = False
    replica.check_health()
    registry.draining = True
    replica.check_health()
    registry.models = {}
    with pytest.raises(UnavailableError):
        replica.check_health()


def test_replica_that_stands_still_is_unhealthy(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose run does not end can only be stopped with its process; Ray puts another in its place."""
    replica = build_replica(models_dir)
    replica.check_health()
    monkeypatch.setattr(replica._app, "find_stuck", lambda: "doubler")
    with pytest.raises(UnavailableError, match="doubler"):
        replica.check_health()


def test_folder_without_models_is_unhealthy(empty_dir: Path) -> None:
    """The sentence says what is missing."""
    with pytest.raises(UnavailableError, match="no model"):
        build_replica(empty_dir).check_health()


def test_lifespan_ticks_until_it_ends(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The housekeeping runs while the replica lives, hands figures over, and writes once more at its end."""
    replica = build_replica(models_dir)
    ticks: list[int] = []
    monkeypatch.setattr(replica._app, "tick", lambda: ticks.append(1))
    monkeypatch.setattr(ray_host, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(ray_host, "EXPORT_TICKS", 1)
    written: list[object] = []

    def note(export: object) -> None:
        written.append(export)

    monkeypatch.setattr(ray_host.Export, "write", note)
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


def test_answers_are_the_applications_without_the_id(models_dir: Path) -> None:
    """Ray's servers add the X-Request-ID; twice would be one too many."""
    client = Client(build_replica(models_dir).__serve_build_asgi_app__())
    try:
        answer = client.request("POST", "/v1/models/doubler:predict", b'{"instances": [[2]]}')
    finally:
        client.close()
    assert answer.json()["predictions"] == [{"prediction": 5.0}]
    assert "x-request-id" not in answer.headers


def test_figures_are_handed_over_as_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters by what was added since, gauges as they are, each with its labels; nothing twice."""
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
