"""The hyperparameters of a fit, and the torch objects built from them."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from service.model.manifest import Task
from training.augment import Augmentation


@dataclass(frozen=True)
class TrainConfig:
    """Hyperparameters of a fit. With the defaults it is plain SGD: no schedule, no EMA, no augmentation.

    Attributes:
        epochs: passes over the training split, at least 1.
        batch_size: instances per step; the last batch of an epoch may be smaller.
        lr: learning rate; with a schedule, its peak.
        optimizer: "adamw" without weight decay is Adam.
        momentum: of SGD.
        nesterov: whether SGD uses Nesterov's momentum.
        weight_decay: applied to weight matrices and kernels; biases and norm parameters are not decayed.
        reduction: of the loss over a batch.
        label_smoothing: share of the target spread over all classes (Szegedy et al. 2016); multiclass only.
        warmup: fraction of all steps in which the learning rate rises to `lr`.
        anneal: fraction of all steps, at the end, in which it falls to zero. With `warmup`, this is the one-cycle
            schedule (Smith & Topin 2017).
        ema_decay: of the exponential moving average of the weights (Polyak & Juditsky 1992), which is then evaluated
            and kept in place of the weights; 0 keeps no average.
        augmentation: of the training images.
        finetune: fraction of the epochs, at the end, trained on `finetune_augmentation`, closer to the images that
            will be served (He et al. 2019, https://arxiv.org/abs/1909.09148), and without dropout (Liu et al. 2023,
            https://arxiv.org/abs/2303.01500).
        finetune_augmentation: of the training images in those epochs.
        mixed_precision: whether to run the forward pass in bfloat16 on a GPU.
    """

    epochs: int
    batch_size: int
    lr: float
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    reduction: Literal["mean", "sum"] = "mean"
    label_smoothing: float = 0.0
    warmup: float = 0.0
    anneal: float = 0.0
    ema_decay: float = 0.0
    augmentation: Augmentation | None = None
    finetune: float = 0.0
    finetune_augmentation: Augmentation | None = None
    mixed_precision: bool = False

    def is_finetuning(self, epoch: int) -> bool:
        """Tell whether an epoch, counted from 0, belongs to the finetune phase."""
        return epoch >= self.epochs - round(self.finetune * self.epochs)


def build_criterion(task: Task, config: TrainConfig) -> nn.Module:
    """Return the loss of a task, a function of logits (or values) and targets."""
    if task == "regression":
        return nn.MSELoss(reduction=config.reduction)
    if task == "binary":
        return nn.BCEWithLogitsLoss(reduction=config.reduction)
    return nn.CrossEntropyLoss(reduction=config.reduction, label_smoothing=config.label_smoothing)


def build_optimizer(net: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return an optimizer of a net's parameters that decays only those with two or more dimensions."""
    decayed = [parameter for parameter in net.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in net.parameters() if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others}]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.lr, momentum=config.momentum, nesterov=config.nesterov)
    return torch.optim.AdamW(groups, config.lr, weight_decay=0.0, fused=True)


def build_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the learning rate over all steps: a cosine up from 4 % of `lr`, a plateau, and a cosine down to zero."""
    warmup, anneal = config.warmup * steps, config.anneal * steps

    def factor(step: int) -> float:
        if step < warmup:
            return 1 - 0.96 * (1 + math.cos(math.pi * step / warmup)) / 2
        if not anneal:
            return 1.0
        progress = max(0.0, (step - (steps - anneal)) / anneal)
        return (1 + math.cos(math.pi * progress)) / 2 + 1e-4

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
