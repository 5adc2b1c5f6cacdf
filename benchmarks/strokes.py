"""Digits as a person draws them on the playground's pad: how often is each model right?

200 drawings, 20 of each digit, made from pen trajectories in the usual ways of writing a digit, each with its own
wobble, proportions, slant, size, place and pen. They go through the service's own picture preparation, as PNG files of
the pad's size, to the newest version of each model. Nothing here has seen a training picture.

    python -m benchmarks.strokes [--models-dir models] [--seed 0] [--save sheet.png] [mnist mnist-cnn …]
"""

import argparse
import io
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from service.model.manifest import ImageInput
from service.model.predictor import AnyPredictor, Predictor, load_predictor
from service.model.preprocess import read_image

SIDE = 280  # pixels of the pad
EACH = 20  # drawings of a digit
_OVER = 3  # drawn larger by this, then averaged: smooth edges, as a browser's canvas draws
Points = NDArray[np.float64]  # (points, 2): x to the right and y down, in [0, 1]


def _curve(*through: tuple[float, float]) -> Points:
    """Return a smooth line through points: a uniform Catmull-Rom spline, 12 points a piece."""
    knots = np.array([through[0], *through, through[-1]])
    t = np.linspace(0, 1, 12, endpoint=False)[:, None]
    pieces = [
        0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
        for a, b, c, d in zip(knots, knots[1:], knots[2:], knots[3:], strict=False)
    ]
    return np.concatenate([*pieces, knots[-1:]])


def _line(*through: tuple[float, float]) -> Points:
    """Return straight pieces between points, 12 points a piece."""
    pieces = [np.linspace(a, b, 12) for a, b in pairwise(through)]
    return np.concatenate(pieces)


def _arc(x: float, y: float, wide: float, tall: float, start: float, turn: float) -> Points:
    """Return part of an ellipse around (x, y); angles in degrees, 0 to the right and 90 down."""
    angles = np.radians(np.linspace(start, start + turn, max(8, int(abs(turn) / 8))))
    return np.stack([x + wide * np.cos(angles), y + tall * np.sin(angles)], axis=1)


def _join(*parts: Points) -> Points:
    return np.concatenate(parts)


WAYS: dict[int, list[list[Points]]] = {
    0: [
        [_arc(0.5, 0.5, 0.32, 0.5, -90, -365)],
        [_arc(0.5, 0.5, 0.42, 0.48, -70, -350)],
    ],
    1: [
        [_line((0.5, 0.0), (0.5, 1.0))],
        [_line((0.3, 0.25), (0.55, 0.0), (0.53, 1.0))],
    ],
    2: [
        [_join(_curve((0.15, 0.25), (0.3, 0.05), (0.6, 0.0), (0.8, 0.2), (0.65, 0.55), (0.12, 1.0)), _line((0.12, 1.0), (0.88, 0.98)))],  # noqa: E501 - a stroke is a line
        [_curve((0.12, 0.2), (0.45, 0.0), (0.78, 0.2), (0.6, 0.6), (0.25, 0.92), (0.12, 0.85), (0.3, 0.78), (0.6, 0.95), (0.92, 0.9))],  # noqa: E501
    ],
    3: [
        [_curve((0.15, 0.12), (0.5, 0.0), (0.78, 0.2), (0.6, 0.43), (0.4, 0.47)), _curve((0.4, 0.47), (0.7, 0.52), (0.85, 0.75), (0.55, 1.0), (0.12, 0.9))],  # noqa: E501
        [_join(_arc(0.42, 0.24, 0.33, 0.24, -150, 235), _arc(0.42, 0.74, 0.4, 0.27, -85, 235))],
    ],
    4: [
        [_line((0.3, 0.0), (0.12, 0.6), (0.9, 0.58)), _line((0.68, 0.05), (0.66, 1.0))],
        [_line((0.62, 0.0), (0.08, 0.65), (0.92, 0.65)), _line((0.64, 0.3), (0.62, 1.0))],
    ],
    5: [
        [_join(_line((0.28, 0.05), (0.2, 0.45)), _curve((0.2, 0.45), (0.5, 0.38), (0.82, 0.6), (0.65, 0.93), (0.35, 1.0), (0.1, 0.9))), _line((0.28, 0.05), (0.82, 0.03))],  # noqa: E501
        [_join(_line((0.82, 0.0), (0.28, 0.03), (0.22, 0.46)), _arc(0.45, 0.7, 0.37, 0.28, -130, 270))],
    ],
    6: [
        [_curve((0.68, 0.0), (0.35, 0.25), (0.18, 0.65), (0.35, 0.97), (0.68, 0.95), (0.8, 0.72), (0.6, 0.55), (0.3, 0.62), (0.2, 0.78))],  # noqa: E501
        [_join(_curve((0.55, 0.0), (0.25, 0.4), (0.16, 0.72)), _arc(0.48, 0.74, 0.32, 0.26, 180, -375))],
    ],
    7: [
        [_line((0.12, 0.05), (0.85, 0.03), (0.4, 1.0))],
        [_join(_line((0.12, 0.08), (0.85, 0.05)), _curve((0.85, 0.05), (0.58, 0.5), (0.45, 1.0)))],
        [_line((0.12, 0.05), (0.85, 0.03), (0.4, 1.0)), _line((0.3, 0.52), (0.82, 0.5))],
    ],
    8: [
        [_curve((0.75, 0.12), (0.45, 0.0), (0.22, 0.2), (0.5, 0.46), (0.8, 0.75), (0.5, 1.0), (0.18, 0.76), (0.48, 0.46), (0.78, 0.24), (0.72, 0.1))],  # noqa: E501
        [_arc(0.5, 0.24, 0.27, 0.24, -90, 365), _arc(0.5, 0.74, 0.34, 0.26, -90, 365)],
    ],
    9: [
        [_join(_arc(0.48, 0.26, 0.32, 0.26, -20, -345), _line((0.8, 0.2), (0.74, 1.0)))],
        [_join(_curve((0.8, 0.14), (0.48, 0.0), (0.18, 0.25), (0.45, 0.5), (0.78, 0.3), (0.8, 0.1)), _curve((0.8, 0.1), (0.76, 0.6), (0.55, 1.0)))],  # noqa: E501
    ],
}  # fmt: skip


