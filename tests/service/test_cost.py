"""Tests of service.model.cost."""

from collections.abc import Callable
from dataclasses import astuple

import numpy as np
import pytest

from service.errors import InferenceError
from service.model import cost as module
from service.model.backends import Array
from service.model.cost import Cost, measure_cost, time_calls


class Clock:
    """A model whose calls take as long as is said, on a clock of its own, and the sizes of its calls."""

    def __init__(self, seconds: Callable[[int], float], warming: float = 0.0, most: int = 1000) -> None:
        self.now = 0.0
        self.sizes: list[int] = []
        self._seconds = seconds
        self._warming = warming
        self._most = most

    def perf_counter(self) -> float:
        """Return the time."""
        return self.now

    def __call__(self, inputs: Array) -> Array:
        """Take a call's time; the first of each size warms up, too."""
        rows = len(inputs)
        assert not inputs.any()
        if rows > self._most:
            raise InferenceError("out of memory")
        self.now += self._seconds(rows) + (self._warming if rows not in self.sizes else 0)
        self.sizes.append(rows)
        return inputs


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Callable[[Clock, int], Cost]:
    """Return `measure_cost` on the model's own clock."""

    def run(clock: Clock, max_rows: int) -> Cost:
        monkeypatch.setattr(module, "time", clock)
        return measure_cost(clock, (3,), max_rows)

    return run


Measure = Callable[[Clock, int], Cost]


def test_cost_tells_how_many_rows_fit() -> None:
    """rows_within inverts the cost of a call; nothing fits where one call is too dear."""
    assert Cost(fixed=0.5, each=0.25).rows_within(1.5) == 4
    assert Cost(fixed=1.0, each=1.0).rows_within(0.002) == 0


def test_cost_of_many_rows_is_that_of_their_calls() -> None:
    """Each call of up to `batch` rows has the fixed cost once."""
    cost = Cost(fixed=1.0, each=0.25, batch=4)
    assert [cost.seconds(rows) for rows in (0, 1, 4, 5, 9)] == [0, 1.25, 2, 3.25, 5.25]
    assert Cost(fixed=1.0, each=0.25).seconds(1000) == 251


def test_cheap_model_is_measured_at_both_ends(measure: Measure) -> None:
    """Where the largest batch is cheap, it is allowed, whether or not it pays, and nothing between is run."""
    clock = Clock(lambda rows: 0.0001 * rows)
    assert astuple(measure(clock, 64)) == pytest.approx((0, 0.0001, 64), abs=1e-9)
    assert clock.sizes == [1] * 3 + [64] * 3


def test_free_model_has_a_cost(measure: Measure) -> None:
    """A row always costs something, or any number of them would fit into no time."""
    cost = measure(Clock(lambda rows: 0.0), 64)
    assert (cost.fixed, cost.batch) == (0, 64)
    assert cost.each > 0


def test_heavy_model_whose_batches_gain_nothing_runs_row_by_row(measure: Measure) -> None:
    """Two rows take twice as long as one, and one row takes long enough."""
    clock = Clock(lambda rows: 0.12 * rows)
    assert astuple(measure(clock, 64)) == pytest.approx((0, 0.12, 1))
    assert clock.sizes == [1, 2]


def test_short_calls_take_more_rows_at_no_loss(measure: Measure) -> None:
    """A ResNet-50 on a CPU: rows that take no longer each share a call, up to a tenth of a second."""
    clock = Clock(lambda rows: 0.019 * rows)
    assert measure(clock, 64).batch == 4
    assert sum(clock.sizes) * 0.019 < 0.3


def test_batch_grows_as_long_as_it_pays(measure: Measure) -> None:
    """On a GPU most of a call is fixed, until the rows fill it; the line goes through one row and the best batch."""
    clock = Clock(lambda rows: 0.01 + 0.0006 * max(rows - 16, 0))
    cost = measure(clock, 64)
    assert cost.batch == 32
    assert cost.seconds(1) == pytest.approx(0.01)
    assert cost.seconds(32) == pytest.approx(0.0196)
    assert clock.now < 2 * module.BUDGET_SECONDS


def test_budget_ends_the_measurement(measure: Measure) -> None:
    """A call that takes the whole budget is made once, however much a batch might gain."""
    clock = Clock(lambda rows: 0.25)
    assert measure(clock, 64) == Cost(0.0, 0.25, 1)
    assert clock.sizes == [1]


def test_warming_up_is_no_cost(measure: Measure) -> None:
    """The first call of each size may take long, as where cuDNN looks for the best way; the next ones count."""
    clock = Clock(lambda rows: 0.005 + 0.0005 * rows, warming=0.3)
    clock.sizes.append(1)  # the golden samples were run before
    assert astuple(measure(clock, 16)) == pytest.approx((0.005, 0.0005, 16))


def test_batch_that_fails_is_not_used(measure: Measure) -> None:
    """Where memory is enough for 8 rows at once, calls have 8; a model that cannot run one row has no cost."""
    assert measure(Clock(lambda rows: 0.01, most=8), 64).batch == 8
    with pytest.raises(InferenceError):
        measure(Clock(lambda rows: 0.01, most=0), 64)


@pytest.mark.parametrize("most", [1, 2, 3, 48])
def test_batch_has_no_more_rows_than_allowed(most: int, measure: Measure) -> None:
    """The largest batch need not be a power of two."""
    clock = Clock(lambda rows: 0.03)
    assert measure(clock, most).batch == most or clock.now > module.BUDGET_SECONDS
    assert max(clock.sizes) <= most


def test_inputs_have_the_models_shape() -> None:
    """Rows are float32 zeros of the shape that the manifest says."""
    seen = set()

    def predict(inputs: Array) -> Array:
        seen.add((inputs.shape, inputs.dtype))
        return inputs[:, :1]

    measure_cost(predict, (3, 2), 16)
    assert seen == {((1, 3, 2), np.dtype("float32")), ((16, 3, 2), np.dtype("float32"))}


def test_fastest_of_three_calls_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other work on the machine only makes calls slower."""
    taken = iter([0.003, 0.001, 0.002])
    clock = Clock(lambda rows: next(taken))
    monkeypatch.setattr(module, "time", clock)
    assert time_calls(clock, np.zeros((1, 1), np.float32)) == pytest.approx((0.001, 0.006))
