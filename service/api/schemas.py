"""JSON Schemas and examples of request and response bodies, generated from the manifests.

Feature names, units, ranges and labels come from the manifest. Ranges appear in descriptions rather than as bounds:
they are what the training data covered, and values outside them are accepted. Examples use golden samples if there
are any.
"""

import base64
import io
import math
from functools import cache
from typing import Any, get_args

import numpy as np
import orjson
from numpy.typing import NDArray
from PIL import Image
from pydantic.json_schema import models_json_schema

from service.api.schema_parts import NUMBER, TEXT, Schema, list_of, object_of, reference
from service.api.typed_schemas import columns_schema, output_schema
from service.api.v1.decode import Call
from service.api.v1.encode import encode
from service.api.v1.instances import nested_shapes
from service.model.columns import build_inputs, build_row, read_row, split_rows
from service.model.manifest import Artifact, ColumnsInput, ImageInput, Manifest, Output, TabularInput, Task, TensorSpec

_MOST_SHOWN = 64  # numbers of a picture
_MOST_LABELS = 100  # that a schema lists
_LONGEST_SIDE = 64  # of a picture that is an example as it is
_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mNoAAAAggCB2kUIOwAAAABJRU5ErkJggg=="  # a gray PNG


def build_example(manifest: Manifest) -> Schema:
    """Return a valid request body: a golden sample if there is one, otherwise the middle of each range.

    A picture is a PNG: a page that shows all numbers of a large one does not open.
    """
    if isinstance(manifest.input, ColumnsInput):
        return {"instances": [read_row(manifest.input, build_inputs(manifest, 1)[0])]}
    if isinstance(manifest.input, ImageInput):
        return {"instances": [{"b64": _encode_sample(manifest, manifest.input)}]}
    row = choose_row(manifest)
    return {"instances": [dict(zip((feature.name for feature in manifest.input.features), row, strict=True))]}


