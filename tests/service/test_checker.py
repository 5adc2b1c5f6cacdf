"""Tests of service.model.checker."""

import asyncio
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from service.model import channel
from service.model import checker as module
from service.model.checker import CHECKER, Checker, CheckerClient
from service.model.cost import Cost
from service.model.openings import Openings
from service.model.predictor import load_any_predictor
from service.model.remote import Engines
from service.registry.registry import Registry
from service.settings import Settings
from tests import fakes


def test_version_that_is_too_slow_for_the_workers_is_checked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is measured again with the threads of an engine, but its golden samples are not run again."""
    loads: list[tuple[int, bool]] = []

    class Slow:
        """What takes a second a row."""

        def __init__(self, predictor: Any) -> None:
            self.manifest, self.backend = predictor.manifest, predictor.backend

        def measure_cost(self, max_rows: int) -> Cost:
            """Return the cost."""
            return Cost(fixed=0.0, each=1.0, batch=max_rows)

    def load(path: Path, backend: str, device: str, threads: int, *, verified: str, **more: Any) -> Slow:
        loads.append((threads, bool(verified)))
        return Slow(load_any_predictor(path, backend, device, threads, verified=verified, **more))

    monkeypatch.setattr(module, "load_any_predictor", load)
    folder = fakes.write_version(tmp_path, fakes.doubler())
    version = {"key": "doubler/1", "name": "doubler", "version": 1, "path": str(folder), "serve_as": None}
    version |= {"placement": "auto", "threads": 1, "retry": False}

    async def check() -> None:
        with ThreadPoolExecutor(1) as executor:
            checker = Checker(Settings(), Openings(tmp_path, "checker", 60), 2, executor)
            answer = await checker.check(version)
        assert (answer["place"], loads) == ("engine", [(1, False), (2, True)])

    asyncio.run(check())


def test_version_is_not_refused_for_a_checker_that_is_stopped_while_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody listens yet, so its worker gives up for now, and asks again in a while, though its files are the same."""
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.05)
    fakes.write_version(tmp_path / "models", fakes.doubler().only("onnx"))
    settings, requests = Settings(models_dir=tmp_path / "models", device="cpu"), []
    client = CheckerClient(tmp_path, lambda: requests.append(time.monotonic()), threading.Event())
    registry = Registry(settings, engines=Engines(client, {}, threading.Event()))
    registry.load()
    assert registry.problem == "doubler: the process that would open it is not running; it is tried again"
    assert requests
    assert registry.retry_at < math.inf

    async def serve_when_resumed() -> None:
        with ThreadPoolExecutor(1) as executor:
            checker = Checker(settings, Openings(tmp_path, CHECKER, 60), 1, executor)

            async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await checker.check_all((await channel.read(reader))[0]["versions"], writer)
                writer.close()

            async with await asyncio.start_unix_server(answer, tmp_path / f"{CHECKER}.sock"):
                await asyncio.sleep(max(0.0, registry.retry_at - time.monotonic()))
                registry.commit(await asyncio.to_thread(registry.prepare, debounce=True))

    asyncio.run(serve_when_resumed())
    assert (registry.problem, sorted(registry.models["doubler"].versions)) == ("", [1])
