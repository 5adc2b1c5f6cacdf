"""One fit by several processes: `torchrun --nproc-per-node 2 -m training mnist`. Without torchrun it does nothing.

Every rank draws the same batches in the same order, computes the gradient of its share of each, and takes the step of
the whole batch's mean gradient: batch size and steps are those of one process, and nets are equal up to rounding. Only
the first rank prints, exports and publishes.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from training.errors import DeviceError
from training.progress import Epoch

RECIPES = ("mnist",)
"""Those several processes can train; the others draw augmentation or batch statistics that ranks would not share."""
Result = TypeVar("Result")


def is_launched() -> bool:
    """Tell whether torchrun has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Tell whether this process prints, exports and publishes."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


@contextmanager
def launched(names: list[str], device: str) -> Iterator[str]:
    """Join the other ranks, if there are any, and yield the device to train on.

    Raises:
        DeviceError: a recipe or the device does not work with several processes.
    """
    if not is_launched():
        yield device
        return
    alone = [name for name in names if name not in RECIPES]
    if alone:
        raise DeviceError(f"{alone[0]} cannot be trained by several processes, only {', '.join(RECIPES)} can")
    if ":" in device:
        raise DeviceError(f"device {device!r} is for one process, and there are several; use cuda or cpu")
    device = _join(device)
    try:
        with ExitStack() as silenced:
            if not is_first():
                nowhere = silenced.enter_context(open(os.devnull, "w"))
                silenced.enter_context(redirect_stdout(nowhere))
                silenced.enter_context(redirect_stderr(nowhere))
            yield device
    except RuntimeError as error:  # raised by a rank waiting for one that has ended
        if is_first():
            raise
        raise DeviceError(f"another process failed, and its message says why ({type(error).__name__})") from error
    finally:
        distributed.destroy_process_group()


def _join(device: str) -> str:
    """Join the process group; return the device of this rank."""
    try:
        if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        else:
            device = "cpu"
        distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    except (RuntimeError, ValueError, KeyError, AssertionError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DeviceError(f"cannot join the processes on {device}; start them with torchrun: {reason}") from error
    return device


def first_alone(act: Callable[[], Result]) -> Result:
    """Call a function on the first rank and then on the others, for example to download."""
    if distributed.is_initialized() and not is_first():
        distributed.barrier()
    result = act()
    if distributed.is_initialized() and is_first():
        distributed.barrier()
    return result


def share(batch: Tensor) -> Tensor:
    """Return this rank's part of a batch; a batch smaller than the number of ranks goes to all of them."""
    if not distributed.is_initialized() or len(batch) < distributed.get_world_size():
        return batch
    return batch[distributed.get_rank() :: distributed.get_world_size()]


def average_gradients(net: nn.Module, count: int) -> None:
    """Replace a net's gradients, means over this rank's `count` instances, by the means over all ranks."""
    if not distributed.is_initialized():
        return
    gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients] + [gradients[0].new_ones(1)]) * count
    distributed.all_reduce(flat)
    total = flat[-1]
    parts = torch.split(flat[:-1] / total, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def average_epoch(epoch: Epoch, count: int) -> Epoch:
    """Return the figures of an epoch over all ranks, given this rank's, which saw `count` instances."""
    if not distributed.is_initialized():
        return epoch
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(
        [epoch.loss * count, (epoch.accuracy or 0.0) * count, count], dtype=torch.float64, device=device
    )
    distributed.all_reduce(sums)
    loss, hits, total = sums.tolist()
    return Epoch(loss / total, None if epoch.accuracy is None else hits / total)
