"""The digits' recipes: the tutorial's perceptron, the same trained for accuracy, and a small convolutional net."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from service.model.manifest import ImageInput, ImageSpec, Output
from training import data, evaluate, plots
from training.augment import Augmentation
from training.config import TrainConfig
from training.data import Splits
from training.nets import DigitsCnn, DigitsNet, NormedDigitsNet, fold_norms
from training.recipe import Recipe
from training.robustness import write_robustness
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
    net = DigitsNet(MEAN_PIXEL, 1.0, settings.changes.get("hidden", (512, 128)))
    return _fit("mnist", net, MNIST, splits, replace(settings, checkpoint=None))


def fit_softmax(splits: Splits, settings: Settings) -> Fitted:
    """Fit a softmax regression, one linear layer from 784 pixels to 10 logits, as `mnist` is fitted.

    Decided:
        The tutorial's title promises this model and its code has two hidden layers. With both recipes it can be seen
        what the hidden layers are for.
    """
    net = DigitsNet(MEAN_PIXEL, 1.0, hidden=())
    return _fit("mnist-softmax", net, MNIST, splits, replace(settings, checkpoint=None))


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
    trainer = Trainer(net, "multiclass", settings.change(config), train, validation)
    return trainer.fit(name, checkpoint=settings.checkpoint)


_MEASURED = (
    "MNIST (Y. LeCun, C. Cortes, C. J. C. Burges, http://yann.lecun.com/exdb/mnist), digits of about 500 American"
    " census workers and high-school students, CC BY-SA 3.0: 55,000 images for training, 5,000 held out of the training"
    " set to choose epoch, temperature and seed. A run reads the 10,000 test images once, at its end, and chooses"
    " nothing by them; docs/training-log.md lists the earlier trials that looked at them."
)
_LIMITS = (
    "It knows ten digits, one per image. Letters, several digits and scribbles get a digit too, sometimes a confident"
    " one. Images must be prepared as MNIST's were; the service does that for PNG and JPEG files."
)
_MNIST_ALONE = "It was trained on MNIST's digits alone: for images from elsewhere use `mnist-cnn`."


def _digits(
    name: str,
    title: str,
    description: str,
    purpose: str,
    epochs: int,
    fit: Callable[[Splits, Settings], Fitted],
    limits: str = _LIMITS,
    options: tuple[str, ...] = ("lr", "batch_size", "optimizer"),
) -> Recipe:
    image = ImageSpec(width=28, height=28, channels=1, polarity="light-on-dark", fitting="mnist")
    labels = tuple(str(digit) for digit in range(10))
    return Recipe(
        name=name,
        title=title,
        description=f"{description} Pixels in [0, 1], bright ink on dark; the graph normalises them itself.",
        task="multiclass",
        input=ImageInput(kind="image", shape=(784,), image=image, tensor="inputs"),
        output=Output(kind="probabilities", name="digit", labels=labels, tensor="outputs"),
        epochs=epochs,
        load=data.load_digits,
        fit=fit,
        figures=evaluate.measure_validation,
        plots={
            "digits.png": plots.draw_digits,
            "loss.png": plots.draw_loss,
            "confusion.png": plots.draw_confusion,
            "misclassified.png": plots.draw_misclassified,
            "reliability.png": plots.draw_reliability,
        },
        purpose=purpose,
        limits=limits,
        source=_MEASURED,
        calibrates=True,
        quantizes=True,
        sections=write_robustness,
        options=options,
        benefits_from_gpu=True,
    )


RECIPES = (
    _digits(
        "mnist",
        "Handwritten digits",
        "The tutorial's perceptron (784-512-128-10, sigmoid) on MNIST.",
        "Recognizes single handwritten digits with a tutorial's perceptron: the baseline for the two others.",
        MNIST.epochs,
        fit_mnist,
        f"{_LIMITS} {_MNIST_ALONE}",
        ("lr", "batch_size", "optimizer", "hidden"),
    ),
    _digits(
        "mnist-softmax",
        "Handwritten digits, softmax regression",
        "One linear layer (784-10) on MNIST.",
        "Shows how far one linear layer gets, beside the perceptron of `mnist`.",
        MNIST.epochs,
        fit_softmax,
        f"{_LIMITS} {_MNIST_ALONE}",
    ),
    _digits(
        "mnist-mlp-best",
        "Handwritten digits, the same net at its best",
        "The tutorial's perceptron (784-512-128-10, sigmoid), trained on distorted MNIST digits for long.",
        "Recognizes single handwritten digits with few and simple operations: three matrix products.",
        MLP_BEST.epochs,
        fit_mlp_best,
    ),
    _digits(
        "mnist-cnn",
        "Handwritten digits, convolutional",
        "A small convolutional net, trained on distorted MNIST digits.",
        "Recognizes single handwritten digits most accurately of the three; use it for images from elsewhere.",
        CNN.epochs,
        fit_cnn,
    ),
)
