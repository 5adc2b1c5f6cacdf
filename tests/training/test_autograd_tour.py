"""Every value that the autograd tour shows."""

import pytest

from training import autograd_tour as tour


def test_derivative_of_a_product() -> None:
    """dy/dw of (w + x)·(w + 1) at w = 1, x = 2 is 5."""
    assert tour.derive_product() == 5


def test_two_passes_over_one_graph() -> None:
    """A second pass over a retained graph adds to the gradient; a third finds the graph freed."""
    first, second, third = tour.derive_twice()
    assert (first, second) == (5, 10)
    assert third == "Trying to backward through the graph a second time"


def test_weighted_outputs() -> None:
    """Outputs with derivatives 5 and 2, weighted 1 and 2, give 9."""
    assert tour.derive_weighted() == 9


def test_kept_gradient() -> None:
    """`retain_grad` keeps the gradient of a result: dy/da = b = 2."""
    assert tour.keep_gradients() == 2


def test_backward_is_a_function_too() -> None:
    """`torch.autograd.backward(y)` gives what `y.backward()` gives."""
    assert tour.derive_by_function() == tour.derive_product()


def test_repeated_derivatives() -> None:
    """x² at 3 has the derivatives 6, 2 and 0, and each comes as a tuple of one."""
    results = tour.derive_repeatedly()
    assert all(isinstance(result, tuple) and len(result) == 1 for result in results)
    assert [result[0].item() for result in results] == [6, 2, 0]


@pytest.mark.parametrize(("zero", "seen"), [(False, [5, 10, 15, 20]), (True, [5, 5, 5, 5])])
def test_accumulation(zero: bool, seen: list[float]) -> None:
    """Four backward passes add up unless the gradient is zeroed."""
    assert tour.accumulate(zero) == seen


def test_requires_grad_is_inherited() -> None:
    """Results of operations on leaves that require gradients require them too, and are not leaves."""
    assert tour.inherit() == (True, True, True, False)


def test_identity() -> None:
    """`a = a + 1` makes a new tensor, `a += 1` does not."""
    assert tour.keep_identity() == (False, True)


def test_leaf_in_place() -> None:
    """An in-place change of a leaf that requires a gradient is refused."""
    assert "leaf Variable that requires grad" in tour.change_leaf_in_place()


def test_descent() -> None:
    """500 steps on x² from 10 with lr 0.01 end at 10·0.98⁵⁰⁰."""
    path = tour.descend()
    assert len(path) == 501
    assert path[:3] == pytest.approx([10, 9.8, 9.604])
    assert path[-1] == pytest.approx(10 * 0.98**500, rel=1e-3)


def test_tour_prints_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    """The tour runs as a whole and prints the values that the other tests check."""
    tour.main()
    printed = capsys.readouterr().out
    for value in (
        "= 5",
        "= 9",
        "derivative: 6",
        "derivative: 2",
        "derivative: 0",
        "[5.0, 10.0, 15.0, 20.0]",
        "4.102e-04",
    ):
        assert value in printed
