"""Generate the OpenAPI 3.1 document, with typed operations for each model, from the manifests.

Callers may have no other documentation, so the examples are real: every request example can be sent as it is, and the
response examples are golden outputs. Body schemas are in `schemas` and `v2.openapi`.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from service import __version__
from service.api.schema_parts import NUMBER, TEXT, Schema, list_of, object_of, reference
from service.api.schemas import (
    build_answer,
    build_example,
    form_schema,
    model_schema,
    part_schemas,
    request_schema,
    response_schema,
)
from service.api.v2 import openapi as tensors
from service.errors import NotFoundError
from service.model.manifest import AnyManifest, ColumnsInput, Manifest
from service.registry.registry import Registry
from service.registry.versions import Model
from service.settings import Settings

_ERRORS = {
    "400": "The body or a parameter is invalid",
    "401": "The API key is missing or invalid",
    "403": "A web page of another site sent it, or its Host is not allowed",
    "404": "The model or version does not exist",
    "405": "The method is not allowed for this path",
    "413": "The body is too large",
    "415": "The content type or encoding is not supported",
    "431": "The request headers are too large",
    "500": "The model failed",
    "503": "The model is not ready or is overloaded; see Retry-After",
    "504": "The request timed out",
}
_OPEN = ("/health/live", "/health/ready")  # need no key
_KEY = {"type": "apiKey", "in": "header", "name": "X-API-Key"}
_NO_SETTINGS = Settings()


class Place(NamedTuple):
    """One set of paths of a model: the suffix after its name, and the names of its schemas and operations."""

    manifest: AnyManifest
    path: str
    title: str
    operation: str
    words: str
    parameters: list[Schema]


def build_openapi(registry: Registry, settings: Settings = _NO_SETTINGS, only: str | None = None) -> Schema:
    """Return the OpenAPI document for the models now in the registry, or for one of them.

    Raises:
        NotFoundError: There is no model `only`.
    """
    models = registry.models  # as they are now: this may run in a thread
    if only is not None:
        if only not in models:
            raise NotFoundError(f"there is no model {only}")
        models = {only: models[only]}
    paths = _general_paths(models)
    schemas: Schema = {
        "Error": object_of({"error": TEXT | {"description": "one sentence"}}),
        "NotReady": object_of({"ready": {"type": "boolean", "const": False}, "error": TEXT | {"description": "why"}}),
        "Model": model_schema(),
        **part_schemas(),
    }
    titles = choose_titles(registry.models)
    for name, model in sorted(models.items()):
        for place in _list_places(model, titles[name]):
            paths |= _paths_at(place)
            if isinstance(place.manifest, Manifest):
                schemas[f"{place.title}Request"] = request_schema(place.manifest, settings.queue_size)
                schemas[f"{place.title}Response"] = response_schema(place.manifest)
        if model.latest is not None:
            paths |= _describe(model, titles[name])
    errors = {code: _json(words, reference("Error")) for code, words in _ERRORS.items()}
    components: Schema = {"schemas": schemas, "responses": errors}
    if settings.api_key.strip(" ,"):
        _guard(paths)
        components["securitySchemes"] = {"key": _KEY}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Model service",
            "version": __version__,
            "description": "Predictions, probabilities and labels from the models in a folder.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "."}],
        "tags": [
            *({"name": name, "description": _about(model)} for name, model in sorted(models.items())),
            {"name": "service", "description": "Health, metrics, and what is served."},
            {"name": tensors.TAG, "description": tensors.ABOUT},
        ],
        "paths": paths,
        "components": components,
        "security": [],  # of operations that name none
    }


def _about(model: Model) -> str:
    manifest = model.latest.manifest if model.latest else None
    return (manifest.description or manifest.title if manifest else "") or f"The model {model.name}."


def _general_paths(models: Mapping[str, Model]) -> Schema:
    """Describe the paths that are not specific to one model."""
    about = "versions that are only opened when they are asked for, if there are any"
    is_ready = {"ready": {"type": "boolean", "const": True}, "cold": {"type": "integer", "description": about}}
    ready = _read("Whether every model serves", "ready", object_of(is_ready, required=("ready",)))
    ready["get"]["responses"]["503"] = _json("A model that should serve does not", reference("NotReady"))
    every = object_of({"models": {"type": "array", "items": reference("Model")}})
    figures = _read("Figures for Prometheus", "metrics", TEXT)
    figures["get"]["responses"]["200"]["content"] = {"text/plain": {"schema": TEXT}}
    paths = {
        "/health/live": _read("Whether the process answers", "live", object_of({"live": {"type": "boolean"}})),
        "/health/ready": ready,
        "/metrics": figures,
        "/v1/models": _read("What is served", "list_models", every),
    }
    names = sorted(name for name, model in models.items() if model.latest)
    for path, summary, operation, schema in tensors.READS:
        if "{model}" in path and not names:
            continue
        paths[path] = _read(summary, operation, schema, tag=tensors.TAG)
        if "{model}" in path:
            known = {"type": "string", "enum": names}
            paths[path]["get"]["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": known}]
            paths[path]["get"]["responses"] |= _errors("404", "503")
    return paths


def _list_places(model: Model, title: str) -> list[Place]:
    """Return a model's paths without and with a version; versions with different schemas get a path each."""
    if model.latest is None:
        return []
    newest = model.latest.manifest
    manifests = {version: served.manifest for version, served in sorted(model.versions.items())}
    places = [Place(newest, "", title, title, "", [])]
    if all(_form(manifest) == _form(newest) for manifest in manifests.values()):
        name = f"{title}_version"
        return [*places, Place(newest, "/versions/{version}", title, name, ", one version", [_version(model)])]
    for version, manifest in manifests.items():
        name = f"{title}_v{version}"
        places.append(Place(manifest, f"/versions/{version}", name, name, f", version {version}", []))
    return places


