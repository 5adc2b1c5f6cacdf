"""A course: a long fit with augmentation, a rate that rises and falls, averaged weights, and checkpoints.

What is kept is not the net that learns but the running average of its weights (Polyak & Juditsky 1992), which wanders
less; the rate follows one cycle (Smith & Topin 2017). The whole state of a fit (both nets, optimizer, random streams,
history) is written every minute, so that a fit that was cut short goes on to the very net it would have given.
"""

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from training.augment import Augmentation, Augmenter
from training.checkpoint import load_checkpoint, save_checkpoint
from training.data import Split, Splits, as_floats
from training.errors import CheckError
from training.loop import Learner, measure
from training.progress import Epoch, Progress

CHECKPOINT_EVERY = 60.0  # seconds


@dataclass(frozen=True)
class Course:
    """The figures of a long fit.

    `rate` is the highest, reached after `warmup` of all steps and left for the last `fall` of them. `smoothing` is
    that of the labels (Szegedy et al. 2016). `average` is how much of the averaged weights each step keeps. `gentle` is
    the share of the epochs, the last ones, whose pictures are those of `gentle_augmentation`, nearer to the ones that
    will be asked about (He et al. 2019, https://arxiv.org/abs/1909.09148), and in which nothing is dropped out any more
    (Liu et al. 2023, https://arxiv.org/abs/2303.01500). `mixed` asks for bfloat16 on a GPU.
    """

    epochs: int
    batch_size: int
    optimizer: Literal["adamw", "sgd"]
    rate: float
    weight_decay: float
    smoothing: float
    average: float
    augmentation: Augmentation
    warmup: float = 0.2
    fall: float = 0.8
    gentle: float = 0.0
    gentle_augmentation: Augmentation = field(default_factory=Augmentation)
    mixed: bool = False


