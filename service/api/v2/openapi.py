"""The Open Inference Protocol in the OpenAPI document: metadata, and an infer operation for each model.

For a model without a task, infer is the only way to call it.
"""

import math
from typing import Any

import numpy as np
import orjson

from service.api.schema_parts import NUMBER, TEXT, Schema, list_of, object_of
from service.api.schemas import choose_row, choose_tensors, is_large_picture
from service.api.v2.datatypes import DATATYPES
from service.api.v2.decode import InferCall
from service.api.v2.encode import encode
from service.api.v2.infer_request import all_outputs, input_specs, output_specs
from service.model.manifest import AnyManifest, ColumnsInput, Manifest

TAG = "Open Inference Protocol"
ABOUT = (
    "The same models, for clients of Triton, KServe and Seldon. Not listed here: `GET /v2/health/live` and `/ready`,"
    " `/v2/models/{model}/ready`, `/config` and `/stats`, `POST /v2/repository/index`, and `/load` and `/unload` under"
    " `/v2/repository/models/{model}`."
)
_LENGTH = "Inference-Header-Content-Length"
_TENSOR = object_of({"name": TEXT, "datatype": TEXT, "shape": {"type": "array", "items": {"type": "integer"}}})
_SERVER = object_of({"name": TEXT, "version": TEXT, "extensions": {"type": "array", "items": TEXT}})
_MODELS = object_of({"models": {"type": "array", "items": TEXT}})
_METADATA = object_of(
    {
        "name": TEXT,
        "versions": {"type": "array", "items": TEXT},
        "platform": TEXT,
        "inputs": {"type": "array", "items": _TENSOR},
        "outputs": {"type": "array", "items": _TENSOR},
        "properties": {"type": "object", "additionalProperties": TEXT},
    }
)
READS = (
    ("/v2", "What this server is", "server_metadata", _SERVER),
    ("/v2/models", "Names of the models", "list_model_names", _MODELS),
    ("/v2/models/{model}", "Tensors of a model", "model_metadata", _METADATA),
)


def infer_body(manifest: AnyManifest) -> Schema:
    """Return the content of an infer request: JSON, or binary data if JSON cannot carry a tensor."""
    example = build_infer_example(manifest)
    if example is None:
        about = f"JSON as long as {_LENGTH} says, with `parameters.binary_data_size` of each input; then the data"
        return {"application/octet-stream": {"schema": {"type": "string", "format": "binary", "description": about}}}
    specs = input_specs(manifest)
    each = [_input_schema(name, *spec) for name, spec in specs.items()]
    tensors: Schema = each[0] if len(each) == 1 else {"anyOf": each}
    free = {"type": "object", "description": "such as `timeout`, in microseconds"}
    asked = object_of({"name": {"enum": list(output_specs(manifest))}, "parameters": {"type": "object"}}, ("name",))
    body = object_of(
        {
            "id": TEXT,
            "inputs": list_of(tensors, len(specs)),
            "outputs": {"type": "array", "items": asked, "description": "which to return; all if absent"},
            "parameters": free,
        },
        ("inputs",),
    )
    if isinstance(manifest, Manifest) and is_large_picture(manifest):
        return {"application/json": {"schema": body}}
    return {"application/json": {"schema": body, "example": example}}


def infer_parameters(manifest: AnyManifest) -> list[Schema]:
    """Return the parameters of an infer operation: the length of the JSON, if binary data follows it."""
    if build_infer_example(manifest) is not None:
        return []
    about = "length in bytes of the JSON before the binary data; 0: the body is the data of the only input"
    schema = {"type": "integer", "minimum": 0, "examples": [0]}
    return [{"name": _LENGTH, "in": "header", "required": True, "schema": schema, "description": about}]


