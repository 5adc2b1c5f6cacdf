"""The OpenAPI 3.1 description: one typed operation per model, written from the manifests.

Feature names, units and ranges, labels and a working example come from the manifest, so a caller needs no other page.
Ranges stand in descriptions and not as bounds: they are what the training data covered, and a value outside is served.
"""

import math
from collections.abc import Iterable
from typing import Any

from service import __version__
from service.api.tensors import nested_shapes
from service.manifest import ImageInput, Manifest, TabularInput
from service.repository import Repository

Schema = dict[str, Any]

_ERRORS = {
    "400": "The body, a value or a parameter cannot be used",
    "401": "The key is missing or wrong",
    "404": "There is no such model or version",
    "405": "The path answers other methods",
    "413": "The body is over the limit",
    "415": "The content type or encoding is not understood",
    "431": "There are too many or too long header fields",
    "500": "The model failed",
    "503": "The model is not ready, or its queue is full; see Retry-After",
    "504": "No answer was ready by the deadline",
}
_NUMBER: Schema = {"type": "number"}
_ERROR_REF: Schema = {"$ref": "#/components/schemas/Error"}


def build_openapi(repository: Repository) -> Schema:
    """Return the document for what is served now."""
    paths: Schema = {
        "/health/live": _read("Whether the process answers", "live", {"live": {"type": "boolean"}}, ()),
        "/health/ready": _read("Whether every model serves", "ready", {"ready": {"type": "boolean"}}, ("503",)),
        "/v1/models": _read(
            "What is served", "list_models", {"models": {"type": "array", "items": _model()}}, ("401",)
        ),
    }
    schemas: Schema = {"Error": _object({"error": {"type": "string", "description": "one sentence"}})}
    titles = choose_titles(repository.models)
    for name, model in sorted(repository.models.items()):
        served = model.latest
        if served is None:
            continue
        manifest, title = served.manifest, titles[name]
        if not isinstance(manifest, Manifest):
            paths[f"/v1/models/{name}"] = _describe(name, title, None, sorted(model.versions))
            continue  # it has no predictions; the Open Inference Protocol describes its tensors
        schemas[f"{title}Request"] = _request_schema(manifest)
        schemas[f"{title}Response"] = _response_schema(manifest)
        for path, version in ((f"/v1/models/{name}", None), (f"/v1/models/{name}/versions/{{version}}", "version")):
            paths[path] = _describe(name, title, version, sorted(model.versions))
            paths[f"{path}:predict"] = _predict(manifest, title, version, sorted(model.versions))
            paths[f"{path}:preview"] = _preview(manifest, title, version, sorted(model.versions))
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Model service",
            "version": __version__,
            "description": "Predictions, probabilities and labels from the models in a folder.",
        },
        "servers": [{"url": "."}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "apiKey", "in": "header", "name": "X-API-Key"}},
        },
    }


def build_example(manifest: Manifest) -> Schema:
    """Return a request body that is answered 200: a golden sample where there is one, else the middle of each range."""
    if manifest.golden is not None:
        row = [float(f"{value:.4g}") for value in manifest.golden.inputs[0]]
    elif isinstance(manifest.input, TabularInput):
        row = [
            ((feature.minimum or 0.0) + (feature.maximum if feature.maximum is not None else 1.0)) / 2
            for feature in manifest.input.features
        ]
    else:
        row = [0.0] * (manifest.input.image.width * manifest.input.image.height * manifest.input.image.channels)
    if isinstance(manifest.input, TabularInput):
        return {"instances": [dict(zip((feature.name for feature in manifest.input.features), row, strict=True))]}
    return {"instances": [[int(value) if value in (0, 1) else value for value in row]]}


