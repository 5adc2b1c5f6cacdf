"""Check that a graph matches its manifest, and answers as its library does, and record golden samples from it."""

import math
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidRequestError, ServiceError
from service.model.backends import Array, Backend, open_backend
from service.model.manifest import BackendName, GoldenRows, Manifest
from service.model.predictor import PROBABILITY_TOLERANCE, Predictor, check_alone, worst_excess
from service.packaging.converted import Converted
from service.packaging.samples import Samples

Rows = NDArray[Any]  # (N, *shape): float64 from a file, or random float32

_GOLDEN_ROWS = 3
_PROBES = 8  # random rows per scale
_SAMPLE_ROWS = 256
_PARITY_ROWS = 1000
_TOLERANCE = 1e-4  # between a graph and the library
_FEW_OFF = 0.1  # of the rows: more than that is not about splits of trees
_MOST_OFF = 0.01  # of the rows may differ by more: those that lie on a split of a tree


def add_golden_rows(manifest: Manifest, contents: dict[BackendName, bytes], rows: Rows | None) -> Manifest:
    """Return the manifest of a graph with columns or several outputs, with golden samples from it.

    Raises:
        InvalidRequestError: The graph does not run on these inputs.
        ModelRefusedError: An output depends on the other instances in the batch.
    """
    predictor = Predictor(manifest, open_backend("onnx", contents["onnx"], manifest, "cpu", 1))
    inputs = (_choose_rows(manifest, None).astype(np.float32) if rows is None else rows)[:_GOLDEN_ROWS]
    try:
        outputs = predictor.predict(inputs)
    except ServiceError as error:
        if manifest.input.kind == "columns" and any(column.nullable for column in manifest.input.columns):
            raise InvalidRequestError(
                "the graph gives no number for rows that lack a value; leave such rows out of --samples"
            ) from error
        raise InvalidRequestError(f"the graph does not run on the samples: {error}") from error
    check_alone(predictor, inputs, outputs)
    return manifest.with_golden_rows(None, GoldenRows(inputs, outputs))


def add_golden(
    manifest: Manifest, contents: dict[BackendName, bytes], samples: Samples | None, kind_given: bool
) -> Manifest:
    """Return the manifest with golden samples from the first backend, after checking that the others agree.

    Args:
        manifest: The manifest built from the flags.
        contents: The artifacts.
        samples: Real inputs; None uses random ones.
        kind_given: Whether `--output-kind` was given. If not, two output columns of a binary model are taken as
            probabilities.

    Raises:
        InvalidRequestError: A graph does not run on these inputs, or its outputs do not match the manifest.
        ModelRefusedError: An output depends on the other instances in the batch.
    """
    backends = [open_backend(name, content, manifest, "cpu", 1) for name, content in contents.items()]
    rows = _choose_rows(manifest, samples)
    inputs = rows[:_GOLDEN_ROWS].astype(np.float32)
    outputs = [_run(backend, inputs) for backend in backends]
    if manifest.task == "binary" and not kind_given and outputs[0].shape[1:] == (2,):
        manifest = manifest.model_copy(update={"output": manifest.output.model_copy(update={"kind": "probabilities"})})
    for backend, other in zip(backends, outputs, strict=True):
        _check_shape(backend.name, other, len(inputs), manifest)
        if worst_excess(other, outputs[0]) > 0:
            raise InvalidRequestError(
                f"{backend.name} and {backends[0].name} give different outputs; they are not one model"
            )
        check_alone(Predictor(manifest, backend), inputs, other)
    many = np.concatenate([outputs[0], _probe(backends[0], manifest, rows)])
    _check_meaning(many, manifest)
    _warn_of_probabilities(many, manifest)
    return manifest.with_golden_rows(None, GoldenRows(inputs, outputs[0]))


def check_parity(manifest: Manifest, content: bytes, converted: Converted, samples: Rows | None) -> None:
    """Check that the graph answers as the library does: numbers within 1e-4, and equal labels.

    A graph scales numbers in float32, so one may fall on another side of a tree's split than in the library's float64:
    up to 1 % of the rows may differ by more, and are reported.

    Args:
        manifest: With golden samples.
        content: The graph.
        converted: It, with the library's own answers.
        samples: Inputs as exact as they were given, (N, *shape) or with a field for each tensor of columns. The library
            takes them so, and the graph as float32: a tree may split between the two. None takes random ones.

    Raises:
        InvalidRequestError: It does not.
    """
    golden = manifest.golden_rows
    if converted.predict is None or golden is None:
        return
    rows: Rows = golden.inputs if samples is None else samples
    if samples is None and manifest.input.kind == "tabular":
        noise = np.random.default_rng(0).standard_normal((_PARITY_ROWS, *rows.shape[1:])).astype(np.float32)
        rows = np.concatenate([rows, (noise * np.abs(rows).max(axis=0))])
    rows = rows[:_PARITY_ROWS]
    actual: NDArray[Any] = open_backend("onnx", content, manifest, "cpu", 1).run(rows.astype(golden.inputs.dtype))
    try:
        expected = np.asarray(converted.predict(rows), np.float64).reshape(len(rows), -1)
    except Exception as error:  # whatever the library raises
        raise InvalidRequestError(f"the library does not predict for the samples: {error}") from error
    if actual.dtype.names:
        if "label" in actual.dtype.names and not np.array_equal(actual["label"].reshape(-1), expected.reshape(-1)):
            raise InvalidRequestError("the graph and the library give different labels; nothing was written")
        return
    if expected.shape[1] == 1 and actual.shape[1] == 2:  # noqa: PLR2004 - a probability of the second label
        expected = np.concatenate([1 - expected, expected], axis=1)
    if expected.shape != actual.shape:
        raise InvalidRequestError(f"the library answers {list(expected.shape)}, the graph {list(actual.shape)}")
    difference = np.abs(actual - expected)
    is_off = (difference > _TOLERANCE * np.maximum(1, np.abs(expected))).any(axis=1)
    if is_off.mean() > _MOST_OFF:
        row = int(np.argmax(difference.max(axis=1)))
        cure = (
            "; fit trees on numbers that are not scaled, for they need no scaling" if is_off.mean() < _FEW_OFF else ""
        )
        raise InvalidRequestError(
            f"the graph differs from the library by {difference.max():.2g} in row {row + 1}, and by too much in"
            f" {is_off.sum()} of {len(rows)} rows; nothing was written{cure}"
        )
    if is_off.any():
        print(
            f"warning: {is_off.sum()} of {len(rows)} rows differ from the library by up to {difference.max():.2g}:"
            " a number lies so near a split of a tree that float32 falls on the other side",
            file=sys.stderr,
        )
    if manifest.task in ("binary", "multiclass") and actual.shape[1] > 1:
        best = np.sort(expected, axis=1)
        is_clear = ~is_off & (best[:, -1] - best[:, -2] > 2 * _TOLERANCE)
        if (actual.argmax(axis=1) != expected.argmax(axis=1))[is_clear].any():
            raise InvalidRequestError("the graph and the library give different labels; nothing was written")


