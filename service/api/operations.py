"""Health, metrics and model metadata: `/health/…`, `/metrics`, `/v1/models…`, `/openapi.json`."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from service.api.content_coding import compress
from service.api.openapi import build_openapi
from service.api.tfserving import build_metadata, list_status
from service.model.manifest import AnyManifest, Manifest, drop_empty
from service.model.postprocess import choose_threshold
from service.registry.registry import Registry
from service.registry.versions import LoadedVersion, Model
from service.settings import Settings
from service.telemetry import metrics

Answer = Callable[[Request], Response]
_VERSION_KINDS = ("versions", "labels")


class OrjsonResponse(Response):
    """A JSON response encoded by orjson, which writes NaN and infinity as null."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        """Encode the content as JSON."""
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def build_routes(registry: Registry, settings: Settings, problem: Callable[[Request], str]) -> list[BaseRoute]:
    """Return the GET and HEAD routes. Each reads the registry at the time of the request."""
    return [
        get_route("/health/live", lambda _: OrjsonResponse({"live": True})),
        get_route("/health/ready", lambda request: answer_ready(problem(request), registry.cold)),
        get_route("/v1/models", lambda _: OrjsonResponse({"models": describe_all(registry)})),
        *[
            get_route(path + suffix, partial(answer, registry))
            for path in ("/v1/models/{name}", *(f"/v1/models/{{name}}/{kind}/{{version}}" for kind in _VERSION_KINDS))
            for suffix, answer in (("", _answer_model), ("/metadata", _answer_metadata))
        ],
        get_slow_route("/metrics", lambda _: Response(metrics.render(), media_type=metrics.CONTENT_TYPE)),
        get_slow_route("/openapi.json", lambda request: _answer_openapi(registry, settings, request)),
    ]


def describe_all(registry: Registry) -> list[dict[str, Any]]:
    """Describe all models, sorted by name, including those with no version being served."""
    return [describe_model(model) for _, model in sorted(registry.models.items())]


def describe_model(model: Model, served: LoadedVersion | None = None) -> dict[str, Any]:
    """Describe a model for API responses: its latest version, unless `served` is given."""
    status = list_status(model, served)
    served = served or model.latest
    # "ready" is for clients of KServe, "model_version_status" for those of TensorFlow Serving.
    answer: dict[str, Any] = {
        "name": model.name,
        "ready": served is not None,
        "versions": sorted(model.versions),
        "refused": dict(sorted(model.refused.items())),
        "model_version_status": status,
    }
    if served is None:
        return answer
    manifest, backend = served.manifest, served.predictor.backend
    answer |= {
        "version": manifest.version,
        "title": manifest.title,
        "description": manifest.description,
        "task": manifest.task,
        **_describe_data(manifest),
        "metrics": manifest.metrics,
        "artifacts": {name: artifact.model_dump() for name, artifact in manifest.artifacts.items()},
        "backend": backend.name,
        "device": backend.device,
        "provider": backend.provider,
        "placement": served.placement,
        "cold": served.is_cold,
    }
    return answer


def _describe_data(manifest: AnyManifest) -> dict[str, Any]:
    """Describe the inputs and outputs."""
    if not isinstance(manifest, Manifest):
        return {
            "inputs": [spec.model_dump(mode="json") for spec in manifest.inputs],
            "outputs": [spec.model_dump(mode="json") for spec in manifest.outputs],
        }
    return {
        "input": drop_empty(manifest.input.model_dump(mode="json")),
        "output": {"labels": []} | drop_empty(manifest.output.model_dump(mode="json")),
        "labels": list(manifest.output.labels),
        "threshold": choose_threshold(manifest) if manifest.task == "binary" else None,
    }


def answer_ready(problem: str, cold: int = 0) -> Response:
    """Return 200 if every model is being served, with how many are cold; otherwise 503 with `problem` as the reason."""
    if not problem:
        return OrjsonResponse({"ready": True} | ({"cold": cold} if cold else {}))
    return OrjsonResponse({"ready": False, "error": problem}, status_code=503, headers={"Retry-After": "1"})


def _answer_model(registry: Registry, request: Request) -> Response:
    name = request.path_params["name"]
    has_version = "version" in request.path_params or name not in registry.models
    served = find_served(registry, request) if has_version else None
    return OrjsonResponse(describe_model(registry.models[name], served))


def _answer_metadata(registry: Registry, request: Request) -> Response:
    return OrjsonResponse(build_metadata(find_served(registry, request).manifest))


def _answer_openapi(registry: Registry, settings: Settings, request: Request) -> Response:
    """Return the OpenAPI document: of all models, or of the one that `?model=` names."""
    return OrjsonResponse(build_openapi(registry, settings, request.query_params.get("model")))


def compress_for(request: Request, response: Response) -> Response:
    """Return a response with a long body compressed, if the request allows it."""
    accepted = request.headers.get("accept-encoding", "").encode("latin-1")
    fields, body = compress(b"", bytes(response.body), accepted)
    response.headers.update(dict(field.split(": ", 1) for field in fields.decode().splitlines()))
    response.body = body
    response.headers["content-length"] = str(len(body))
    return response


def find_served(registry: Registry, request: Request) -> LoadedVersion:
    """Return the version named by the path, or the latest if the path has no version. See `Registry.get`."""
    return registry.get(request.path_params["name"], request.path_params.get("version"))


def get_route(path: str, answer: Answer) -> Route:
    """Return a GET and HEAD route whose handler runs on the event loop."""

    async def endpoint(request: Request) -> Response:
        return compress_for(request, answer(request))

    return Route(path, endpoint, methods=["GET"])


def get_slow_route(path: str, answer: Answer) -> Route:
    """Return a GET and HEAD route whose handler runs in a thread, one at a time: it takes a second for 1,000 models."""
    turn = asyncio.Lock()

    async def endpoint(request: Request) -> Response:
        async with turn:
            run = asyncio.get_running_loop().run_in_executor
            return await run(None, lambda: compress_for(request, answer(request)))

    return Route(path, endpoint, methods=["GET"])