class Follower:
    """A net on its way through a course, with everything that decides what comes next."""

    def __init__(self, net: nn.Module, course: Course, splits: Splits, device: torch.device) -> None:
        assert splits.validation is not None
        self.net, self.course = net.to(device), course
        self.average = copy.deepcopy(self.net).eval().requires_grad_(False)
        self._learning, self._averaged = floating_values(self.net), floating_values(self.average)
        self.train, self.validation = splits.train.to(device), splits.validation.to(device)
        self.random = torch.Generator(device).manual_seed(torch.initial_seed())
        self.criterion = nn.CrossEntropyLoss(label_smoothing=course.smoothing)
        self.optimizer = build_optimizer(self.net, course)
        steps = course.epochs * math.ceil(len(self.train) / course.batch_size)
        self.schedule = build_schedule(self.optimizer, course, steps)
        self.history: list[Epoch] = []
        self.best: dict[str, Tensor] = {}
        self.steps = 0
        self.seconds = self.earlier_seconds = 0.0  # of training, in all and by runs before this one

    def run_epoch(self, progress: Progress) -> Epoch:
        """Take one step a batch over the training split, and measure the averaged net on validation."""
        started = time.perf_counter()
        gentle = is_gentle(self.course, len(self.history))
        set_training(self.net, dropout=not gentle)
        course = self.course
        augment = Augmenter(course.gentle_augmentation if gentle else course.augmentation, self.random)
        loss, hits = torch.zeros((), device=self.random.device), torch.zeros((), device=self.random.device)
        for inputs, targets in self._batches(augment):
            with torch.autocast(inputs.device.type, torch.bfloat16, self.course.mixed and inputs.is_cuda):
                logits = self.net(inputs)
                each = self.criterion(logits, targets)
            self._step(each)
            loss += each.detach() * len(targets)
            hits += (logits.detach().argmax(dim=1) == targets).sum()
            progress.step()
        checked = measure(Learner(self.average, self.criterion, self.optimizer, "multiclass"), self.validation)
        count = len(self.train)
        epoch = Epoch(loss.item() / count, hits.item() / count, checked.loss, checked.accuracy)
        self._note(epoch)
        self.seconds += time.perf_counter() - started
        return epoch

    def _batches(self, augment: Augmenter) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.train), generator=self.random, device=self.random.device)
        for chosen in torch.split(order, self.course.batch_size):
            yield augment(as_floats(self.train.inputs[chosen])), self.train.targets[chosen]

    def _step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.schedule.step()
        self.steps += 1
        kept = min(self.course.average, self.steps / (self.steps + 10))  # a short memory while the net is young
        with torch.no_grad():
            torch._foreach_lerp_(self._averaged, self._learning, 1 - kept)

    def _note(self, epoch: Epoch) -> None:
        if not math.isfinite(epoch.loss):
            raise CheckError(f"the training loss became {epoch.loss} in epoch {len(self.history) + 1}")
        losses = [each.validation_loss or 0.0 for each in self.history]
        self.history.append(epoch)
        if epoch.validation_loss is not None and epoch.validation_loss < min(losses, default=math.inf):
            self.best = {name: value.clone() for name, value in self.average.state_dict().items()}

    def state(self) -> dict[str, Any]:
        """Return everything that decides what comes next."""
        return {
            "net": self.net.state_dict(),
            "average": self.average.state_dict(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": self.random.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all(),
            "history": [asdict(epoch) for epoch in self.history],
            "steps": self.steps,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a state."""
        self.net.load_state_dict(state["net"])
        self.average.load_state_dict(state["average"])
        self.best = state["best"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.random.set_state(state["random"])
        torch.set_rng_state(state["torch"])
        torch.cuda.set_rng_state_all(state["cuda"])
        self.history = [Epoch(**epoch) for epoch in state["history"]]
        self.steps, self.seconds, self.earlier_seconds = state["steps"], state["seconds"], state["seconds"]


def is_gentle(course: Course, epoch: int) -> bool:
    """Tell whether an epoch is one of the gentle ones at the end; the first epoch is 0."""
    return epoch >= course.epochs - round(course.gentle * course.epochs)


def set_training(net: nn.Module, dropout: bool) -> None:
    """Put a net into training, with or without its dropout."""
    net.train()
    for layer in net.modules():
        if isinstance(layer, nn.Dropout):
            layer.train(dropout)


def floating_values(net: nn.Module) -> list[Tensor]:
    """Return a net's parameters and running statistics, which averaging treats alike."""
    return [value for value in net.state_dict().values() if value.is_floating_point()]


def build_optimizer(net: nn.Module, course: Course) -> torch.optim.Optimizer:
    """Return the course's optimizer; gains and biases do not decay."""
    weights = [each for each in net.parameters() if each.ndim > 1]
    others = [each for each in net.parameters() if each.ndim == 1]
    groups = [{"params": weights, "weight_decay": course.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if course.optimizer == "sgd":
        return torch.optim.SGD(groups, course.rate, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, course.rate, fused=True)


def build_schedule(optimizer: torch.optim.Optimizer, course: Course, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Return one cycle: from 4 % of the rate up to it in a cosine, level, then down to nothing in another."""

    def share(step: int) -> float:
        rise, fall = course.warmup * steps, course.fall * steps
        if step < rise:
            return 1 - 0.96 * (1 + math.cos(math.pi * step / rise)) / 2
        fallen = max(0.0, (step - (steps - fall)) / fall)
        return (1 + math.cos(math.pi * fallen)) / 2 + 1e-4

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def follow(
    net: nn.Module, course: Course, splits: Splits, device: torch.device, title: str, checkpoint: Path | None
) -> Follower:
    """Train a net through a course; it ends as its average was after the epoch with the lowest validation loss.

    Args:
        net: returns logits; on the CPU.
        course: the figures.
        splits: with a validation split; `test` is not read.
        device: where to train.
        title: of the progress bar.
        checkpoint: where the state is kept, and taken up if it is of the same fit; None keeps nothing.
    """
    follower = Follower(net, course, splits, device)
    identity = identify(follower, splits)
    if checkpoint is not None and (saved := load_checkpoint(checkpoint, identity)) is not None:
        follower.restore(saved)
    steps = math.ceil(len(follower.train) / course.batch_size)
    with Progress(title, course.epochs, steps, done=len(follower.history)) as progress:
        saved_at = time.monotonic()
        while len(follower.history) < course.epochs:
            progress.epoch(follower.run_epoch(progress))
            is_last = len(follower.history) == course.epochs
            if checkpoint is not None and (is_last or time.monotonic() - saved_at > CHECKPOINT_EVERY):
                is_kept = save_checkpoint(checkpoint, identity, follower.state())
                checkpoint, saved_at = checkpoint if is_kept else None, time.monotonic()
    follower.net.load_state_dict(follower.best)
    follower.net.eval()
    return follower


def identify(follower: Follower, splits: Splits) -> dict[str, Any]:
    """Return what must be equal for a checkpoint to be of the same fit."""
    seen: dict[str, Split | None] = {"train": splits.train, "validation": splits.validation}
    digests = {name: split.digest() for name, split in seen.items() if split is not None}
    return {
        "net": {name: list(value.shape) for name, value in follower.net.state_dict().items()},
        "course": asdict(follower.course),
        "seed": torch.initial_seed(),
        "data": digests,
        "torch": str(torch.__version__),
        "device": [follower.random.device.type, torch.cuda.device_count()],  # whose generators the state holds
    }
