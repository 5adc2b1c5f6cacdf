"""Tests of service.model.opener, with a made-up GPU."""

from pathlib import Path
from typing import Any

import pytest

from service.errors import DeviceLostError, ModelRefusedError, ServiceError
from service.model import opener as module
from service.model.cost import Cost
from service.model.opener import Opener
from service.model.openings import Openings
from service.settings import Settings

FIELDS = {"key": "doubler/1", "name": "doubler", "version": 1, "path": "doubler/1", "serve_as": None, "retry": False}
GPU_COST = Cost(fixed=0.0, each=0.002, batch=8)


class Predictor:
    """What is measured as `GPU_COST`."""

    class manifest:  # noqa: N801, D106 - an attribute
        task = "regression"

    def measure_cost(self, max_rows: int) -> Cost:
        """Return the cost."""
        return GPU_COST


class Loads:
    """Stands in for `load_any_predictor`; fails with `error` if there is one, and counts."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.devices: list[str] = []

    def __call__(self, path: Path, backend: str, device: str, threads: int, **more: Any) -> Predictor:
        """Load."""
        self.devices.append(device)
        if self.error is not None:
            raise self.error
        return Predictor()


def build(folder: Path, device: str = "cuda:0") -> Opener:
    """Return an opener whose failures are kept in a folder."""
    return Opener(Settings(), Openings(folder, f"engine-{device}", 10), device, 1)


def test_cpu_takes_the_cost_as_it_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the checker has found on the same device is not measured again."""
    monkeypatch.setattr(module, "load_any_predictor", loads := Loads())
    _, cost = build(tmp_path, "cpu").open(FIELDS | {"verified": "digest", "cost": [0.1, 0.2, 3]})
    assert (cost, loads.devices) == (Cost(0.1, 0.2, 3), ["cpu"])


@pytest.mark.parametrize(("rival", "is_opened"), [(None, True), (0.003, True), (0.001, False)])
def test_version_is_opened_where_a_row_costs_less(
    rival: float | None, is_opened: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that costs more than on the CPU is told so, and not measured again for another worker."""
    monkeypatch.setattr(module, "load_any_predictor", loads := Loads())
    opener = build(tmp_path)
    for _ in range(2):
        if is_opened:
            assert opener.open(FIELDS | {"rival": rival})[1] == GPU_COST
        else:
            with pytest.raises(ModelRefusedError, match="a row takes 2 ms on cuda:0 and 1 ms on the CPU"):
                opener.open(FIELDS | {"rival": rival})
    assert loads.devices == ["cuda:0"] * (2 if is_opened else 1)


def test_failure_is_told_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A version that failed is tried again only when that is asked for."""
    monkeypatch.setattr(module, "load_any_predictor", loads := Loads(ModelRefusedError("no kernel")))
    for retry in (False, False, True):
        with pytest.raises(ModelRefusedError, match="no kernel"):
            build(tmp_path).open(FIELDS | {"retry": retry})
    assert len(loads.devices) == 2
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["model doubler version 1 cannot run on cuda:0: no kernel"] * 2


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_version_that_breaks_the_gpu_ends_the_process(
    is_wrapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if that happens in its golden check; it is not opened there again."""
    error: Exception = DeviceLostError("CUDA failure 700")
    if is_wrapped:
        error, error.__cause__ = ModelRefusedError("its graph fails"), error
    monkeypatch.setattr(module, "load_any_predictor", loads := Loads(error))
    ended: list[bool] = []
    monkeypatch.setattr("os.abort", lambda: ended.append(True))
    for _ in range(2):
        with pytest.raises(ServiceError):
            build(tmp_path).open(FIELDS)
    assert (ended, loads.devices) == ([True], ["cuda:0"])