def _predict(manifest: Manifest, title: str, version: str | None, versions: list[int]) -> Schema:
    operation: Schema = {
        "operationId": f"predict_{title}" + ("_version" if version else ""),
        "tags": [manifest.name],
        "summary": (manifest.title or manifest.name) + (", one version" if version else ""),
        "description": manifest.description,
        "requestBody": {
            "required": True,
            "content": _bodies(manifest, title),
        },
        "responses": {
            "200": _json(
                "Predictions in the order of the instances", {"$ref": f"#/components/schemas/{title}Response"}
            ),
            **{code: _json(text, _ERROR_REF) for code, text in _ERRORS.items()},
        },
        "security": [{}, {"key": []}],
    }
    if version:
        operation["parameters"] = [_version_parameter(versions)]
    return {"post": operation}


def _bodies(manifest: Manifest, title: str) -> Schema:
    reference = {"$ref": f"#/components/schemas/{title}Request"}
    bodies: Schema = {"application/json": {"schema": reference, "example": build_example(manifest)}}
    if manifest.input.kind == "image":
        file: Schema = {"type": "string", "format": "binary"}
        files = {"type": "array", "minItems": 1, "items": file, "description": "one prediction for each, in order"}
        for kind in ("png", "jpeg", "webp", "bmp"):
            bodies[f"image/{kind}"] = {"schema": file}
        parameters = {"type": "string", "description": "a request's parameters, as JSON"}
        form = _object({"files": files, "parameters": parameters}, required=("files",))
        bodies["multipart/form-data"] = {"schema": form | {"additionalProperties": file}}
    return bodies


def _preview(manifest: Manifest, title: str, version: str | None, versions: list[int]) -> Schema:
    """Describe what answers with a predict body's instances as the graph is given them."""
    path = _predict(manifest, title, version, versions)
    operation = path["post"]
    operation["operationId"] = f"preview_{title}" + ("_version" if version else "")
    operation["summary"] = f"What {manifest.name} is given for a predict body" + (", one version" if version else "")
    operation["description"] = "The body's instances as numbers, with pictures decoded and fitted to the input's shape."
    nested: Schema = _NUMBER
    for length in reversed(manifest.input.shape):
        nested = _list_of(nested, length)
    properties = {"model": {"type": "string", "const": manifest.name}, "version": {"type": "integer"}}
    answer = _object({**properties, "instances": {"type": "array", "items": nested}})
    operation["responses"]["200"] = _json("The instances, in order", answer)
    return path


def _describe(name: str, title: str, version: str | None, versions: list[int]) -> Schema:
    path = _read(f"What {name} is", f"describe_{title}" + ("_version" if version else ""), {}, ("404",))
    operation = path["get"]
    operation["tags"] = [name]
    operation["responses"]["200"] = _json("The model", _model())
    if version:
        operation["parameters"] = [_version_parameter(versions)]
        operation["responses"]["503"] = _json(_ERRORS["503"], _ERROR_REF)
    return path


def _version_parameter(versions: list[int]) -> Schema:
    schema: Schema = {"type": "integer", "minimum": 1, "examples": versions[-1:]}
    return {"name": "version", "in": "path", "required": True, "schema": schema}


def _request_schema(manifest: Manifest) -> Schema:
    items = _instance_schema(manifest)
    if manifest.input.kind == "image":
        encoded: Schema = {"type": "string", "contentEncoding": "base64"}
        encoded["description"] = "the bytes of a PNG, JPEG, WebP or BMP picture"
        items["anyOf"].append(_object({"b64": encoded}))
    properties: Schema = {"instances": {"type": "array", "minItems": 1, "items": items}}
    if manifest.task == "binary":
        about = f"smallest probability of {manifest.output.labels[1]!r} that predicts it"
        threshold = {"type": "number", "minimum": 0, "maximum": 1, "description": about}
        properties["parameters"] = _object({"threshold": threshold}, required=())
    if manifest.task == "multiclass":
        top_k = {"type": "integer", "minimum": 1, "maximum": len(manifest.output.labels)}
        top_k["description"] = "add the k most probable labels to each prediction"
        properties["parameters"] = _object({"top_k": top_k}, required=())
    return _object(properties, required=("instances",))


