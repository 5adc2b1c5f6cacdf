"""Fit digits: the tutorial's perceptron, the same perceptron trained for accuracy, and a small convolutional net."""

from dataclasses import replace

import torch
from torch import nn

from training.augment import Augmentation
from training.config import TrainConfig
from training.data import Splits
from training.nets import DigitsCnn, DigitsNet, NormedDigitsNet, fold_norms
from training.trainer import Fitted, Settings, Trainer

MEAN_PIXEL, DEVIATION = 0.1307, 0.3081  # of the training images in [0, 1], rounded as is customary

MNIST = TrainConfig(epochs=10, batch_size=64, optimizer="adamw", lr=0.001)
MLP_BEST = TrainConfig(
    epochs=160,
    batch_size=256,
    optimizer="adamw",
    lr=0.004,
    weight_decay=0.02,
    label_smoothing=0.05,
    warmup=0.2,
    anneal=0.8,
    ema_decay=0.999,
    augmentation=Augmentation(pen=0.1, coarse=0.1, noise=0.05),
)
_CNN_AUGMENTATION = Augmentation(pen=0.1, coarse=0.15, noise=0.05)
CNN = TrainConfig(
    epochs=36,
    batch_size=128,
    lr=0.2,
    momentum=0.9,
    nesterov=True,
    weight_decay=5e-4,
    label_smoothing=0.05,
    warmup=0.15,
    anneal=0.7,
    ema_decay=0.998,
    augmentation=_CNN_AUGMENTATION,
    finetune=0.25,
    finetune_augmentation=replace(_CNN_AUGMENTATION.scale_distortions(0.4), pen=0.3),
    mixed_precision=True,
)


def fit_mnist(splits: Splits, settings: Settings) -> Fitted:
    """Fit the tutorial's 784-512-128-10 sigmoid perceptron (cross-entropy, Adam lr 0.001, batch 64).

    Decided:
        Pixels arrive in [0, 1], as clients have them, and the graph centers them on the mean pixel, once. The tutorial
        normalizes in the data set and again in its loop: its pixels run from −3 to 1, which costs 2 % accuracy.
        5,000 training images choose the epoch; a run reads the test images once, at its end.
        The whole set is one uint8 tensor and batches are gathered by index: see `IndexBatches`.
    """
    return _fit("mnist", DigitsNet(MEAN_PIXEL, deviation=1.0), MNIST, splits, replace(settings, checkpoint=None))


def fit_mlp_best(splits: Splits, settings: Settings) -> Fitted:
    """Fit the same 784-512-128-10 sigmoid perceptron as well as it can be.

    Decided:
        Augmentation: affine and elastic distortions, stroke widths, resolutions and noise; no image is seen twice.
        Batch norm during training, folded into the linear layers afterwards: the served net is the tutorial's.
        AdamW, a one-cycle schedule, label smoothing and an average of the weights; see `TrainConfig`.
    """
    net = NormedDigitsNet(MEAN_PIXEL, deviation=1.0)
    fitted = _fit("mnist-mlp-best", net, MLP_BEST, splits, settings)
    return replace(fitted, net=net.cpu().plain())


def fit_cnn(splits: Splits, settings: Settings) -> Fitted:
    """Fit a small convolutional net (`DigitsCnn`) with augmentation, and SGD with Nesterov's momentum.

    Decided:
        Its batch norms are folded as well.
        Channels are last in memory, which makes convolutions faster on a CPU.
    """
    net = DigitsCnn(MEAN_PIXEL, DEVIATION).to(memory_format=torch.channels_last)
    fitted = _fit("mnist-cnn", net, CNN, splits, settings)
    return replace(fitted, net=fold_norms(net.cpu()))


def _fit(name: str, net: nn.Module, config: TrainConfig, splits: Splits, settings: Settings) -> Fitted:
    assert splits.validation is not None
    train, validation = splits.train.to(settings.device), splits.validation.to(settings.device)
    trainer = Trainer(net, "multiclass", replace(config, epochs=settings.epochs), train, validation)
    return trainer.fit(name, checkpoint=settings.checkpoint)
