"""Who is measured, on what."""

import json
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.model.manifest import Manifest
from service.model.version_folder import load_manifest

JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Contender:
    """A server: its command (with `{port}` and `{model}`), its paths, the package it needs, and where it runs."""

    name: str
    command: tuple[str, ...]
    path: str = "/predict"
    v2_path: str = ""
    needs: str = ""
    folder: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def installed(self) -> bool:
        """Tell whether it can be started here."""
        return not self.needs or find_spec(self.needs) is not None


@dataclass(frozen=True)
class Case:
    """A load: which model, how many instances a request, how many connections, and whether by `/v2` or as binary."""

    name: str
    model: str = "mnist"
    rows: int = 1
    connections: int = 64
    binary: bool = False
    v2: bool = False


CASES = (
    Case("digit"),
    Case("digit, v2 JSON", v2=True),
    Case("digit, v2 binary", v2=True, binary=True),
    Case("one connection", connections=1),
    Case("256 digits", rows=256, connections=4),
    Case("256 digits, v2 JSON", rows=256, connections=4, v2=True),
    Case("two features", model="logistic-clusters"),
)

_PYTHON = sys.executable
_OURS = (_PYTHON, "-m", "service", "serve", "--port", "{port}", "--workers", "2")
_UVICORN = (_PYTHON, "-m", "uvicorn", "--port", "{port}", "--log-level", "error", "--no-access-log")
_PREDICT = "/v1/models/{model}:predict"
_INFER = "/v2/models/{model}/infer"
CONTENDERS = (
    Contender("this service", _OURS, _PREDICT, _INFER),
    Contender("this service (torchscript)", (*_OURS, "--backend", "torchscript"), _PREDICT, _INFER, "torch"),
    Contender("bare ASGI (2 workers)", (*_UVICORN, "--workers", "2", "benchmarks.servers.bare_asgi:app")),
    Contender("FastAPI (1 worker)", (*_UVICORN, "benchmarks.servers.fastapi_onnx:app"), needs="fastapi"),
    Contender(
        "FastAPI (2 workers)", (*_UVICORN, "--workers", "2", "benchmarks.servers.fastapi_onnx:app"), needs="fastapi"
    ),
    Contender(
        "mosec (2 workers)",
        (_PYTHON, "-m", "benchmarks.servers.mosec_server", "--port", "{port}", "--address", "127.0.0.1"),
        "/inference",
        needs="mosec",
    ),
    Contender("LitServe (2 workers)", (_PYTHON, "-m", "benchmarks.servers.stock_litserve", "{port}"), needs="litserve"),
    Contender(
        "BentoML (2 workers)",
        (_PYTHON, "-m", "bentoml", "serve", "benchmarks.servers.bentoml_service:Digits", "--port", "{port}"),
        needs="bentoml",
    ),
)


def load_model(models_dir: Path, name: str) -> tuple[Path, Manifest]:
    """Return the newest version folder of a published model, and its manifest."""
    folders = sorted((models_dir / name).glob("[0-9]*"), key=lambda path: int(path.name))
    if not folders:
        raise SystemExit(f"{models_dir} has no model {name}; run make train first")
    return folders[-1], load_manifest(folders[-1])


def build_rows(manifest: Manifest, rows: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    """Return inputs float32 (rows, *shape): the model's golden inputs, over and over."""
    assert manifest.golden_rows is not None
    return np.resize(manifest.golden_rows.inputs, (rows, *manifest.input.shape))


def build_body(manifest: Manifest, rows: int) -> bytes:
    """Return the JSON that a Python client sends for these rows: every float32 written as the float64 it becomes."""
    return json.dumps({"instances": build_rows(manifest, rows).reshape(rows, -1).tolist()}).encode()


def build_v2(manifest: Manifest, rows: int) -> bytes:
    """Return the Open Inference Protocol's JSON for these rows, which asks for the graph's own output."""
    inputs = build_rows(manifest, rows)
    tensor = {"name": manifest.input.tensor or "inputs", "shape": list(inputs.shape), "datatype": "FP32"}
    wanted = {"name": manifest.output.tensor or "outputs"}
    body = {"inputs": [tensor | {"data": inputs.reshape(-1).tolist()}], "outputs": [wanted]}
    return json.dumps(body).encode()


def build_binary(manifest: Manifest, rows: int) -> tuple[bytes, dict[str, str]]:
    """Return the Open Inference Protocol's binary body for these rows, and its headers."""
    inputs, outputs = manifest.input.tensor or "inputs", manifest.output.tensor or "outputs"
    return pack_tensor(build_rows(manifest, rows), "FP32", inputs, outputs)


def pack_tensor(
    inputs: NDArray[Any], datatype: str, name: str = "inputs", output: str = "outputs"
) -> tuple[bytes, dict[str, str]]:
    """Return the Open Inference Protocol's binary body for one tensor, which asks for one output, and its headers."""
    tensor = {
        "name": name,
        "shape": list(inputs.shape),
        "datatype": datatype,
        "parameters": {"binary_data_size": inputs.nbytes},
    }
    wanted = {"name": output, "parameters": {"binary_data": True}}
    header = json.dumps({"inputs": [tensor], "outputs": [wanted]}).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(header))}
    return header + inputs.tobytes(), headers