def _encode_sample(manifest: Manifest, spec: ImageInput) -> str:
    """Return the first golden sample as base64 of a PNG, or a grey pixel if there is none or it is large or coloured.

    A grey picture's numbers are in the order of its pixels, whatever the input's shape.
    """
    image, golden = spec.image, manifest.golden_rows
    if golden is None or image.channels > 1 or max(image.width, image.height) > _LONGEST_SIDE:
        return _PIXEL
    pixels = np.round(255 * golden.inputs[0].reshape(image.height, image.width)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def is_large_picture(manifest: Manifest) -> bool:
    """Tell whether a sample has too many numbers to be shown."""
    return manifest.input.kind == "image" and math.prod(manifest.input.shape) > _MOST_SHOWN


def choose_row(manifest: Manifest) -> list[float]:
    """Return the values of one instance, flattened, as the shortest decimals that round-trip through float32."""
    if manifest.golden_rows is not None:
        return [float(str(value)) for value in manifest.golden_rows.inputs[0].reshape(-1)]
    if isinstance(manifest.input, TabularInput):
        return [
            ((feature.minimum or 0.0) + (feature.maximum if feature.maximum is not None else 1.0)) / 2
            for feature in manifest.input.features
        ]
    return [0.0] * math.prod(manifest.input.shape)


def choose_tensors(manifest: Manifest) -> dict[str, NDArray[Any]]:
    """Return the tensors of one instance of columns, without NaN, which JSON cannot carry."""
    assert isinstance(manifest.input, ColumnsInput)
    for rows in (build_inputs(manifest, 1), build_row(manifest.input)):
        tensors = split_rows(rows)
        if not any(np.isnan(tensor).any() for tensor in tensors.values() if tensor.dtype.kind == "f"):
            break
    return tensors


def build_answer(manifest: Manifest) -> Schema | None:
    """Return the response to `build_example`, from the golden outputs; None if that is not a golden sample."""
    if manifest.golden_rows is None or manifest.input.kind == "image":  # a PNG is fitted first
        return None
    outputs = manifest.golden_rows.outputs[:1]
    _, body = encode(outputs, manifest, Call(outputs))
    answer: Schema = orjson.loads(body)
    return answer


def request_schema(manifest: Manifest, most: int) -> Schema:
    """Return the schema of a predict request with up to `most` instances."""
    items = instance_schema(manifest)
    if manifest.input.kind == "image":
        encoded: Schema = {"type": "string", "contentEncoding": "base64"}
        encoded["description"] = "a PNG, JPEG, WebP or BMP image"
        items["anyOf"].append(object_of({"b64": encoded}))
    properties: Schema = {"instances": {"type": "array", "minItems": 1, "maxItems": most, "items": items}}
    if manifest.task in ("binary", "multilabel"):
        what = "each label" if manifest.task == "multilabel" else repr(manifest.output.labels[1])
        about = f"minimum probability of {what} at which it is predicted"
        threshold = {"type": "number", "minimum": 0, "maximum": 1, "description": about}
        properties["parameters"] = object_of({"threshold": threshold}, required=())
    if manifest.task == "embedding":
        encoding = {"type": "string", "enum": ["list", "base64"], "description": "base64: of little-endian float32"}
        properties["parameters"] = object_of({"encoding": encoding}, required=())
    if manifest.task == "multiclass":
        top_k = {"type": "integer", "minimum": 1, "maximum": len(manifest.output.labels)}
        top_k["description"] = "add the k most probable labels to each prediction"
        properties["parameters"] = object_of({"top_k": top_k}, required=())
    return object_of(properties, required=("instances",))


def instance_schema(manifest: Manifest) -> Schema:
    """Return the schema of one instance."""
    if isinstance(manifest.input, ImageInput):
        return _image_schema(manifest.input)
    if isinstance(manifest.input, ColumnsInput):
        return columns_schema(manifest.input)
    properties: Schema = {}
    for feature in manifest.input.features:
        unit = f" in {feature.unit}" if feature.unit else ""
        about = f"{feature.description or feature.name}{unit}"
        if feature.minimum is not None and feature.maximum is not None:
            about += f"; the training data covered {feature.minimum:g} to {feature.maximum:g}"
        properties[feature.name] = NUMBER | {"description": about}
    in_order = ", ".join(properties)
    row = list_of(NUMBER, len(properties)) | {"description": f"the features in order: {in_order}"}
    return {"anyOf": [object_of(properties), row]}


def _image_schema(spec: ImageInput) -> Schema:
    image = spec.image
    pixel: Schema = {"type": "number", "minimum": 0, "maximum": 1}
    ink = "1 is ink, 0 is paper" if image.polarity == "light-on-dark" else "0 is ink, 1 is paper"
    meaning = f"; {ink}" if image.has_ink else "; 0 is black"
    ways = []
    for shape in ((math.prod(spec.shape),), *nested_shapes(spec)):
        size = " × ".join(map(str, shape))
        nested = pixel
        for length in reversed(shape):
            nested = list_of(nested, length)
        ways.append(nested | {"description": f"{size} pixels in [0, 1]{meaning}"})
    return {"anyOf": ways}


def response_schema(manifest: Manifest) -> Schema:
    """Return the schema of a predict response."""
    prediction = _class_schema(manifest) if manifest.task in ("binary", "multiclass") else output_schema(manifest)
    return object_of(
        {
            "model": {"type": "string", "const": manifest.name},
            "version": {"type": "integer"},
            "predictions": {"type": "array", "items": prediction},
        }
    )


def _class_schema(manifest: Manifest) -> Schema:
    labels = list(manifest.output.labels)
    many = len(labels) > _MOST_LABELS
    probability: Schema = {"type": "number", "minimum": 0, "maximum": 1}
    of = repr(labels[1]) if manifest.task == "binary" else "the predicted label"
    best: Schema = {
        "prediction": {
            "type": "integer",
            "minimum": 0,
            "maximum": len(labels) - 1,
            "description": "index of the label",
        },
        "label": TEXT | ({"description": f"one of {len(labels)} labels"} if many else {"enum": labels}),
        "probability": probability | {"description": f"probability of {of}"},
    }
    named = "all labels, in order" if many else ", ".join(labels)
    every = list_of(probability, len(labels)) | {"description": f"probabilities of {named}; they sum to 1"}
    properties = {**best, "probabilities": every}
    if manifest.task == "binary":
        return object_of(properties)
    top_k = {"type": "array", "items": object_of(best), "description": "present if parameters.top_k was sent"}
    return object_of({**properties, "top_k": top_k}, required=tuple(properties))


def form_schema(manifest: Manifest) -> Schema:
    """Return the schema of a multipart form with images."""
    file: Schema = {"type": "string", "format": "binary"}
    properties: Schema = {
        "files": {"type": "array", "minItems": 1, "items": file, "description": "one prediction per file, in order"}
    }
    example = {"binary": '{"threshold": 0.5}', "multiclass": '{"top_k": 2}'}.get(manifest.task, "{}")
    about = "request parameters, as JSON; may be empty"
    properties["parameters"] = TEXT | {"description": about, "example": example}
    return object_of(properties, required=("files",)) | {"additionalProperties": file}


_VERSION_STATUS = object_of(
    {
        "version": TEXT,
        "state": {"type": "string", "enum": ["AVAILABLE", "END"]},
        "status": object_of({"error_code": TEXT, "error_message": TEXT}),
    }
)


def model_schema() -> Schema:
    """Return the schema of a model's description. Optional properties are absent if no version is served."""
    strings, numbers = {"additionalProperties": TEXT}, {"additionalProperties": NUMBER}
    tensors = {"type": "array", "items": reference("TensorSpec"), "description": "for models without a task"}
    properties: Schema = {
        "name": TEXT,
        "ready": {"type": "boolean", "description": "whether a version is being served"},
        "versions": {"type": "array", "items": {"type": "integer"}, "description": "versions being served"},
        "refused": {"type": "object", "description": "why other versions are not served"} | strings,
        "version": {"type": "integer", "description": "version that the other properties describe"},
        "title": TEXT,
        "description": TEXT,
        "task": {"type": "string", "enum": [*get_args(Task), "tensors"]},
        "input": {"anyOf": [reference(part.__name__) for part in (TabularInput, ImageInput, ColumnsInput)]},
        "output": reference("Output"),
        "labels": {"type": "array", "items": TEXT, "description": "in index order"},
        "threshold": {"type": ["number", "null"], "description": "for binary models"},
        "inputs": tensors,
        "outputs": tensors,
        "metrics": {"type": "object", "description": "metrics on the test split"} | numbers,
        "artifacts": {"type": "object", "additionalProperties": reference("Artifact")},
        "backend": TEXT | {"description": "artifact being run"},
        "device": TEXT,
        "provider": TEXT | {"description": "what runs the artifact"},
        "cold": {"type": "boolean", "description": "whether the version is opened only when a request needs it"},
        "placement": {
            "type": "string",
            "enum": ["inline", "engine"],
            "description": "in every worker, or in one engine process",
        },
        "model_version_status": {"type": "array", "items": _VERSION_STATUS, "description": "as TensorFlow Serving's"},
    }
    return object_of(properties, required=("name", "ready", "versions", "refused"))


@cache
def part_schemas() -> Schema:
    """Return the schemas, by name, of the manifest parts that model descriptions include."""
    parts = (TabularInput, ImageInput, ColumnsInput, Output, Artifact, TensorSpec)
    _, found = models_json_schema([(part, "validation") for part in parts], ref_template="#/components/schemas/{model}")
    schemas: Schema = found["$defs"]
    schemas["TabularInput"]["properties"]["shape"]["items"] = {"type": "integer"}  # linters and generators ask for it
    return schemas