def _form(manifest: AnyManifest) -> tuple[object, ...]:
    """Return what determines the request and response schemas; versions that are equal in it share one path."""
    if not isinstance(manifest, Manifest):
        return manifest.task, manifest.inputs, manifest.outputs
    return manifest.task, manifest.input, manifest.output.model_copy(update={"threshold": None, "thresholds": ()})


def _paths_at(place: Place) -> Schema:
    manifest = place.manifest
    infer = {f"/v2/models/{manifest.name}{place.path}/infer": _infer(place)}
    if not isinstance(manifest, Manifest):
        return infer
    path = f"/v1/models/{manifest.name}{place.path}"
    predictions = {f"{path}:predict": _predict(place, manifest), f"{path}:preview": _preview(place, manifest)}
    return predictions if place.path else predictions | infer


def _post(place: Place, name: str, summary: str, content: Schema, answer: Schema) -> Schema:
    operation: Schema = {
        "operationId": f"{name}_{place.operation}",
        "tags": [place.manifest.name],
        "summary": summary + place.words,
        "description": place.manifest.description,
        "requestBody": {"required": True, "content": content},
        "responses": {"200": answer} | _errors(*(code for code in _ERRORS if code != "401")),
    }
    return {"post": operation | ({"parameters": place.parameters} if place.parameters else {})}


def _predict(place: Place, manifest: Manifest) -> Schema:
    answer = _json("Predictions in the order of the instances", reference(f"{place.title}Response"))
    golden = build_answer(manifest)
    if golden is not None:
        answer["content"]["application/json"]["example"] = golden
    return _post(place, "predict", manifest.title or manifest.name, _bodies(place, manifest), answer)


def _bodies(place: Place, manifest: Manifest) -> Schema:
    schema = reference(f"{place.title}Request")
    bodies: Schema = {"application/json": {"schema": schema, "example": build_example(manifest)}}
    if manifest.input.kind == "image":
        for kind in ("png", "jpeg", "webp", "bmp"):
            bodies[f"image/{kind}"] = {"schema": {"type": "string", "format": "binary"}}
        bodies["multipart/form-data"] = {"schema": form_schema(manifest)}
    return bodies


def _preview(place: Place, manifest: Manifest) -> Schema:
    """Describe the preview operation, which returns a predict body's instances as the graph receives them."""
    nested: Schema = NUMBER
    if isinstance(manifest.input, ColumnsInput):
        nested = object_of({each.name: list_of({}, len(each.columns)) for each in manifest.input.tensors})
    else:
        for length in reversed(manifest.input.shape):
            nested = list_of(nested, length)
    properties = {"model": {"type": "string", "const": manifest.name}, "version": {"type": "integer"}}
    schema = object_of({**properties, "instances": {"type": "array", "items": nested}})
    answer = _json("The instances, in order", schema)
    path = _post(
        place, "preview", f"What {manifest.name} is given for a predict body", _bodies(place, manifest), answer
    )
    about = "The body's instances as numbers, with pictures decoded and fitted to the input's shape."
    path["post"]["description"] = about
    return path


def _infer(place: Place) -> Schema:
    manifest = place.manifest
    has_task = isinstance(manifest, Manifest)
    answer = {"description": "The outputs that were asked for", "content": tensors.infer_answer(manifest)}
    summary = f"Tensors of {manifest.name}" if has_task else manifest.title or manifest.name
    path = _post(place, "infer", summary, tensors.infer_body(manifest), answer)
    more = tensors.infer_parameters(manifest)
    if more:
        path["post"]["parameters"] = [*place.parameters, *more]
    if has_task:
        path["post"]["tags"] = [tensors.TAG]
    return path


def _describe(model: Model, title: str) -> Schema:
    """Describe the operations that return the description of a model and of one version."""
    newest = _read(f"What {model.name} is", f"describe_{title}", reference("Model"), model.name)
    one = _read(f"What a version of {model.name} is", f"describe_{title}_version", reference("Model"), model.name)
    newest["get"]["responses"] |= _errors("404")
    one["get"]["responses"] |= _errors("404", "503")
    one["get"]["parameters"] = [_version(model)]
    return {f"/v1/models/{model.name}": newest, f"/v1/models/{model.name}/versions/{{version}}": one}


def _version(model: Model) -> Schema:
    newest = [model.latest.manifest.version] if model.latest else []
    schema: Schema = {"type": "integer", "minimum": 1, "examples": newest}
    return {"name": "version", "in": "path", "required": True, "schema": schema}


def _guard(paths: Schema) -> None:
    """Add the API key requirement and the 401 response to every operation except the health checks."""
    for path, operations in paths.items():
        if path not in _OPEN:
            for operation in operations.values():
                operation["security"] = [{"key": []}]
                operation["responses"] |= _errors("401")


def _errors(*codes: str) -> Schema:
    return {code: {"$ref": f"#/components/responses/{code}"} for code in codes}


def _json(description: str, schema: Schema) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _read(summary: str, name: str, schema: Schema, tag: str = "service") -> Schema:
    return {
        "get": {"operationId": name, "tags": [tag], "summary": summary, "responses": {"200": _json(summary, schema)}}
    }


def choose_titles(names: Iterable[str]) -> dict[str, str]:
    """Return a unique type name for each model: `logistic-hours` becomes `LogisticHours`."""
    titles: dict[str, str] = {}
    for name in sorted(names):
        plain = title = "".join(part.capitalize() for part in name.replace("_", "-").split("-"))
        count = 1
        while title in titles.values():
            count += 1
            title = f"{plain}_{count}"
        titles[name] = title
    return titles
