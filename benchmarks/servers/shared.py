"""What every contender does with a request, so that only the serving differs."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

MODEL = Path(os.environ.get("BENCH_MODEL", "models/mnist/1"))


def open_session() -> ort.InferenceSession:
    """Open the model's ONNX artifact on one thread, as one worker per core wants it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return ort.InferenceSession(str(MODEL / "model.onnx"), options)


def read_labels() -> list[str]:
    """Return the model's class labels."""
    labels: list[str] = json.loads((MODEL / "manifest.json").read_text())["output"]["labels"]
    return labels


def describe(outputs: Any, labels: list[str]) -> list[dict[str, Any]]:  # noqa: ANN401 - an array of any width
    """Return predictions in this service's words for probabilities (N, K), or (N, 1) of the second label."""
    rows = np.concatenate([1 - outputs, outputs], axis=1) if outputs.shape[1] == 1 else outputs
    indices = rows.argmax(axis=1).tolist()
    return [
        {"prediction": index, "label": labels[index], "probability": row[index], "probabilities": row}
        for index, row in zip(indices, rows.tolist(), strict=True)
    ]
