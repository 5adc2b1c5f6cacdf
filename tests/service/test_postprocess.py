"""Tests of service.model.postprocess."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from service.model import postprocess
from service.model.backends import Array
from tests import fakes

LOGITS = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, max_side=8),
    elements=st.floats(-1e4, 1e4, width=32),
)


@given(LOGITS)
def test_softmax_rows_sum_to_one(logits: Array) -> None:
    """Every row is a distribution, however large the logits."""
    rows = postprocess.softmax(logits)
    assert rows.dtype == np.float32
    assert (rows >= 0).all()
    np.testing.assert_allclose(rows.sum(axis=1), 1, rtol=1e-5)


@given(LOGITS, st.integers(-1000, 1000))
def test_softmax_is_shift_invariant(logits: Array, shift: int) -> None:
    """Adding a number to a row changes nothing."""
    rounded = (np.round(logits * 8) / 8).astype(np.float32)  # so that the shift is exact in float32
    np.testing.assert_array_equal(postprocess.softmax(rounded), postprocess.softmax(rounded + np.float32(shift)))


def test_softmax_does_not_overflow() -> None:
    """Finite logits of any size give probabilities, and numpy warns of nothing (warnings are errors here)."""
    logits = np.array([[3e38, -3e38, 0], [-3e38, -3e38, -3e38]], np.float32)
    expected = [[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]]
    np.testing.assert_allclose(postprocess.softmax(logits), expected, rtol=1e-6)


@pytest.mark.parametrize(("logit", "expected"), [(1e4, 1.0), (-1e4, 0.0), (0.0, 0.5), (88.8, 1.0), (-3e38, 0.0)])
def test_sigmoid_does_not_overflow(logit: float, expected: float) -> None:
    """Logits of any size give a probability, and numpy warns of nothing (warnings are errors here)."""
    assert postprocess.sigmoid(np.array([logit], np.float32)).tolist() == [expected]


@given(arrays(np.float32, 16, elements=st.floats(-50, 50, width=32)))
def test_sigmoid_is_symmetric_and_monotone(logits: Array) -> None:
    """sigmoid(-z) is 1 - sigmoid(z), and a larger logit has no smaller probability."""
    np.testing.assert_allclose(postprocess.sigmoid(-logits), 1 - postprocess.sigmoid(logits), atol=1e-6)
    assert (np.diff(postprocess.sigmoid(np.sort(logits))) >= 0).all()


def test_threshold_is_reached_by_equality() -> None:
    """P >= threshold decides for the second label, compared as float32: a probability of 0.7 reaches 0.7."""
    manifest = fakes.coin().manifest()  # its threshold is 0.7
    below = np.nextafter(np.float32(0.7), np.float32(0))
    rows = np.array([[0.3, 0.7], [0.3, below], [0.2, 0.8]], np.float32)
    assert postprocess.decide(rows, manifest).tolist() == [1, 0, 1]
    assert postprocess.decide(rows, manifest, 0.75).tolist() == [0, 0, 1]
    assert postprocess.decide(rows, manifest, 0.0).tolist() == [1, 1, 1]


def test_threshold_is_the_requests_then_the_manifests_then_a_half() -> None:
    """A request's threshold wins over the manifest's, and that over 0.5."""
    assert postprocess.choose_threshold(fakes.coin().manifest(), 0.2) == 0.2
    assert postprocess.choose_threshold(fakes.coin().manifest(), 0.0) == 0.0
    assert postprocess.choose_threshold(fakes.coin().manifest()) == 0.7
    assert postprocess.choose_threshold(fakes.switch().manifest()) == 0.5


def test_binary_has_both_probabilities_in_label_order() -> None:
    """One probability or one logit becomes two columns: of the first label and of the second."""
    np.testing.assert_allclose(
        postprocess.interpret(np.array([[0.25]], np.float32), fakes.coin().manifest()), [[0.75, 0.25]]
    )
    switch = fakes.switch().manifest()
    results = postprocess.interpret(np.zeros((1, 1), np.float32), switch)
    np.testing.assert_allclose(results, [[0.5, 0.5]])


def test_multiclass_decides_by_the_largest() -> None:
    """Logits become probabilities, probabilities stay, and the largest decides; the first of equals."""
    logits = np.array([[0, 3, 0, 0], [1, 1, 1, 1]], np.float32)
    compass = fakes.compass().manifest()
    rows = postprocess.interpret(logits, compass)
    np.testing.assert_allclose(rows.sum(axis=1), 1, rtol=1e-6)
    assert postprocess.decide(rows, fakes.compass().manifest()).tolist() == [1, 0]
    kept = np.full((1, 10), 0.1, np.float32)
    assert postprocess.interpret(kept, fakes.canvas().manifest()) is kept


def test_regression_is_left_as_it_is() -> None:
    """A regression's values are the graph's."""
    values = np.array([[3.25]], np.float32)
    assert postprocess.interpret(values, fakes.doubler().manifest()) is values