def infer_answer(manifest: AnyManifest) -> Schema:
    """Return the content of the answer: JSON, followed by binary data if the request asks for it."""
    outputs = output_specs(manifest)
    datatypes = sorted({datatype for datatype, _ in outputs.values()} | {"BYTES"})  # classes of any output are BYTES
    kinds = sorted({str(_element_schema(datatype)["type"]) for datatype in datatypes})
    tensor = object_of(
        {
            "name": {"type": "string", "enum": list(outputs)},
            "datatype": {"type": "string", "enum": datatypes},
            "shape": {"type": "array", "items": {"type": "integer"}},
            "data": {"type": "array", "items": {"type": kinds}, "description": "in row-major order"},
            "parameters": {"type": "object"},
        },
        ("name", "datatype", "shape"),
    )
    about = {"model_name": {"type": "string", "const": manifest.name}, "model_version": TEXT, "id": TEXT}
    schema = object_of(
        {**about, "outputs": {"type": "array", "items": tensor}}, ("model_name", "model_version", "outputs")
    )
    answer = _golden_answer(manifest)
    return {
        "application/json": {"schema": schema} | ({"example": answer} if answer else {}),
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    }


def build_infer_example(manifest: AnyManifest) -> Schema | None:
    """Return an infer body that works, with open dimensions of 1; None if JSON cannot carry it."""
    if any(datatype == "FP16" for datatype, _ in input_specs(manifest).values()):
        return None
    inputs = []
    for name, (datatype, shape) in input_specs(manifest).items():
        filled = [1 if size < 0 else size for size in shape]
        if not isinstance(manifest, Manifest):
            data = [_element(datatype)] * math.prod(filled)
        elif isinstance(manifest.input, ColumnsInput):
            data = choose_tensors(manifest)[name][0].tolist()
        else:
            data = choose_row(manifest)
        inputs.append({"name": name, "shape": filled, "datatype": datatype, "data": data})
    outputs = output_specs(manifest)
    if all(datatype != "FP16" for datatype, _ in outputs.values()):
        return {"inputs": inputs}
    binary = {
        name: {"parameters": {"binary_data": True}} for name, (datatype, _) in outputs.items() if datatype == "FP16"
    }
    return {"inputs": inputs, "outputs": [{"name": name} | binary.get(name, {}) for name in outputs]}


def _golden_answer(manifest: AnyManifest) -> Schema | None:
    if not isinstance(manifest, Manifest) or manifest.golden_rows is None or is_large_picture(manifest):
        return None
    outputs = manifest.golden_rows.outputs[:1]
    _, body = encode(outputs, manifest, InferCall(outputs, None, all_outputs(manifest, binary=False), None))
    answer: Schema = orjson.loads(body)
    return answer


def _input_schema(name: str, datatype: str, shape: list[int]) -> Schema:
    sizes: list[Schema] = [{"type": "integer", "minimum": 0} if size < 0 else {"const": size} for size in shape]
    nested = _element_schema(datatype)
    for size in reversed(shape):
        nested = {"type": "array", "items": nested} if size < 0 else list_of(nested, size)
    flat = {"type": "array", "items": _element_schema(datatype), "description": "in row-major order"}
    fixed = list_of({"type": "integer"}, len(shape)) | ({"prefixItems": sizes} if sizes else {})
    return object_of(
        {
            "name": {"type": "string", "const": name},
            "shape": fixed | {"description": f"{shape}, where -1 is any size"},
            "datatype": {"type": "string", "const": datatype},
            "data": flat if len(shape) < 2 else {"anyOf": [flat, nested]},  # noqa: PLR2004 - else nested is flat
            "parameters": {"type": "object"},
        },
        ("name", "shape", "datatype", "data"),
    )


def _element_schema(datatype: str) -> Schema:
    kind = DATATYPES[datatype].kind
    if kind in "ui":
        limits = np.iinfo(DATATYPES[datatype])
        return {"type": "integer", "minimum": int(limits.min), "maximum": int(limits.max)}
    return {"b": {"type": "boolean"}, "f": NUMBER, "O": TEXT}[kind]


def _element(datatype: str) -> Any:  # noqa: ANN401 - a number, a boolean or a text
    """Return an example element: 0, a valid index for most lookups, or 1.0, in the domain of most functions."""
    return {"b": False, "u": 0, "i": 0, "f": 1.0, "O": "text"}[DATATYPES[datatype].kind]
