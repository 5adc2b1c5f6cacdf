"""Two regressions with nothing but tensors and autograd, written to be read from top to bottom.

No `nn`, no `optim`, no `DataLoader`: parameters are tensors that require gradients, losses are formulas, an update is
an assignment. Each step has the same five parts:

    predict  →  loss  →  loss.backward()  →  update the parameters under no_grad  →  zero the gradients
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from training.progress import Epoch, Progress

# --- Shared by both regressions --------------------------------------------------------------------------------------


def sgd(parameters: list[Tensor], lr: float, batch_size: int) -> None:
    """Move every parameter against its gradient, and zero the gradient.

    The losses below are sums over a batch, so the gradient is divided by the number of instances *in this batch*: the
    last batch of an epoch may be short.
    """
    with torch.no_grad():  # the update is not part of the function to differentiate
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.sub_(lr * parameter.grad / batch_size)  # in place: it stays the same leaf
                parameter.grad.zero_()  # backward() adds to what is there


# --- Logistic regression, one instance at a time ---------------------------------------------------------------------


def compute_logit(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Return wᵀx + b, shape (1, 1), for x (2, 1), w (2, 1), b (1, 1); the probability is its sigmoid."""
    return w.T @ x + b


def cross_entropy(logit: Tensor, y: Tensor) -> Tensor:
    """Return −(y·log ŷ + (1 − y)·log(1 − ŷ)) with ŷ = sigmoid(logit), written on the logit.

    Once ŷ rounds to exactly 1, log(1 − ŷ) is −∞ and 0·(−∞) is NaN. log ŷ = logsigmoid(logit) and
    log(1 − ŷ) = logsigmoid(−logit) have the same values and gradients, and are always finite.
    """
    return -(y * logsigmoid(logit) + (1 - y) * logsigmoid(-logit))


def fit_logistic(
    inputs: Tensor, targets: Tensor, epochs: int, progress: Progress, lr: float = 0.001
) -> tuple[Tensor, Tensor, list[Epoch]]:
    """Fit a logistic regression by stochastic gradient descent, one instance per step in the given order.

    Args:
        inputs: float32 (N, 2).
        targets: float32 (N, 1), 0 or 1.
        epochs: passes over the instances.
        progress: receives every step and epoch.
        lr: learning rate.

    Returns:
        w (2, 1), b (1, 1), and one record per epoch: mean loss and accuracy, each instance before its own step.
    """
    w = torch.randn(2, 1).to(inputs.device).requires_grad_()
    b = torch.zeros(1, 1).to(inputs.device).requires_grad_()
    history = []
    for _ in range(epochs):
        total_loss, correct = 0.0, 0
        for x, y in zip(inputs, targets, strict=True):
            logit = compute_logit(x.reshape(2, 1), w, b)
            loss = cross_entropy(logit, y)
            loss.backward()  # type: ignore[no-untyped-call]
            sgd([w, b], lr, batch_size=1)
            total_loss += loss.item()
            correct += int((logit.item() >= 0) == (y.item() == 1))
            progress.step()
        history.append(Epoch(total_loss / len(inputs), correct / len(inputs)))
        progress.epoch(history[-1])
    return w.detach(), b.detach(), history


# --- Linear regression, in shuffled batches --------------------------------------------------------------------------


def shuffled_batches(inputs: Tensor, targets: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all instances once, in a new random order, `batch_size` at a time; the last batch may be smaller."""
    order = torch.randperm(len(inputs)).to(inputs.device)
    for start in range(0, len(inputs), batch_size):
        chosen = order[start : start + batch_size]
        yield inputs[chosen], targets[chosen]


def compute_line(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Return w·x + b, shape (N, 1), for x (N, 1)."""
    return x * w + b


def squared_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of (prediction − target)² over a batch.

    Raises:
        ValueError: the shapes differ. (N, 1) − (N,) would silently broadcast to N × N differences, and gradient
            descent would then fit every prediction to every target: a nearly flat line.
    """
    if predictions.shape != targets.shape:
        raise ValueError(f"predictions {tuple(predictions.shape)} and targets {tuple(targets.shape)} differ in shape")
    return ((predictions - targets) ** 2).sum()


def fit_linear(
    inputs: Tensor,
    targets: Tensor,
    epochs: int,
    progress: Progress,
    lr: float = 0.01,
    batch_size: int = 16,
) -> tuple[Tensor, Tensor, list[Epoch]]:
    """Fit a line by stochastic gradient descent in shuffled batches.

    Args:
        inputs: float64 (N, 1).
        targets: float64 (N, 1).
        epochs: passes over the instances.
        progress: receives every step and epoch.
        lr: learning rate.
        batch_size: instances per step.

    Returns:
        w (1,), b (1,), float64, and one record per epoch: the mean squared error, each batch before its own step.
    """
    w = torch.tensor([0.1], dtype=torch.float64, device=inputs.device, requires_grad=True)
    b = torch.tensor([0.0], dtype=torch.float64, device=inputs.device, requires_grad=True)
    history = []
    for _ in range(epochs):
        total_loss = 0.0
        for x, y in shuffled_batches(inputs, targets, batch_size):
            loss = squared_loss(compute_line(x, w, b), y)
            loss.backward()  # type: ignore[no-untyped-call]
            sgd([w, b], lr, batch_size=len(x))
            total_loss += loss.item()
            progress.step()
        history.append(Epoch(total_loss / len(inputs)))
        progress.epoch(history[-1])
    return w.detach(), b.detach(), history
