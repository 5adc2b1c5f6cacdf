"""A tour of autograd in small examples, each a function that returns what it shows.

`python -m training autograd` runs them all; read them from top to bottom. Every number printed is computed.
"""

import torch
from torch import Tensor


def graph() -> tuple[Tensor, Tensor, Tensor]:
    """Return (w, a, b) of w = 1, x = 2, a = w + x, b = w + 1; y is a·b."""
    w = torch.tensor([1.0], requires_grad=True)
    x = torch.tensor([2.0], requires_grad=True)
    return w, w + x, w + 1


def derive_product() -> float:
    """Return dy/dw of y = (w + x)·(w + 1) at w = 1, x = 2: b + a = 2 + 3 = 5."""
    w, a, b = graph()
    (a * b).backward()  # type: ignore[no-untyped-call]
    return gradient(w)


def derive_twice() -> tuple[float, float, str]:
    """Go backward through one graph twice.

    Returns:
        the gradient after the first pass, which keeps the graph (`retain_graph=True`); the gradient after the second,
        which adds to it; and the first words of the error of a third pass, since the second freed the graph.
    """
    w, a, b = graph()
    y = a * b
    y.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    first = gradient(w)
    y.backward()  # type: ignore[no-untyped-call]
    second = gradient(w)
    try:
        y.backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        return first, second, str(error).partition("(")[0].strip()
    return first, second, ""


def derive_weighted() -> float:
    """Return the gradient of several outputs at once, weighted: y₀ = a·b, y₁ = a + b, weights (1, 2).

    1·dy₀/dw + 2·dy₁/dw = 1·5 + 2·2 = 9.
    """
    w, a, b = graph()
    outputs = torch.cat([a * b, a + b])
    outputs.backward(gradient=torch.tensor([1.0, 2.0]))  # type: ignore[no-untyped-call]
    return gradient(w)


def keep_gradients() -> float:
    """Return dy/da = b = 2, which `retain_grad` keeps: without it, only leaves such as w keep their gradients."""
    _, a, b = graph()
    a.retain_grad()
    (a * b).backward()  # type: ignore[no-untyped-call]
    return gradient(a)


def derive_by_function() -> float:
    """Return dy/dw from `torch.autograd.backward(y)`, which is what `y.backward()` calls: 5 again."""
    w, a, b = graph()
    torch.autograd.backward(a * b)
    return gradient(w)


def derive_repeatedly() -> list[tuple[Tensor, ...]]:
    """Return the first, second and third derivative of x² at 3: 6, 2, 0, each as `torch.autograd.grad` returns it.

    It returns a tuple, one gradient per input. `create_graph=True` lets the derivative be differentiated again.
    """
    x = torch.tensor([3.0], requires_grad=True)
    first = torch.autograd.grad(x**2, x, create_graph=True)
    second = torch.autograd.grad(first[0], x, create_graph=True)
    return [first, second, torch.autograd.grad(second[0], x)]


def accumulate(zero: bool) -> list[float]:
    """Return dy/dw after each of four backward passes over fresh graphs, zeroing it in between or not.

    Not zeroed, gradients add up: 5, 10, 15, 20. Zeroed: 5, 5, 5, 5.
    """
    w = torch.tensor([1.0], requires_grad=True)
    x = torch.tensor([2.0], requires_grad=True)
    seen = []
    for _ in range(4):
        ((w + x) * (w + 1)).backward()  # type: ignore[no-untyped-call]
        seen.append(gradient(w))
        if zero and w.grad is not None:
            w.grad.zero_()
    return seen


def inherit() -> tuple[bool, bool, bool, bool]:
    """Return `requires_grad` of a, b and y, made from leaves that require gradients, and whether a is a leaf."""
    _, a, b = graph()
    y = a * b
    return a.requires_grad, b.requires_grad, y.requires_grad, a.is_leaf


def keep_identity() -> tuple[bool, bool]:
    """Return whether a shares its memory after `a = a + 1` (no, it is new) and after `a += 1` (yes)."""
    a = torch.ones(1)
    address = a.data_ptr()
    b = a
    b = b + 1
    same_after_sum = b.data_ptr() == address
    a += 1
    return same_after_sum, a.data_ptr() == address


def change_leaf_in_place() -> str:
    """Return the error raised by changing a leaf with `requires_grad` in place.

    The gradient is needed at the value that went into the graph, and that value would be lost.
    """
    w = torch.tensor([1.0], requires_grad=True)
    try:
        w += 1
    except RuntimeError as error:
        return str(error)
    return ""


def descend(steps: int = 500, lr: float = 0.01, start: float = 10.0) -> list[float]:
    """Return the path of gradient descent on x²: each step multiplies x by 1 − 2·lr, so start·(1 − 2·lr)^step."""
    x = torch.tensor(start, requires_grad=True)
    path = [start]
    for _ in range(steps):
        (x**2).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            x -= lr * gradient(x)
        if x.grad is not None:
            x.grad.zero_()
        path.append(x.item())
    return path


def gradient(tensor: Tensor) -> float:
    """Return the gradient of a one-element tensor, or 0 if there is none yet."""
    return 0.0 if tensor.grad is None else tensor.grad.item()


def main() -> None:
    """Print what each example shows."""
    first, second, third = derive_twice()
    print("w = 1, x = 2, a = w + x, b = w + 1, y = a·b")
    print(f"  dy/dw = b + a = {derive_product():g}")
    print(f"  backward twice over one graph, kept by retain_graph: {first:g}, then {second:g}: gradients add up")
    print(f"  a third time, the graph is gone: {third!r}")
    print(f"  y0 = a·b and y1 = a + b with gradient=(1, 2): 1·5 + 2·2 = {derive_weighted():g}")
    print(f"  torch.autograd.backward(y) does the same: {derive_by_function():g}")
    print(f"  after a.retain_grad(), dy/da = b = {keep_gradients():g}; without, only the leaf w keeps its gradient")
    print("\nx² at 3")
    for order, result in zip(("first", "second", "third"), derive_repeatedly(), strict=True):
        print(f"  {order} derivative: {result[0].item():g}, returned in a {type(result).__name__} of {len(result)}")
    print("\nFour backward passes")
    print(f"  gradient not zeroed: {accumulate(zero=False)}")
    print(f"  gradient zeroed:     {accumulate(zero=True)}")
    a, b, y, leaf = inherit()
    print("\nResults of leaves that require gradients require them too")
    print(f"  requires_grad of a, b, y: {a}, {b}, {y}; a is a leaf: {leaf}")
    same_after_sum, same_in_place = keep_identity()
    print("\nIn place or not")
    print(f"  after a = a + 1 the same memory: {same_after_sum}; after a += 1: {same_in_place}")
    print(f"  w += 1 on a leaf that requires a gradient raises: {change_leaf_in_place()!r}")
    print("\nGradient descent on x² from 10, 500 steps, lr 0.01")
    path = descend()
    print("  after " + ", ".join(f"{step}: {path[step]:.4g}" for step in (0, 1, 10, 100, 250)))
    print(f"  ends at {path[-1]:.3e}; 10·0.98^500 = {10 * 0.98**500:.3e}")
