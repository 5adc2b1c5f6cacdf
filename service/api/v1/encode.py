"""Encode the typed API's responses: `{"model", "version", "predictions"}`."""

import base64
from collections.abc import Callable
from itertools import compress
from typing import Any

import numpy as np
import orjson

from service.api.v1.decode import Call
from service.api.v1.tfserving import build_answer
from service.errors import TooLargeError
from service.model import postprocess
from service.model.backends import Array
from service.model.columns import split_rows
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
    if call.form:
        return _JSON, orjson.dumps(build_answer(outputs, manifest, call.form), option=_NUMPY)
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
    shown: Any = inputs
    if inputs.dtype.names:
        tensors = split_rows(inputs)
        shown = [{name: tensor[index].tolist() for name, tensor in tensors.items()} for index in range(len(inputs))]
    answer = {"model": manifest.name, "version": manifest.version, "instances": shown}
    return _JSON, orjson.dumps(answer, option=_NUMPY)


def build_predictions(outputs: Array, manifest: Manifest, call: Call) -> list[dict[str, Any]]:
    """Return one prediction for each row, in the words of the manifest's task."""
    kind = manifest.output.kind
    if kind == "value":
        return [{"prediction": value} for value in outputs[:, 0]]
    if kind in _BUILDERS or manifest.task == "multilabel":
        return _BUILDERS.get(kind, _build_multilabel)(outputs, manifest, call)
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


def _build_values(outputs: Array, manifest: Manifest, _: Call) -> list[dict[str, Any]]:
    names = [value.name for value in manifest.output.values]
    return [{"prediction": dict(zip(names, row, strict=True))} for row in outputs]


def _build_intervals(outputs: Array, _: Manifest, __: Call) -> list[dict[str, Any]]:
    return [{"prediction": row[0], "interval": row[1:]} for row in outputs]


def _build_embeddings(outputs: Array, _: Manifest, call: Call) -> list[dict[str, Any]]:
    if not call.is_base64:
        return [{"embedding": row} for row in outputs]
    return [{"embedding": base64.b64encode(row.astype("<f4").tobytes()).decode()} for row in outputs]


def _build_named(outputs: Array, _: Manifest, __: Call) -> list[dict[str, Any]]:
    tensors = {}
    for name, tensor in split_rows(outputs).items():
        tensors[name] = tensor.tolist() if tensor.dtype == object else np.ascontiguousarray(tensor)
    return [{"outputs": {name: tensor[index] for name, tensor in tensors.items()}} for index in range(len(outputs))]


def _build_multilabel(outputs: Array, manifest: Manifest, call: Call) -> list[dict[str, Any]]:
    probabilities = postprocess.interpret(outputs, manifest)
    present = postprocess.choose_present(probabilities, manifest, call.threshold)
    labels = manifest.output.labels
    return [
        {"prediction": chosen, "labels": list(compress(labels, chosen)), "probabilities": row}
        for chosen, row in zip(present.astype(int).tolist(), probabilities, strict=True)
    ]


_BUILDERS: dict[str, Callable[[Array, Manifest, Call], list[dict[str, Any]]]] = {
    "values": _build_values,
    "interval": _build_intervals,
    "vector": _build_embeddings,
    "tensors": _build_named,
}


def _choose_best(row: Array, top_k: int, labels: tuple[str, ...]) -> list[dict[str, Any]]:
    order = np.argsort(-row, kind="stable")[:top_k].tolist()
    return [{"prediction": index, "label": labels[index], "probability": row[index]} for index in order]
