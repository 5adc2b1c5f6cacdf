"""Time one MNIST epoch: the tutorial's loop, as it is written, against this project's.

    python -m benchmarks.mnist_epoch --data-dir data

The tutorial converts and normalises picture after picture (`ToTensor`, `Normalize`), draws batches with a `DataLoader`,
steps with Adam, adds up `loss.item()` and measures the test pictures through another loader at the end of the epoch.
Here batches are gathered by index from one tensor and normalised by the net, Adam is fused, and the device is asked for
numbers once an epoch. Both begin from the same parameters and see the same pictures in the same order, so they give the
same losses; what each reached is printed beside its seconds. They take turns, so that what else the machine does weighs
on both; the processor's own seconds leave it out.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms
from torchvision.datasets import MNIST

from training.config import TrainConfig
from training.data import Split
from training.nets import DigitsNet
from training.progress import Progress
from training.trainer import Trainer

BATCH_SIZE = 64
RATE = 0.001


@dataclass(frozen=True)
class Result:
    """What one epoch gave: training loss, and share of hits on the test pictures."""

    loss: float
    accuracy: float


class Tutorial:
    """The tutorial's loop; pixels are normalised once, not twice as there, so that the results can be compared."""

    def __init__(self, data_dir: Path, workers: int) -> None:
        half = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
        self.train, self.test = (
            MNIST(str(data_dir), train=part, download=True, transform=half) for part in (True, False)
        )
        self.workers = workers
        self.net = nn.Sequential(*list(DigitsNet(0.5, 0.5))[1:])
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=RATE)
        self.criterion = nn.CrossEntropyLoss()

    def run(self, order: torch.Generator) -> Result:
        """Train and measure for one epoch."""
        running = 0.0
        sampler = RandomSampler(self.train, generator=order)
        for images, labels in DataLoader(self.train, BATCH_SIZE, sampler=sampler, num_workers=self.workers):
            self.optimizer.zero_grad()
            loss = self.criterion(self.net(images.view(images.shape[0], -1)), labels)
            loss.backward()
            self.optimizer.step()
            running += loss.item() * len(labels)
        correct = sum(int((self.net(images).argmax(dim=1) == labels).sum()) for images, labels in self._tests())
        return Result(running / len(self.train), correct / len(self.test))

    def _tests(self) -> Iterator[tuple[Tensor, Tensor]]:
        with torch.no_grad():
            for images, labels in DataLoader(self.test, BATCH_SIZE, num_workers=self.workers):
                yield images.view(images.shape[0], -1), labels


class Ours:
    """This project's loop, on the same data."""

    def __init__(self, tutorial: Tutorial) -> None:
        self.train, self.test = (
            Split(part.data.reshape(len(part), -1), part.targets) for part in (tutorial.train, tutorial.test)
        )
        net = DigitsNet(0.5, 0.5)
        for mine, theirs in zip(net.parameters(), tutorial.net.parameters(), strict=True):
            mine.data.copy_(theirs.data)
        config = TrainConfig(epochs=1, batch_size=BATCH_SIZE, optimizer="adamw", lr=RATE)
        self.trainer = Trainer(net, "multiclass", config, self.train)

    def run(self, order: torch.Generator) -> Result:
        """Train and measure for one epoch."""
        self.trainer.generator.set_state(order.get_state())
        with Progress("by index", 1, len(self.trainer.batches)) as progress:
            loss = self.trainer.run_epoch(progress).loss
        return Result(loss, self.trainer.validate(self.test).accuracy or 0.0)


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description="Time one MNIST epoch, the tutorial's loop against this project's.")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each (3)")
    parser.add_argument("--workers", type=int, default=0, help="loader processes of the tutorial's loop (0)")
    parser.add_argument(
        "--threads", type=int, help="threads of torch (its own choice); 1 on a machine that is not idle"
    )
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    tutorial = Tutorial(options.data_dir, options.workers)
    ours = Ours(tutorial)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    seconds: dict[str, list[tuple[float, float]]] = {"the tutorial's": [], "by index": []}
    for epoch in range(options.rounds):
        for name, loop in (("the tutorial's", tutorial), ("by index", ours)):
            started = time.perf_counter(), time.process_time()
            found = loop.run(torch.Generator().manual_seed(epoch))
            wall, processor = time.perf_counter() - started[0], time.process_time() - started[1]
            seconds[name].append((wall, processor))
            figures = f"loss {found.loss:.5f}  test accuracy {found.accuracy:.2%}  {wall:6.2f} s"
            print(f"epoch {epoch + 1}, {name:15} {figures}, of the processor {processor:6.2f} s", flush=True)
    for index, title in enumerate(("seconds", "seconds of the processor")):
        slow, fast = (statistics.median(each[index] for each in times) for times in seconds.values())
        print(f"median {title}: {slow:.2f} and {fast:.2f}; by index is {slow / fast:.1f} times as fast")


if __name__ == "__main__":
    main()
