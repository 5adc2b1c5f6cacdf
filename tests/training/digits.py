"""A net and hyperparameters for tests of long fits."""

from torch import nn

from training.augment import Augmentation
from training.config import TrainConfig

CONFIG = TrainConfig(
    epochs=4,
    batch_size=32,
    optimizer="adamw",
    lr=0.004,
    momentum=0.9,
    nesterov=True,
    weight_decay=0.02,
    label_smoothing=0.05,
    warmup=0.2,
    anneal=0.8,
    ema_decay=0.9,
    augmentation=Augmentation(pen=0.1, coarse=0.1, noise=0.1),
    finetune=0.25,
    finetune_augmentation=Augmentation(rotation=2.0, pen=0.2),
)


class DroppingNet(nn.Sequential):
    """A small net with every kind of state: batch norm, and dropout from torch's global generator."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(784, 16, bias=False), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 10))
