"""The tutorials' programs as functions: the same statements, with what the tests change as arguments."""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - as in the text
from sklearn.datasets import make_regression
from torch import Tensor, nn, optim


class Stop(NamedTuple):
    """Where the two clouds' training stops: iteration, points right, loss, weights and bias."""

    iteration: int
    right: int
    loss: float
    weights: list[float]
    bias: float


def separate_clouds() -> Stop:
    """Two Gaussian clouds: stop when the accuracy, a Python float, is more than 0.99."""
    torch.manual_seed(10)
    sample_nums = 100
    n_data = torch.ones(sample_nums, 2)
    x0 = torch.normal(1.7 * n_data, 1) + 1
    y0 = torch.zeros(sample_nums)
    x1 = torch.normal(-1.7 * n_data, 1) + 1
    y1 = torch.ones(sample_nums)
    train_x = torch.cat((x0, x1), 0)
    train_y = torch.cat((y0, y1), 0)
    features = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(features.parameters(), lr=0.01, momentum=0.9)
    loss_fn = nn.BCELoss()
    for iteration in range(1000):
        y_pred = torch.sigmoid(features(train_x))
        loss = loss_fn(y_pred.squeeze(), train_y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if iteration % 20 == 0:
            mask = y_pred.ge(0.5).float().squeeze()
            correct = (mask == train_y).sum()
            acc = correct.item() / train_y.size(0)
            if acc > 0.99:
                w0, w1 = features.weight[0]
                return Stop(iteration, int(correct), loss.item(), [w0.item(), w1.item()], features.bias[0].item())
    raise AssertionError("it does not stop")


def study(epochs: int = 1000, **reduction: Any) -> list[float]:
    """Pass or fail from hours of study: the loss of each epoch, summed over the three students."""
    x_data = torch.Tensor([[1.0], [2.0], [3.0]])
    y_data = torch.Tensor([[0], [0], [1]])
    linear = nn.Linear(1, 1)
    criterion = nn.BCELoss(**(reduction or {"reduction": "sum"}))
    optimizer = optim.SGD(linear.parameters(), lr=0.01)
    losses = []
    for _ in range(epochs):
        y_pred = F.sigmoid(linear(x_data))
        loss = criterion(y_pred, y_data)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def descend_by_hand(seed: int, epochs: int) -> tuple[int, int] | None:
    """A logistic regression with tensors alone: the epoch and sample at which the loss becomes NaN, if it does."""
    torch.manual_seed(seed)
    x = torch.randn(1000, 2)
    y = torch.tensor([[1.0] if 0.5 * each[0] - 1.5 * each[1] > 0 else [0.0] for each in x])
    w = torch.randn(2, 1, requires_grad=True)
    b = torch.zeros(1, 1, requires_grad=True)
    lr = 0.001
    for epoch in range(epochs):
        for i in range(1000):
            y_hat = torch.sigmoid(w.t() @ x[i].reshape(2, 1) + b)
            loss = -(y[i] * torch.log(y_hat) + (1 - y[i]) * torch.log(1 - y_hat))
            if torch.isnan(loss):
                return epoch, i
            loss.backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                w -= lr * w.grad  # type: ignore[operator]
                b -= lr * b.grad  # type: ignore[operator]
            w.grad.zero_()  # type: ignore[union-attr]
            b.grad.zero_()  # type: ignore[union-attr]
    return None


class LineFit(NamedTuple):
    """A line, and which points trained it."""

    w: float
    b: float
    trained: set[int]


def fit_line_by_hand() -> LineFit:
    """Linear regression with tensors alone: the shuffled index is computed and not used, and 4 points never train."""
    x, y, _ = make_regression(n_samples=100, n_features=1, noise=10, coef=True, bias=14.5, random_state=0)
    x, y = torch.tensor(x), torch.tensor(y)
    w = torch.tensor(0.1, requires_grad=True, dtype=torch.float64)
    b = torch.tensor(0.0, requires_grad=True, dtype=torch.float64)
    trained: set[int] = set()
    for _ in range(100):
        data_len, batch_size = len(y), 16
        data_index = list(range(data_len))
        np.random.shuffle(data_index)  # and nothing reads it
        for index in range(data_len // batch_size):
            start, end = index * batch_size, (index + 1) * batch_size
            trained.update(range(start, end))
            batch_x, batch_y = x[start:end], y[start:end]
            y_pred = batch_x * w + b
            loss = ((y_pred - batch_y.reshape(-1, 1)) ** 2).sum()
            if w.grad is not None and b.grad is not None:
                w.grad.zero_()
                b.grad.zero_()
            loss.backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                w -= 0.01 * w.grad / 16  # type: ignore[operator]
                b -= 0.01 * b.grad / 16  # type: ignore[operator]
    return LineFit(w.item(), b.item(), trained)


def fit_line_without_reshape() -> tuple[float, float]:
    """The same without `reshape(-1, 1)`: (16, 1) − (16,) is a table of 256 differences. Return w and the MSE."""
    x, y, _ = make_regression(n_samples=100, n_features=1, noise=10, coef=True, bias=14.5, random_state=0)
    x, y = torch.tensor(x).float(), torch.tensor(y).float()
    net = nn.Linear(1, 1)
    optimizer = optim.SGD(net.parameters(), lr=0.01)
    for _ in range(100):
        for start in range(0, 100, 16):
            loss = ((net(x[start : start + 16]) - y[start : start + 16]) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.weight.item(), ((net(x)[:, 0] - y) ** 2).mean().item()


def third_derivative() -> Tensor:
    """Differentiate x² at 3 three times."""
    x = torch.tensor([3.0], requires_grad=True)
    y = torch.pow(x, 2)
    grad_1 = torch.autograd.grad(y, x, create_graph=True)
    grad_2 = torch.autograd.grad(grad_1[0], x, create_graph=True)
    return torch.autograd.grad(grad_2[0], x)[0]
