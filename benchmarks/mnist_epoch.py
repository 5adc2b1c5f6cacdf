"""Time one MNIST epoch: batches by index from one tensor against the tutorial's per-sample `DataLoader`.

    python -m benchmarks.mnist_epoch --data-dir data

Same net, optimizer and batch size; the two take turns, so that what else the machine does weighs on both. Prints the
seconds of each epoch, their medians, and the ratio of the medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import MNIST

from training.data import IndexBatches, Split
from training.nets import DigitsNet

BATCH_SIZE = 64


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description="Time one MNIST epoch, batches by index against a per-sample loader.")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each kind (3)")
    parser.add_argument("--workers", type=int, default=0, help="loader processes of the per-sample kind (0)")
    options = parser.parse_args()
    dataset = MNIST(str(options.data_dir), train=True, download=True, transform=transforms.ToTensor())
    whole = Split(dataset.data.reshape(len(dataset), -1), dataset.targets)
    loader = DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True, num_workers=options.workers)
    kinds: dict[str, Callable[[], Iterable[tuple[Tensor, Tensor]]]] = {
        "by index": lambda: IndexBatches(whole, BATCH_SIZE, torch.Generator().manual_seed(0)),
        "per sample": lambda: loader,
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(options.rounds):
        for name, batches in kinds.items():
            seconds[name].append(time_epoch(batches()))
    for name, each in seconds.items():
        print(f"{name:10}  {'  '.join(f'{second:6.2f}' for second in each)}  median {statistics.median(each):6.2f} s")
    ratio = statistics.median(seconds["per sample"]) / statistics.median(seconds["by index"])
    print(f"ratio       {ratio:.1f} ({torch.get_num_threads()} threads, torch {torch.__version__})")


def time_epoch(batches: Iterable[tuple[Tensor, Tensor]]) -> float:
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
