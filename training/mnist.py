"""Fitting digits: the tutorial's perceptron, the same perceptron at its best, and a small convolutional net."""

from dataclasses import replace

import torch
from torch import nn

from training.augment import Augmentation
from training.course import Course, follow
from training.data import IndexBatches, Splits
from training.loop import Fitted, Learner, Settings, fit
from training.nets import DigitsCnn, DigitsNet, NormedDigitsNet, fold_norms
from training.progress import Progress

MEAN_PIXEL, DEVIATION = 0.1307, 0.3081  # of the training images in [0, 1]; rounded as everybody rounds them

_OTHER_PENS = Augmentation(pen=0.1, coarse=0.1, noise=0.05)
MLP_BEST = Course(
    epochs=160,
    batch_size=256,
    optimizer="adamw",
    rate=0.004,
    weight_decay=0.02,
    smoothing=0.05,
    average=0.999,
    augmentation=_OTHER_PENS,
)
_CNN_PICTURES = replace(_OTHER_PENS, coarse=0.15)
CNN = Course(
    epochs=36,
    batch_size=128,
    optimizer="sgd",
    rate=0.2,
    weight_decay=5e-4,
    smoothing=0.05,
    average=0.998,
    warmup=0.15,
    fall=0.7,
    augmentation=_CNN_PICTURES,
    gentle=0.25,
    gentle_augmentation=replace(_CNN_PICTURES.distorting(0.4), pen=0.3),
    mixed=True,
)


def fit_mnist(splits: Splits, settings: Settings) -> Fitted:
    """Fit the tutorial's 784-512-128-10 sigmoid perceptron (cross-entropy, Adam lr 0.001, batch 64).

    Decided:
        Pixels come in as [0, 1], what a client has; the graph centres them on the mean pixel, once. The tutorial
        normalises in the data set and again in its loop, so its pixels run from −3 to 1, at a cost of 2 % accuracy.
        5,000 training images choose the epoch; a run reads the test images once, at its end.
        The whole set is one uint8 tensor and batches are drawn by index: see `IndexBatches`.
    """
    train = splits.train.to(settings.device)
    net = DigitsNet(mean=MEAN_PIXEL, deviation=1.0).to(settings.device)
    order = torch.Generator().manual_seed(torch.initial_seed())
    batches = IndexBatches(train, batch_size=64, generator=order)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.001, fused=True)
    learner = Learner(net, nn.CrossEntropyLoss(), optimizer, "multiclass")
    validation = None if splits.validation is None else splits.validation.to(settings.device)
    with Progress("mnist", settings.epochs, len(batches)) as progress:
        history = fit(learner, batches, settings.epochs, progress, validation)
    return Fitted(net, history)


def fit_mlp_best(splits: Splits, settings: Settings) -> Fitted:
    """Fit the same 784-512-128-10 sigmoid perceptron as well as it can be.

    Decided:
        Never the same picture twice: affine and elastic distortions, other pens, resolutions and grain.
        Batch norm while it trains, folded into the linear layers afterwards: the served net is the tutorial's.
        AdamW, one cycle of the rate, smoothed labels, averaged weights; see `Course`.
    """
    net = NormedDigitsNet(MEAN_PIXEL, deviation=1.0)
    course = replace(MLP_BEST, epochs=settings.epochs)
    followed = follow(net, course, splits, settings.device, "mnist-mlp-best", settings.checkpoint)
    return Fitted(net.cpu().plain(), followed.history, earlier_seconds=followed.earlier_seconds)


def fit_cnn(splits: Splits, settings: Settings) -> Fitted:
    """Fit a small convolutional net (`DigitsCnn`) on the same pictures, with SGD and Nesterov's momentum.

    Decided:
        Its batch norms too are folded into the layers before them.
        Channels come last in memory, which convolutions on a CPU are faster with.
    """
    net = DigitsCnn(MEAN_PIXEL, DEVIATION).to(memory_format=torch.channels_last)
    course = replace(CNN, epochs=settings.epochs)
    followed = follow(net, course, splits, settings.device, "mnist-cnn", settings.checkpoint)
    return Fitted(fold_norms(net.cpu()), followed.history, earlier_seconds=followed.earlier_seconds)
