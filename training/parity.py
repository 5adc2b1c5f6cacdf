"""Parity: the artifacts agree with the exported net, run by the backends that will serve them."""

import math

import numpy as np
import torch
from torch import nn

from service.errors import InferenceError, ModelRefusedError
from service.model import postprocess
from service.model.backends import Array, open_backend
from service.model.manifest import BackendName, ColumnsInput, Manifest
from service.model.predictor import Predictor, worst_excess
from training.errors import CheckError
from training.evaluate import as_rows

BATCH_SIZES = (1, 2, 7, 64, 256)
_DAYS = (10_000.0, 22_000.0)  # since 1970, of dates
_GAPS = 0.2  # share of missing values


def open_predictors(manifest: Manifest, contents: dict[BackendName, bytes]) -> dict[BackendName, Predictor]:
    """Open each artifact on the CPU with the service's own backend.

    Raises:
        CheckError: a backend refuses its artifact.
    """
    try:
        return {
            name: Predictor(manifest, open_backend(name, content, manifest, "cpu", threads=torch.get_num_threads()))
            for name, content in contents.items()
        }
    except ModelRefusedError as error:
        raise CheckError(f"an exported artifact does not open: {error}") from error


def check_parity(net: nn.Module, predictors: dict[BackendName, Predictor], seed: int) -> dict[BackendName, float]:
    """Compare each backend with the eager serving net on random and edge inputs.

    Returns:
        the largest |backend − net| of each backend.

    Raises:
        CheckError: some output differs by more than 1e-5 + 1e-4·|net|, some label differs, or a graph fails.
    """
    return {name: _compare(net, predictor, seed) for name, predictor in predictors.items()}


def _compare(net: nn.Module, predictor: Predictor, seed: int) -> float:
    manifest, name = predictor.manifest, predictor.backend.name
    largest = 0.0
    for inputs in build_batches(manifest, seed):
        expected = run_net(net, inputs)
        try:
            actual = predictor.run(as_rows(inputs, manifest))
        except InferenceError as error:
            raise CheckError(f"the {name} artifact fails on a batch of {len(inputs)}: {error}") from error
        excess = worst_excess(actual, expected)
        if excess > 0:
            raise CheckError(
                f"the {name} artifact differs from the net by {excess:.2g} more than the tolerance"
                f" on a batch of {len(inputs)}"
            )
        if manifest.task != "regression" and (labels(actual, manifest) != labels(expected, manifest)).any():
            raise CheckError(f"the {name} artifact and the net give different labels on a batch of {len(inputs)}")
        largest = max(largest, float(np.abs(actual - expected).max()))
    return largest


def build_batches(manifest: Manifest, seed: int) -> list[Array]:
    """Return random batches of several sizes over the input's range, and one batch of edges.

    The edges are zeros, ones, all minima and all maxima: of pixels 0 and 1, of features ten times the range's.
    """
    if isinstance(manifest.input, ColumnsInput):
        return [build_columns(manifest.input, size, seed) for size in BATCH_SIZES]
    shape = manifest.input.shape
    low, high = _ranges(manifest)
    generator = np.random.default_rng(seed)
    batches = [generator.uniform(low, high, (size, *shape)).astype(np.float32) for size in BATCH_SIZES]
    reach = 1 if manifest.input.kind == "image" else 10
    edges = np.array([np.zeros(shape), np.ones(shape), reach * low + np.zeros(shape), reach * high + np.zeros(shape)])
    return [*batches, edges.astype(np.float32)]


def build_columns(spec: ColumnsInput, count: int, seed: int) -> Array:
    """Return random rows float32 (N, columns) over the columns' ranges, with gaps where a column may have them."""
    generator = np.random.default_rng(seed)
    rows = np.empty((count, len(spec.columns)), np.float32)
    for index, column in enumerate(spec.columns):
        if column.type in ("category", "boolean"):
            rows[:, index] = generator.integers(0, len(column.values) or 2, count)
        elif column.type == "datetime":
            rows[:, index] = generator.uniform(*_DAYS, count)
        else:
            low, high = column.minimum or 0.0, 1.0 if column.maximum is None else column.maximum
            rows[:, index] = generator.uniform(min(low, high), high, count)
        if column.nullable:
            rows[generator.random(count) < _GAPS, index] = np.nan
    return rows


def _ranges(manifest: Manifest) -> tuple[Array, Array]:
    if manifest.input.kind == "image":
        return np.zeros(1, np.float32), np.ones(1, np.float32)
    assert manifest.input.kind == "tabular"
    bounds = [(feature.minimum, feature.maximum) for feature in manifest.input.features]
    low = [0.0 if least is None else least for least, _ in bounds]
    high = [1.0 if greatest is None else greatest for _, greatest in bounds]
    return np.array(low, np.float32), np.array(high, np.float32)


def run_net(net: nn.Module, inputs: Array) -> Array:
    """Return the eager net's outputs float32 (N, K)."""
    net.eval()
    with torch.inference_mode():
        outputs: Array = net(torch.from_numpy(inputs)).numpy()
    return outputs.reshape(len(inputs), math.prod(outputs.shape[1:]))


def labels(outputs: Array, manifest: Manifest) -> np.ndarray[tuple[int, ...], np.dtype[np.intp]]:
    """Return the index of each row's label."""
    return postprocess.decide(postprocess.interpret(outputs, manifest), manifest)