def _choose_rows(manifest: Manifest, samples: Samples | None) -> Rows:
    """Return the samples as rows, (N, *shape), or random rows in [0, 1) if there are none."""
    shape = manifest.input.shape
    if samples is None:
        return np.random.default_rng(0).random((_GOLDEN_ROWS, *shape), dtype=np.float32)
    rows = samples.rows
    if manifest.input.kind == "image":
        if rows.shape[1] != math.prod(shape):
            raise InvalidRequestError(f"--samples has {rows.shape[1]} numbers a picture, not {math.prod(shape)}")
        if rows.min() < 0 or rows.max() > 1:
            raise InvalidRequestError("--samples of an image model are numbers in [0, 1]; divide bytes by 255")
    return rows[:_SAMPLE_ROWS].reshape(-1, *shape)


def _run(backend: Backend, inputs: Array) -> Array:
    try:
        outputs = backend.run(inputs)
    except ServiceError as error:
        raise InvalidRequestError(
            f"the {backend.name} graph does not run on inputs {list(inputs.shape)}: {error}"
        ) from error
    if not np.isfinite(outputs).all():
        raise InvalidRequestError(
            f"the {backend.name} graph gives numbers that are not finite on inputs from {inputs.min():.3g} to"
            f" {inputs.max():.3g}; give inputs that it is made for with --samples"
        )
    return outputs


def _check_shape(name: BackendName, outputs: Array, count: int, manifest: Manifest) -> None:
    wanted = (count, manifest.output_width)
    if outputs.shape == wanted:
        return
    cure = ""
    if manifest.task == "binary" and outputs.shape == (count, 2):
        is_logits = manifest.output.kind == "logits"
        cure = "; two logits are --task multiclass" if is_logits else "; two columns are --output-kind probabilities"
    raise InvalidRequestError(
        f"the {name} graph gives {list(outputs.shape)} where task and labels say {list(wanted)}{cure}"
    )


def _probe(backend: Backend, manifest: Manifest, rows: Rows) -> Array:
    """Return the graph's finite outputs for the samples and for random rows at several scales."""
    random = np.random.default_rng(1)
    shape = (_PROBES, *manifest.input.shape)
    if manifest.input.kind == "image":  # pixels are in [0, 1]
        tries = [rows, random.random(shape), random.choice([0.0, 1.0], shape)]
    else:
        tries = [rows, *(scale * random.choice([-1.0, 1.0], shape) for scale in (1, 10, 100))]
    found: list[Array] = [np.empty((0, manifest.output_width), np.float32)]
    for inputs in tries:
        try:
            outputs = backend.run(inputs.astype(np.float32))
        except ServiceError:  # the graph may not be defined there
            continue
        found.append(outputs[np.isfinite(outputs).all(axis=1)])
    return np.concatenate(found)


def _check_meaning(outputs: Array, manifest: Manifest) -> None:
    """Raise InvalidRequestError for outputs that contradict `--output-kind`."""
    kind = manifest.output.kind
    if kind not in ("probability", "probabilities"):
        return
    outside = outputs[(outputs < -PROBABILITY_TOLERANCE) | (outputs > 1 + PROBABILITY_TOLERANCE)]
    if outside.size:
        two = "--task multiclass " if manifest.task == "binary" and kind == "probabilities" else ""
        raise InvalidRequestError(
            f"the graph gives {outside[0]:g}, not a probability; are its outputs {two}--output-kind logits?"
        )
    odd = [total for total in outputs.sum(axis=1) if abs(total - 1) > PROBABILITY_TOLERANCE]
    if kind == "probabilities" and manifest.task != "multilabel" and odd:
        raise InvalidRequestError(f"the graph gives probabilities that sum to {odd[0]:g}, not to 1")


def _warn_of_probabilities(outputs: Array, manifest: Manifest) -> None:
    """Warn if logits look like probabilities, which a softmax or sigmoid would distort."""
    is_sum = manifest.output_width == 1 or np.allclose(outputs.sum(axis=1), 1, atol=PROBABILITY_TOLERANCE)
    if manifest.output.kind == "logits" and outputs.min() >= 0 and outputs.max() <= 1 and is_sum:
        right = "probability" if manifest.output_width == 1 else "probabilities"
        print(f"warning: these logits look like probabilities; if they are, say --output-kind {right}", file=sys.stderr)
