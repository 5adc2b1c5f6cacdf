"""The parts written by hand equal torch's, and work where the tutorials' versions fail."""

import pytest
import torch
from torch import nn

from training import by_hand
from training.data import Split, Splits, least_squares, load_half_plane, load_line
from training.evaluate import parameters
from training.progress import Progress
from training.recipes import fit_linear
from training.trainer import Settings


def test_cross_entropy_equals_torch() -> None:
    """Loss and gradient on the logit are those of `BCEWithLogitsLoss`."""
    for y in (0.0, 1.0):
        ours = torch.linspace(-8, 8, 33, requires_grad=True)
        theirs = ours.detach().clone().requires_grad_()
        targets = torch.full((33,), y)
        loss = by_hand.cross_entropy(ours, targets).sum()
        reference = nn.functional.binary_cross_entropy_with_logits(theirs, targets, reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]
        reference.backward()  # type: ignore[no-untyped-call]
        assert ours.grad is not None
        torch.testing.assert_close(loss, reference)
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("logit", [-200.0, 200.0])
@pytest.mark.parametrize("y", [0.0, 1.0])
def test_cross_entropy_is_finite_where_the_formula_is_not(logit: float, y: float) -> None:
    """At logits whose sigmoid rounds to 0 or 1 the tutorial's formula gives NaN or infinity; on the logit, neither."""
    z = torch.tensor([[logit]], requires_grad=True)
    target = torch.tensor([y])
    p = torch.sigmoid(z.detach())
    naive = -(target * torch.log(p) + (1 - target) * torch.log(1 - p))
    loss = by_hand.cross_entropy(z, target)
    loss.backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    assert not torch.isfinite(naive).all() or logit < 0
    assert torch.isfinite(loss).all()
    assert torch.isfinite(z.grad).all()


def test_sgd_equals_torch() -> None:
    """A step on a summed loss divided by the batch size is `optim.SGD`'s on the mean, and it zeroes the gradient."""
    x, y = torch.randn(5, 1, generator=torch.Generator().manual_seed(1)), torch.arange(5.0).reshape(5, 1)
    w = torch.ones(1, requires_grad=True)
    other = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([other], lr=0.1)
    by_hand.squared_loss(x * w, y).backward()  # type: ignore[no-untyped-call]
    by_hand.sgd([w], 0.1, batch_size=5)
    nn.functional.mse_loss(x * other, y).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    torch.testing.assert_close(w, other)
    assert w.grad is not None
    assert w.grad.item() == 0
    assert w.is_leaf


def test_every_instance_once_in_a_new_order() -> None:
    """Every epoch yields all 100 instances once, including the last 4, in a new order."""
    torch.manual_seed(0)
    x = torch.arange(100.0).reshape(100, 1)
    epochs = [list(by_hand.shuffled_batches(x, 2 * x, 16)) for _ in range(2)]
    orders = []
    for batches in epochs:
        assert [len(inputs) for inputs, _ in batches] == [16] * 6 + [4]
        assert all(torch.equal(targets, 2 * inputs) for inputs, targets in batches)
        orders.append(torch.cat([inputs for inputs, _ in batches]))
        assert torch.equal(orders[-1].sort(dim=0).values, x)
    assert not torch.equal(orders[0], orders[1])


def test_broadcasting_trap_is_refused() -> None:
    """(16, 1) − (16,) is an error here, not 256 differences."""
    with pytest.raises(ValueError, match="differ in shape"):
        by_hand.squared_loss(torch.zeros(16, 1), torch.zeros(16))


def test_broadcasting_trap_fits_a_flat_line() -> None:
    """The recipe `linear` with (16, 1) − (16,) gives the figures in docs/training.md."""
    train = load_line().train
    flat = Split(train.inputs, train.targets.reshape(-1))
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="broadcasting"):
        fitted = fit_linear(Splits(flat, flat), Settings(100, torch.device("cpu")))
    mse = nn.functional.mse_loss(fitted.net(train.inputs), train.targets).item()
    assert parameters(fitted)[0].item() == pytest.approx(5.3, abs=0.1)
    assert mse == pytest.approx(1533, abs=5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_line_is_the_closed_form(seed: int) -> None:
    """A hundred epochs by hand end within 1 % of the least squares slope and error, and near its intercept."""
    torch.manual_seed(seed)
    train = load_line().train
    slope, intercept = least_squares(train)
    inputs, targets = train.inputs.double(), train.targets.double()
    with Progress("linear-by-hand", 100, 7) as progress:
        w, b, history = by_hand.fit_linear(inputs, targets, 100, progress)
    mse = ((inputs * w + b - targets) ** 2).mean().item()
    assert w.item() == pytest.approx(slope, rel=0.01)
    assert b.item() == pytest.approx(intercept, rel=0.03)
    assert mse == pytest.approx(114.171, rel=0.01)
    assert history[-1].loss == pytest.approx(mse, rel=0.02)


def test_logistic_finds_the_direction() -> None:
    """After five epochs of larger steps the weights point along (0.5, −1.5)."""
    torch.manual_seed(0)
    train = load_half_plane().train
    with Progress("logistic-by-hand", 5, 1000) as progress:
        w, _, history = by_hand.fit_logistic(train.inputs, train.targets, 5, progress, lr=0.05)
    truth = torch.tensor([0.5, -1.5])
    assert torch.cosine_similarity(w.reshape(-1), truth, dim=0) > 0.999
    assert history[-1].loss < history[0].loss
    assert (history[-1].accuracy or 0) > 0.98


def test_logistic_equals_torch() -> None:
    """One epoch by hand ends where `BCEWithLogitsLoss` and `optim.SGD` end from the same start."""
    train = load_half_plane().train
    inputs, targets = train.inputs[:50], train.targets[:50]
    torch.manual_seed(3)
    with Progress("logistic-by-hand", 1, 50) as progress:
        w, b, _ = by_hand.fit_logistic(inputs, targets, 1, progress, lr=0.1)
    torch.manual_seed(3)
    net = nn.Linear(2, 1)
    torch.manual_seed(3)
    with torch.no_grad():
        net.weight.copy_(torch.randn(2, 1).reshape(1, 2))
        net.bias.zero_()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for x, y in zip(inputs, targets, strict=True):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(net(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    torch.testing.assert_close(w.reshape(1, 2), net.weight.detach())
    torch.testing.assert_close(b.reshape(1), net.bias.detach())
