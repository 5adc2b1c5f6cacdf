"""Time one MNIST epoch: batches by index from one tensor against the tutorial's per-sample `DataLoader`.

    python -m benchmarks.mnist_epoch --data-dir data

Same net, optimizer and batch size; the two take turns, so that what else the machine does weighs on both. Prints the
seconds of each epoch, their medians and the ratio of the medians: for drawing the batches alone, and with training.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import MNIST

from training.data import IndexBatches, Split
from training.nets import DigitsNet

BATCH_SIZE = 64

Batches = Iterable[tuple[Tensor, Tensor]]


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description="Time one MNIST epoch, batches by index against a per-sample loader.")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each kind (3)")
    parser.add_argument("--workers", type=int, default=0, help="loader processes of the per-sample kind (0)")
    parser.add_argument(
        "--threads", type=int, help="threads of torch (its own choice); 1 on a machine that is not idle"
    )
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    dataset = MNIST(str(options.data_dir), train=True, download=True, transform=transforms.ToTensor())
    whole = Split(dataset.data.reshape(len(dataset), -1), dataset.targets)
    loader = DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True, num_workers=options.workers)
    kinds: dict[str, Callable[[], Batches]] = {
        "by index": lambda: IndexBatches(whole, BATCH_SIZE, torch.Generator().manual_seed(0)),
        "per sample": lambda: loader,
    }
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; seconds an epoch, then their median")
    for title, measure in (("batches alone", time_drawing), ("batches and training", time_epoch)):
        medians = compare(
            title, {name: partial(time_once, measure, batches) for name, batches in kinds.items()}, options
        )
        print(f"{title}: by index is {medians['per sample'] / medians['by index']:.1f} times as fast")


def compare(title: str, kinds: dict[str, Callable[[], float]], options: argparse.Namespace) -> dict[str, float]:
    """Run each kind in turn, round after round, print the seconds of each, and return their medians."""
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(options.rounds):
        for name, run in kinds.items():
            seconds[name].append(run())
    for name, each in seconds.items():
        times = "  ".join(f"{second:6.2f}" for second in each)
        print(f"{title}, {name:10}  {times}  median {statistics.median(each):6.2f}", flush=True)
    return {name: statistics.median(each) for name, each in seconds.items()}


def time_once(measure: Callable[[Batches], float], build: Callable[[], Batches]) -> float:
    """Return what `measure` says of one pass."""
    return measure(build())


def time_drawing(batches: Batches) -> float:
    """Return the seconds that drawing every batch of an epoch takes."""
    started = time.perf_counter()
    for inputs, _ in batches:
        inputs.reshape(len(inputs), -1)
    return time.perf_counter() - started


def time_epoch(batches: Batches) -> float:
    """Return the seconds that one epoch of training takes on the CPU."""
    net = DigitsNet(mean=0.0, deviation=1.0)
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.Adam(net.parameters(), lr=0.001)
    started = time.perf_counter()
    for inputs, targets in batches:
        optimizer.zero_grad()
        criterion(net(inputs.reshape(len(inputs), -1)), targets).backward()
        optimizer.step()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