def draw_digit(digit: int, random: np.random.Generator) -> Image.Image:
    """Return one drawing of a digit, dark ink on a white pad, as L of 280 × 280 pixels."""
    strokes = WAYS[digit][random.integers(len(WAYS[digit]))]
    size = random.uniform(0.45, 0.82)
    stretch = random.uniform(0.55, 0.85) if digit != 1 else random.uniform(0.3, 0.8)
    slant, turn = random.normal(-0.1, 0.13), math.radians(random.normal(0, 4))
    pen = random.uniform(14, 28)
    moved = [_wobble(stroke - 0.5, random) for stroke in strokes]
    shape = np.array([[stretch, 0], [slant, 1]]) * size
    rotate = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    room = (1 - size) / 2 - 0.06
    place = 0.5 + random.uniform(-1, 1, 2) * max(room, 0)
    return _ink([(stroke @ shape @ rotate + place) * SIDE for stroke in moved], pen)


def _wobble(stroke: Points, random: np.random.Generator) -> Points:
    """Return a stroke as a hand would trace it: shifted, scaled and bent a little, with its ends not quite there."""
    along = np.linspace(0, 1, len(stroke))[:, None]
    bent = stroke * random.normal(1, 0.05, 2) + random.normal(0, 0.015, 2)
    for wave in (1, 2, 3):
        bent = bent + random.normal(0, 0.014, 2) * np.sin(np.pi * wave * along + random.uniform(0, 2 * np.pi))
    return np.asarray(bent + random.normal(0, 0.002, stroke.shape))


def _ink(strokes: Sequence[Points], pen: float) -> Image.Image:
    pad = Image.new("L", (SIDE * _OVER, SIDE * _OVER), 255)
    brush = ImageDraw.Draw(pad)
    radius = pen * _OVER / 2
    for stroke in strokes:
        points = [(float(x), float(y)) for x, y in stroke * _OVER]
        brush.line(points, fill=0, width=round(pen * _OVER))
        for x, y in points:
            brush.ellipse((x - radius, y - radius, x + radius, y + radius), fill=0)
    return pad.reduce(_OVER)


def draw_all(seed: int, each: int = EACH) -> list[tuple[int, Image.Image]]:
    """Return the drawings with their digits, the same for the same seed."""
    random = np.random.default_rng(seed)
    return [(digit, draw_digit(digit, random)) for digit in range(10) for _ in range(each)]


def count_right(predictor: AnyPredictor, drawings: Sequence[tuple[int, Image.Image]]) -> tuple[int, list[str]]:
    """Return how many drawings a digit model reads right, and `drawn→read` for each that it does not."""
    assert isinstance(predictor, Predictor)
    spec = predictor.manifest.input
    assert isinstance(spec, ImageInput)
    right, wrong = 0, []
    for digit, drawing in drawings:
        file = io.BytesIO()
        drawing.save(file, "PNG")
        label = predictor.manifest.output.labels[int(predictor.predict(read_image(file.getvalue(), spec)).argmax())]
        right += label == str(digit)
        if label != str(digit):
            wrong.append(f"{digit}→{label}")
    return right, wrong


def save_sheet(drawings: Sequence[tuple[int, Image.Image]], path: Path) -> None:
    """Write the drawings as one picture, a row for each digit."""
    small, each = SIDE // 4, len(drawings) // 10
    sheet = Image.new("L", (small * each, small * 10), 255)
    for index, (_, drawing) in enumerate(drawings):
        sheet.paste(drawing.reduce(4), (index % each * small, index // each * small))
    sheet.save(path)


def newest(models_dir: Path, name: str) -> Path | None:
    """Return the folder of a model's newest version, if there is one."""
    versions = [path.parent for path in (models_dir / name).glob("*/manifest.json") if path.parent.name.isdigit()]
    return max(versions, key=lambda folder: int(folder.name), default=None)


def main() -> None:
    """Print each model's accuracy."""
    parser = argparse.ArgumentParser(description="accuracy of digit models over generated drawings")
    parser.add_argument("names", nargs="*", default=["mnist", "mnist-mlp-best", "mnist-cnn"])
    parser.add_argument("--models-dir", type=Path, default=Path("models"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="write the drawings to this PNG file")
    chosen = parser.parse_args()
    drawings = draw_all(chosen.seed)
    if chosen.save:
        save_sheet(drawings, chosen.save)
    for name in chosen.names:
        folder = newest(chosen.models_dir, name)
        if folder is None:
            print(f"{name}: not in {chosen.models_dir}")
            continue
        right, wrong = count_right(load_predictor(folder, device="cpu"), drawings)
        missed = f"; wrong: {' '.join(sorted(wrong))}" if wrong else ""
        print(f"{name} version {folder.name}: {right / len(drawings):.1%} of {len(drawings)} drawings{missed}")


if __name__ == "__main__":
    main()