def _instance_schema(manifest: Manifest) -> Schema:
    if isinstance(manifest.input, ImageInput):
        return _image_schema(manifest.input)
    properties: Schema = {}
    for feature in manifest.input.features:
        unit = f" in {feature.unit}" if feature.unit else ""
        about = f"{feature.description or feature.name}{unit}"
        if feature.minimum is not None and feature.maximum is not None:
            about += f"; the training data covered {feature.minimum:g} to {feature.maximum:g}"
        properties[feature.name] = _NUMBER | {"description": about}
    in_order = ", ".join(properties)
    row = _list_of(_NUMBER, len(properties)) | {"description": f"the features in order: {in_order}"}
    return {"anyOf": [_object(properties), row]}


def _image_schema(spec: ImageInput) -> Schema:
    image = spec.image
    pixel: Schema = {"type": "number", "minimum": 0, "maximum": 1}
    ink = "1 is ink, 0 is paper" if image.polarity == "light-on-dark" else "0 is ink, 1 is paper"
    ways = []
    for shape in ((math.prod(spec.shape),), *nested_shapes(spec)):
        size = " × ".join(map(str, shape))
        nested = pixel
        for length in reversed(shape):
            nested = _list_of(nested, length)
        ways.append(nested | {"description": f"{size} pixels in [0, 1]; {ink}"})
    return {"anyOf": ways}


def _response_schema(manifest: Manifest) -> Schema:
    prediction: Schema
    if manifest.task == "regression":
        unit = f" in {manifest.output.unit}" if manifest.output.unit else ""
        prediction = _object({"prediction": _NUMBER | {"description": f"{manifest.output.name}{unit}"}})
    else:
        prediction = _class_schema(manifest)
    return _object(
        {
            "model": {"type": "string", "const": manifest.name},
            "version": {"type": "integer"},
            "predictions": {"type": "array", "items": prediction},
        }
    )


def _class_schema(manifest: Manifest) -> Schema:
    labels = list(manifest.output.labels)
    probability: Schema = {"type": "number", "minimum": 0, "maximum": 1}
    of = repr(labels[1]) if manifest.task == "binary" else "the predicted label"
    best: Schema = {
        "prediction": {
            "type": "integer",
            "minimum": 0,
            "maximum": len(labels) - 1,
            "description": "index of the label",
        },
        "label": {"type": "string", "enum": labels},
        "probability": probability | {"description": f"probability of {of}"},
    }
    every = _list_of(probability, len(labels)) | {"description": f"of {', '.join(labels)}; they sum to 1"}
    properties = {**best, "probabilities": every}
    if manifest.task == "binary":
        return _object(properties)
    top_k = {"type": "array", "items": _object(best), "description": "where parameters.top_k was sent"}
    return _object({**properties, "top_k": top_k}, required=tuple(properties))


def _model() -> Schema:
    return {"type": "object", "required": ["name", "ready", "versions"], "properties": {"name": {"type": "string"}}}


def _object(properties: Schema, required: tuple[str, ...] | None = None) -> Schema:
    names = list(properties) if required is None else list(required)
    schema: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return schema | {"required": names} if names else schema


def _list_of(items: Schema, length: int) -> Schema:
    return {"type": "array", "items": items, "minItems": length, "maxItems": length}


def _json(description: str, schema: Schema) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _read(summary: str, name: str, properties: Schema, errors: tuple[str, ...]) -> Schema:
    responses = {"200": _json(summary, {"type": "object", "properties": properties})}
    responses |= {code: _json(_ERRORS[code], _ERROR_REF) for code in errors}
    return {"get": {"operationId": name, "tags": ["service"], "summary": summary, "responses": responses}}


def choose_titles(names: Iterable[str]) -> dict[str, str]:
    """Return each model's name as a type name, all different: `logistic-hours` is LogisticHours."""
    titles: dict[str, str] = {}
    for name in sorted(names):
        plain = title = "".join(part.capitalize() for part in name.replace("_", "-").split("-"))
        count = 1
        while title in titles.values():
            count += 1
            title = f"{plain}_{count}"
        titles[name] = title
    return titles
