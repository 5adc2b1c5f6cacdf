"""Plots count correctly."""

import numpy as np
from numpy.typing import NDArray

from training.plots import count_confusions


def test_confusions() -> None:
    """Rows are labels, columns predictions, and every instance is counted once."""
    labels: NDArray[np.int64] = np.array([0, 0, 1, 2, 2, 2])
    decided: NDArray[np.intp] = np.array([0, 1, 1, 2, 2, 0])
    assert count_confusions(labels, decided, 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 2]]
