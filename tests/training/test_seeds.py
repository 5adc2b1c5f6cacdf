"""Of several seeds the best on validation is chosen; intervals follow their formulas."""

import pytest

from training.nets import LinearNet
from training.progress import Epoch
from training.seeds import Candidate, choose_candidate, mean_interval, wilson_interval
from training.trainer import Fitted


def build_candidate(seed: int, *history: Epoch) -> Candidate:
    """Return a candidate of a history."""
    return Candidate(seed, Fitted(LinearNet(1), list(history)), temperature=1.0, seconds=0.0)


def test_validation_chooses() -> None:
    """The highest validation accuracy of the kept epoch wins, then the lowest loss; training figures do not matter."""
    first = build_candidate(0, Epoch(0.0, 1.0, 0.3, 0.97), Epoch(0.0, 1.0, 0.4, 0.99))
    second = build_candidate(1, Epoch(0.5, 0.5, 0.35, 0.98))
    third = build_candidate(2, Epoch(0.9, 0.4, 0.2, 0.98))
    assert choose_candidate([first, second, third]).seed == 2


def test_without_validation_the_first_is_chosen() -> None:
    """No other figure chooses, least of all the test split's."""
    assert choose_candidate([build_candidate(5, Epoch(0.9)), build_candidate(1, Epoch(0.1))]).seed == 5


def test_mean_interval() -> None:
    """Three values 1, 2, 3: s = 1, t(2) = 4.303, so 2 ± 2.484; one value has no interval."""
    interval = mean_interval([1.0, 2.0, 3.0])
    assert (interval.low, interval.mean, interval.high) == pytest.approx((-0.484, 2.0, 4.484), abs=1e-3)
    assert mean_interval([0.5]).high == 0.5


def test_wilson_interval() -> None:
    """9,970 of 10,000 give 99.57 … 99.79 %; the upper end never exceeds 1."""
    interval = wilson_interval(9970, 10_000)
    assert (interval.low, interval.high) == pytest.approx((0.99572, 0.99790), abs=2e-5)
    assert wilson_interval(10, 10).high == pytest.approx(1)
    assert wilson_interval(10, 10).low == pytest.approx(0.722, abs=1e-3)
