"""`python -m training images`: a classifier of the user's own pictures, a folder for each class.

Pictures of any size, in colour or grey, are prepared as the service will prepare those that it is sent; a small
convolutional net is trained from scratch, and published as every recipe's model is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from service.errors import InvalidRequestError
from service.model.manifest import ImageInput, ImageSpec, Output, digest
from service.model.predictor import Predictor
from service.model.preprocess import read_images
from training import plots
from training.config import TrainConfig
from training.data import Split, Splits
from training.errors import DataError
from training.nets import Normalize, fold_norms
from training.recipe import Recipe
from training.table import check_parts, split_by_group
from training.tabular import choose_batch_size, describe_baseline, explain_stop, measure_baseline
from training.trainer import Fitted, Settings, Trainer

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
EPOCHS = 40
_WIDTHS = (32, 64, 128, 128)  # channels after each halving of the size
_FEW, _RARE = 50, 0.5  # pictures of a class; share of the average class


@dataclass(frozen=True)
class Pictures:
    """Pictures that have been read, uint8 (N, channels, size, size) in their splits."""

    splits: Splits
    labels: tuple[str, ...]
    spec: ImageInput
    counts: dict[str, int]


def load_pictures(folder: Path, size: int) -> Pictures:
    """Read a folder of folders of pictures; copies of one file stay in one split.

    Raises:
        DataError: there are fewer than two classes with pictures, or one cannot be read.
    """
    paths = {each.name: _list_pictures(each) for each in sorted(folder.glob("[!.]*")) if each.is_dir()}
    paths = {label: files for label, files in paths.items() if files}
    if len(paths) < 2:  # noqa: PLR2004
        raise DataError(
            f"{folder} has pictures in {len(paths)} folders; give one folder for each of two or more classes"
        )
    files = [path for listed in paths.values() for path in listed]
    contents = [path.read_bytes() for path in files]
    channels: Literal[1, 3] = 3 if any(_is_colour(path) for path in files) else 1
    image = ImageSpec(width=size, height=size, channels=channels, polarity="as-is", fitting="stretch")
    spec = ImageInput(kind="image", shape=(channels, size, size), image=image, tensor="inputs")
    pixels = np.empty((len(files), *spec.shape), np.uint8)
    try:
        for index, (content, path) in enumerate(zip(contents, files, strict=True)):
            pixels[index] = np.round(255 * read_images([content], spec, [str(path)])[0])
    except InvalidRequestError as error:
        raise DataError(str(error)) from error
    codes = np.repeat(np.arange(len(paths)), [len(listed) for listed in paths.values()])
    copies = np.unique([digest(content) for content in contents], return_inverse=True)[1]
    return Pictures(
        _deal(pixels, codes, copies, tuple(paths)), tuple(paths), spec, {k: len(v) for k, v in paths.items()}
    )


def _deal(
    pixels: NDArray[np.uint8], codes: NDArray[np.int64], copies: NDArray[np.int64], labels: tuple[str, ...]
) -> Splits:
    parts = split_by_group(copies, codes)
    check_parts(parts, codes, labels)
    inputs, targets = torch.from_numpy(pixels), torch.from_numpy(codes)
    targets = targets.float()[:, None] if len(labels) == 2 else targets  # noqa: PLR2004 - a binary task
    train, validation, test = (
        Split(inputs[chosen], targets[chosen]) for chosen in (torch.from_numpy(parts == index) for index in range(3))
    )
    return Splits(train, test, validation)


def _list_pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def _is_colour(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            return not picture.mode.startswith(("1", "L", "I", "F"))
    except OSError as error:
        raise DataError(f"{path} is not a picture that can be read") from error


class Jitter(nn.Module):
    """Turn, scale, shift, brighten and, if they may be, mirror pictures at random while training."""

    def __init__(self, mirror: bool) -> None:
        super().__init__()
        self.mirror = mirror

    def forward(self, images: Tensor) -> Tensor:
        """Return float32 (N, channels, height, width); in evaluation, the images as they are."""
        if not self.training:
            return images
        count = len(images)
        angle, scale, across, down = ((torch.rand(4, count) - 0.5) * torch.tensor([[0.35], [0.3], [0.2], [0.2]])).to(
            images.device
        )
        flip = 1 - 2 * torch.randint(0, 2, (count,), device=images.device) if self.mirror else 1
        cos, sin = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
        turns = torch.stack((flip * cos, -sin, across, flip * sin, cos, down), dim=1).reshape(count, 2, 3)
        grid = F.affine_grid(turns, list(images.shape), align_corners=False)
        moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        return moved * (0.8 + 0.4 * torch.rand(count, 1, 1, 1)).to(images.device)


class SmallCnn(nn.Sequential):
    """Pictures float32 (N, channels, size, size) in [0, 1] -> logits (N, outputs)."""

    def __init__(self, channels: int, outputs: int, mirror: bool) -> None:
        layers: list[nn.Module] = [Jitter(mirror), Normalize(0.5, 0.25)]
        for before, after in zip((channels, *_WIDTHS), _WIDTHS, strict=False):
            side = 5 if before == channels else 3
            layers += [nn.Conv2d(before, after, side, padding=side // 2, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(_WIDTHS[-1], outputs))
        super().__init__(*layers, *head)


def build_images_recipe(folder: Path, name: str, size: int, mirror: bool, command: str) -> Recipe:
    """Return the recipe of a folder of pictures.

    Raises:
        DataError: see `load_pictures`.
    """
    pictures = load_pictures(folder, size)
    is_binary = len(pictures.labels) == 2  # noqa: PLR2004
    colours = "colour" if pictures.spec.image.channels > 1 else "grey"

    def fit(splits: Splits, settings: Settings) -> Fitted:
        """Fit a small convolutional net; its batch norms are folded away."""
        assert splits.validation is not None
        config = TrainConfig(
            settings.epochs,
            batch_size=min(64, choose_batch_size(len(splits.train))),
            lr=0.003,
            optimizer="adamw",
            weight_decay=0.02,
            warmup=0.15,
            anneal=0.7,
            ema_decay=0.98,
        )
        net = SmallCnn(pictures.spec.image.channels, 1 if is_binary else len(pictures.labels), mirror)
        train, validation = splits.train.to(settings.device), splits.validation.to(settings.device)
        trainer = Trainer(net, "binary" if is_binary else "multiclass", config, train, validation)
        fitted = trainer.fit(name, lambda done: explain_stop(trainer.history, done, 2 * settings.epochs))
        return Fitted(fold_norms(net.cpu()).eval(), fitted.history, criterion=fitted.criterion)

    return Recipe(
        name=name,
        title=f"Pictures of {folder.name}",
        description=f"Tells {len(pictures.labels)} kinds of {colours} pictures apart: {', '.join(pictures.labels)}."[
            :500
        ],
        task="binary" if is_binary else "multiclass",
        input=pictures.spec,
        output=Output(
            kind="probability" if is_binary else "probabilities",
            name="class",
            labels=pictures.labels,
            threshold=0.5 if is_binary else None,
            tensor="outputs",
        ),
        epochs=EPOCHS,
        load=lambda _: pictures.splits,
        fit=fit,
        figures=lambda _, splits: measure_baseline(splits, "multiclass", len(pictures.labels)),
        plots={
            "pictures.png": plots.draw_digits,
            "loss.png": plots.draw_loss,
            "confusion.png": plots.draw_confusion,
            "misclassified.png": plots.draw_misclassified,
            "reliability.png": plots.draw_reliability,
        },
        purpose=f"Tells pictures like those of `{folder.name}` apart.",
        limits="It gives one of its classes to every picture, also to one of something else.",
        source=f"`{folder.name}`, {sum(pictures.counts.values()):,} pictures, split at random, each class in the same"
        " shares; copies of one file are in one split.",
        calibrates=True,
        sections=lambda _, splits, predictor: _write_sections(pictures, splits, predictor),
        benefits_from_gpu=True,
        command=command,
    )


def list_warnings(counts: Mapping[str, int]) -> list[str]:
    """Return what the user should look at before trusting the model, of the number of pictures by class."""
    average = sum(counts.values()) / len(counts)
    few = [f"too few pictures: `{label}` has {count}" for label, count in counts.items() if count < _FEW]
    rare = [
        f"class imbalance: `{label}` has {count} pictures, the average class {average:.0f}"
        for label, count in counts.items()
        if count < _RARE * average
    ]
    return few + rare


def _write_sections(pictures: Pictures, splits: Splits, predictor: Predictor) -> dict[str, str]:
    warnings = "\n".join(f"- {each}" for each in list_warnings(pictures.counts)) or "None."
    return {"Warnings": warnings, "Comparison": describe_baseline(splits, predictor)}
