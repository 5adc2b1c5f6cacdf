"""Encode the typed API's responses: `{"model", "version", "predictions"}`."""

from typing import Any

import numpy as np
import orjson

from service.api.v1.decode import Call
from service.errors import TooLargeError
from service.model import postprocess
from service.model.backends import Array
from service.model.manifest import AnyManifest, Manifest

MAX_PREVIEW = 2**17  # numbers: over a megabyte of JSON, which takes 3 ms

_JSON = b"content-type: application/json\r\n"
_NUMPY = orjson.OPT_SERIALIZE_NUMPY


def encode(outputs: Array, manifest: AnyManifest, call: Call) -> tuple[bytes, bytes]:
    """Return header lines and body of a predict response.

    Numbers are written as the shortest decimal that reads back as the same float32.

    Args:
        outputs: of the graph, float32 (N, K), one row for each instance.
        manifest: of the version that gave them.
        call: what was asked.
    """
    assert isinstance(manifest, Manifest)
    predictions = build_predictions(outputs, manifest, call)
    answer = {"model": manifest.name, "version": manifest.version, "predictions": predictions}
    return _JSON, orjson.dumps(answer, option=_NUMPY)


def encode_preview(inputs: Array, manifest: AnyManifest) -> tuple[bytes, bytes]:
    """Return header lines and body of a preview: the instances as the graph is given them.

    Raises:
        TooLargeError: they have more numbers than a preview shows.
    """
    if inputs.size > MAX_PREVIEW:
        raise TooLargeError(f"the instances have {inputs.size} numbers; a preview shows at most {MAX_PREVIEW}")
    answer = {"model": manifest.name, "version": manifest.version, "instances": inputs}
    return _JSON, orjson.dumps(answer, option=_NUMPY)


def build_predictions(outputs: Array, manifest: Manifest, call: Call) -> list[dict[str, Any]]:
    """Return one prediction for each row, in the words of the manifest's task."""
    if manifest.task == "regression":
        return [{"prediction": value} for value in outputs[:, 0]]
    labels = manifest.output.labels
    probabilities, indices = postprocess.classify(outputs, manifest, call.threshold)
    is_binary = manifest.task == "binary"
    predictions: list[dict[str, Any]] = []
    for index, row in zip(indices, probabilities, strict=True):
        # In a binary model "probability" is always that of the second label, the one that the threshold speaks of.
        probability = row[1 if is_binary else index]
        prediction = {"prediction": index, "label": labels[index], "probability": probability, "probabilities": row}
        predictions.append(prediction)
    if call.top_k is not None:
        for prediction, row in zip(predictions, probabilities, strict=True):
            prediction["top_k"] = _choose_best(row, call.top_k, labels)
    return predictions


def _choose_best(row: Array, top_k: int, labels: tuple[str, ...]) -> list[dict[str, Any]]:
    order = np.argsort(-row, kind="stable")[:top_k].tolist()
    return [{"prediction": index, "label": labels[index], "probability": row[index]} for index in order]
