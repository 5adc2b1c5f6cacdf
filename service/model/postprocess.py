"""From a graph's outputs to probabilities and decisions, vectorised over rows."""

import numpy as np
from numpy.typing import NDArray

from service.model.backends import Array
from service.model.manifest import Manifest

DEFAULT_THRESHOLD = 0.5


def sigmoid(logits: Array) -> Array:
    """Return 1 / (1 + exp(-logits)), elementwise, without overflow at any finite logit."""
    small = np.exp(-np.abs(logits))
    result: Array = np.where(logits >= 0, 1, small) / (1 + small)
    return result.astype(np.float32)


def softmax(logits: Array) -> Array:
    """Return the softmax of each row of finite logits (N, K): rows sum to 1 and do not change when shifted."""
    with np.errstate(over="ignore"):  # two logits may lie further apart than float32 can say: exp(-inf) is 0
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: Array = powers / powers.sum(axis=1, keepdims=True)
    return result


def interpret(outputs: Array, manifest: Manifest) -> Array:
    """Turn a graph's outputs (N, K) into values or probabilities, one row for each instance.

    Returns:
        float32: regression (N, 1) values; binary (N, 2), multiclass and multilabel (N, labels) probabilities in label
            order.
    """
    kind = manifest.output.kind
    if kind in ("value", "probabilities"):
        return outputs
    if kind == "logits":
        if manifest.task == "multiclass":
            return softmax(outputs)
        outputs = sigmoid(outputs)
        if manifest.task == "multilabel":
            return outputs
    return np.concatenate((1 - outputs, outputs), axis=1)


def classify(outputs: Array, manifest: Manifest, threshold: float | None = None) -> tuple[Array, list[int]]:
    """Return the probabilities float32 (N, labels) of a classifier's outputs (N, K), and the index of each row's label.

    `threshold` is the request's, for a binary model.
    """
    probabilities = interpret(outputs, manifest)
    return probabilities, choose_labels(probabilities, manifest, threshold)


def choose_labels(probabilities: Array, manifest: Manifest, threshold: float | None = None) -> list[int]:
    """Return the index of each row's label: argmax, or for binary models 1 where P(second label) >= threshold.

    The threshold is rounded to float32, as probabilities are reported, so that 0.7 reaches a threshold of 0.7.
    """
    if manifest.task == "multiclass":
        best: list[int] = probabilities.argmax(axis=1).tolist()
        return best
    limit = float(np.float32(choose_threshold(manifest, threshold)))
    return [int(probability >= limit) for probability in probabilities[:, 1].tolist()]


def decide(probabilities: Array, manifest: Manifest, threshold: float | None = None) -> NDArray[np.intp]:
    """Return `choose_labels` as an array (N,)."""
    return np.array(choose_labels(probabilities, manifest, threshold), dtype=np.intp)


def choose_present(probabilities: Array, manifest: Manifest, threshold: float | None = None) -> NDArray[np.bool_]:
    """Return which labels of a multilabel model apply, (N, labels), by the request's threshold or the labels' own."""
    own = manifest.output.thresholds or (DEFAULT_THRESHOLD,)
    return probabilities >= np.array(own if threshold is None else (threshold,), np.float32)


def choose_threshold(manifest: Manifest, threshold: float | None = None) -> float:
    """Return the threshold of a binary model: the request's, else the manifest's, else 0.5."""
    if threshold is not None:
        return threshold
    return DEFAULT_THRESHOLD if manifest.output.threshold is None else manifest.output.threshold
