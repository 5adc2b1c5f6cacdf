"""What a backend call costs, measured when a model is loaded: where requests run follows, and how many share a call."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from service.errors import InferenceError
from service.model.backends import Array

BUDGET_SECONDS = 0.2  # that the calls of one measurement may take before the last begins
REPEAT_SECONDS = 0.05  # a quarter of it: calls of one size are not repeated once they have taken so long
CHEAP_SECONDS = 0.02  # a call shorter than this holds nobody up, so it may have as many rows as it likes
SHORT_SECONDS = 0.1  # a call up to this may have more rows as long as they take no longer each, but for noise
NOISE, GAIN = 0.97, 1.05  # rows per second over those of half the rows, of a short call and of a longer one


@dataclass(frozen=True)
class Cost:
    """Seconds that one backend call takes: `fixed + each * rows`.

    Attributes:
        fixed: for the call.
        each: for each row.
        batch: rows beyond which a larger call gains nothing.
    """

    fixed: float
    each: float
    batch: int = sys.maxsize

    @property
    def per_row(self) -> float:
        """Seconds of a row in a call of the best size."""
        return self.fixed / self.batch + self.each

    def rows_within(self, seconds: float) -> int:
        """Return how many rows one call can take in `seconds`."""
        return max(0, int((seconds - self.fixed) / self.each))

    def seconds(self, rows: int) -> float:
        """Return how long `rows` rows take in calls of `batch` rows."""
        return self.fixed * -(-rows // self.batch) + self.each * rows


def measure_cost(predict: Callable[[Array], Array], shape: tuple[int, ...], max_rows: int) -> Cost:
    """Measure a model on zeros: one row, then twice as many as long as that pays and the budget lasts.

    Args:
        predict: float32 (N, *shape) to float32 (N, K).
        shape: of one row.
        max_rows: in one call.

    Raises:
        ServiceError: `predict` fails on one row.
    """
    one, spent = time_calls(predict, np.zeros((1, *shape), np.float32))
    batch, best = 1, one
    while batch < max_rows and spent < BUDGET_SECONDS:
        is_cheap = max_rows * best <= CHEAP_SECONDS * batch
        rows = max_rows if is_cheap else min(2 * batch, max_rows)
        inputs = np.zeros((rows, *shape), np.float32)
        try:
            seconds, charged = time_calls(predict, inputs, best * rows / batch, BUDGET_SECONDS - spent)
        except InferenceError:  # such as too little memory
            break
        spent += charged
        needed = NOISE if seconds <= SHORT_SECONDS else GAIN
        if not is_cheap and seconds > CHEAP_SECONDS and rows / seconds < needed * batch / best:
            break
        batch, best = rows, seconds
    each = max((best - one) / (batch - 1) if batch > 1 else one, 1e-7)
    return Cost(max(one - each, 0.0), each, batch)


def time_calls(
    predict: Callable[[Any], Any],
    inputs: Any,  # noqa: ANN401 - as `Batcher` takes them
    expected: float = float("inf"),
    limit: float = REPEAT_SECONDS,
) -> tuple[float, float]:
    """Call up to three times, and not again after `REPEAT_SECONDS` or `limit`.

    Args:
        predict: what to call.
        inputs: its argument.
        expected: seconds that a call takes at most; what is beyond is warming up, and no reason to stop.
        limit: seconds after which no further call begins.

    Returns:
        The seconds of the fastest call, and those of all of them without warming up.
    """
    best, charged = float("inf"), 0.0
    for _ in range(3):
        start = time.perf_counter()
        predict(inputs)
        seconds = time.perf_counter() - start
        best = min(best, seconds)
        charged += min(seconds, expected)
        if charged > min(REPEAT_SECONDS, limit):
            break
    return best, charged
