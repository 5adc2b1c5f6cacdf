"""The Open Inference Protocol beside infer: health, metadata, configuration, statistics, and the model repository.

Source: https://github.com/kserve/open-inference-protocol and Triton's extensions for the model repository, model
configuration and statistics.
"""

from collections.abc import Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from service import __version__
from service.api.json_values import kind_of, read_object
from service.api.operations import Answer, OrjsonResponse, answer_ready, find_served, get_route, get_slow_route
from service.api.v2.infer_request import input_specs, output_specs
from service.errors import InvalidRequestError, NotFoundError
from service.model.backends import TORCH_BACKENDS
from service.model.manifest import Manifest
from service.registry.reconciler import Reconciler
from service.registry.registry import Registry
from service.registry.versions import LoadedVersion, Model, list_served
from service.telemetry import metrics

EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_repository",
    "model_configuration",
    "statistics",
)
_PLATFORMS = {
    "onnx": "onnx_onnxv1",
    "onnx-int8": "onnx_onnxv1",
    "torchscript": "pytorch_torchscript",
    "torch-export": "pytorch_torchexport",
}
_VERSION = "/v2/models/{name}/versions/{version}"


def build_protocol_routes(
    reconciler: Reconciler, check_admin: Callable[[Request], None], batch: int, problem: Callable[[Request], str]
) -> list[BaseRoute]:
    """Return the routes under /v2 that are not infer.

    Args:
        reconciler: of the registry.
        check_admin: raises UnauthorizedError for who may not change what is served.
        batch: the largest batch.
        problem: says why the service is not ready, if it is not, as far as the caller may know.
    """
    registry = reconciler.registry

    def ready(request: Request) -> Response:
        served = find_served(registry, request)
        return OrjsonResponse({"name": served.manifest.name, "ready": True})

    async def index(request: Request) -> Response:
        return await _index(reconciler, request)

    async def change(request: Request) -> Response:
        action = request.path_params["action"]
        if action not in ("load", "unload", "rollback"):
            raise NotFoundError(f"there is no {action[:40]!r}; a model can be loaded, unloaded or rolled back")
        check_admin(request)
        return await _change(reconciler, request)

    per_version: list[tuple[str, Answer]] = [
        ("", lambda request: OrjsonResponse(_describe(registry, request))),
        ("/ready", ready),
        ("/config", lambda request: OrjsonResponse(_configure(find_served(registry, request), batch))),
    ]
    return [
        get_route("/v2", lambda _: OrjsonResponse(_server())),
        get_route("/v2/", lambda _: OrjsonResponse(_server())),
        get_route("/v2/health/live", lambda _: OrjsonResponse({"live": True})),
        get_route("/v2/health/ready", lambda request: answer_ready(problem(request))),
        get_route("/v2/models", lambda _: OrjsonResponse({"models": sorted(registry.models)})),
        get_slow_route("/v2/models/stats", lambda _: OrjsonResponse(_list_statistics(registry))),
        *[
            get_slow_route(f"{prefix}/stats", lambda request: OrjsonResponse(_show_statistics(registry, request)))
            for prefix in ("/v2/models/{name}", _VERSION)
        ],
        *[
            get_route(prefix + path, answer)
            for path, answer in per_version
            for prefix in ("/v2/models/{name}", _VERSION)
        ],
        Route("/v2/repository/index", index, methods=["POST"]),
        Route("/v2/repository/models/{name}/{action:str}", change, methods=["POST"]),
    ]


def _server() -> dict[str, Any]:
    return {"name": "model-service", "version": __version__, "extensions": list(EXTENSIONS)}


def _describe(registry: Registry, request: Request) -> dict[str, Any]:
    served = find_served(registry, request)
    manifest, backend = served.manifest, served.predictor.backend
    model = registry.models.get(manifest.name)
    refused = {f"refused_{version}": reason for version, reason in model.refused.items()} if model else {}
    return {
        "name": manifest.name,
        "versions": [str(version) for version in sorted(model.versions)] if model else [],
        "platform": _PLATFORMS[backend.name],
        "inputs": _describe_tensors(input_specs(manifest)),
        "outputs": _describe_tensors(output_specs(manifest)),
        "properties": {
            "title": manifest.title,
            "task": manifest.task,
            "sha256": manifest.artifacts[backend.name].sha256,
            "device": backend.device,
            "provider": backend.provider,
            **refused,
        },
    }


def _describe_tensors(specs: dict[str, tuple[str, list[int]]]) -> list[dict[str, Any]]:
    return [{"name": name, "datatype": datatype, "shape": shape} for name, (datatype, shape) in specs.items()]


def _configure(served: LoadedVersion, batch: int) -> dict[str, Any]:
    manifest, backend = served.manifest, served.predictor.backend
    specs = [*input_specs(manifest).values(), *output_specs(manifest).values()]
    has_batch = all(shape[:1] == [-1] for _, shape in specs)

    def tensors(specs: dict[str, tuple[str, list[int]]]) -> list[dict[str, Any]]:
        described = []
        for name, (datatype, shape) in specs.items():
            data_type = "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
            dims = shape[1:] if has_batch else shape
            # Triton's way to say that a row has a scalar; PyTriton refuses empty dims.
            fields = {"dims": dims} if dims else {"dims": [1], "reshape": {"shape": []}}
            described.append({"name": name, "data_type": data_type, **fields})
        return described

    configuration = {
        "name": manifest.name,
        "platform": _PLATFORMS[backend.name],
        "backend": "pytorch" if backend.name in TORCH_BACKENDS else "onnxruntime",
        "max_batch_size": batch if has_batch else 0,
        "input": tensors(input_specs(manifest)),
        "output": tensors(output_specs(manifest)),
        "instance_group": [{"kind": "KIND_CPU" if backend.device == "cpu" else "KIND_GPU", "count": 1}],
    }
    # Requests of a model without a task are never put together: an open first axis need not be a batch.
    return configuration | ({"dynamic_batching": {}} if isinstance(manifest, Manifest) else {})


def _list_statistics(registry: Registry) -> dict[str, Any]:
    totals = metrics.read_totals()
    return {"model_stats": [_statistics_of(served, totals) for served in list_served(registry.models).values()]}


def _show_statistics(registry: Registry, request: Request) -> dict[str, Any]:
    served = find_served(registry, request)
    totals = metrics.read_totals(served.manifest.name, str(served.manifest.version))
    return {"model_stats": [_statistics_of(served, totals)]}


def _statistics_of(served: LoadedVersion, totals: metrics.Totals) -> dict[str, Any]:
    name, version = served.manifest.name, str(served.manifest.version)

    def total(figure: str) -> float:
        return totals.get((figure, name, version), 0.0)

    def duration(figure: str) -> dict[str, int]:
        return {"count": succeeded, "ns": int(total(figure) * 1e9)}

    # Counts are of requests, as in Triton: perf_analyzer aborts unless those of the three compute steps are equal. The
    # time of a shared backend call is counted once; reading and writing tensors is not timed.
    succeeded = int(total("succeeded"))
    untimed, nothing = {"count": succeeded, "ns": 0}, {"count": 0, "ns": 0}
    return {
        "name": name,
        "version": version,
        "last_inference": int(total("service_last_request_seconds") * 1000),
        "inference_count": int(total("service_batch_rows_sum")),
        "execution_count": int(total("service_batch_rows_count")),
        "inference_stats": {
            "success": duration("service_request_seconds_sum"),
            "fail": {"count": int(total("service_request_seconds_count")) - succeeded, "ns": 0},
            "queue": duration("service_queue_seconds_sum"),
            "compute_input": untimed,
            "compute_infer": duration("service_inference_seconds_sum"),
            "compute_output": untimed,
            "cache_hit": nothing,
            "cache_miss": nothing,
        },
        "batch_stats": [],
    }


async def _index(reconciler: Reconciler, request: Request) -> Response:
    fields = await _read_object(request)
    only_ready = fields.get("ready", False)
    if not isinstance(only_ready, bool):
        raise InvalidRequestError(f"ready is {kind_of(only_ready)}, expected true or false")
    rows = [row for _, model in sorted(reconciler.registry.models.items()) for row in _index_model(model)]
    rows += [
        {"name": folder.name, "version": str(folder.version), "state": "UNAVAILABLE", "reason": "unloaded"}
        for folder in reconciler.list_unloaded()
    ]
    return OrjsonResponse([row for row in rows if row["state"] == "READY" or not only_ready])


def _index_model(model: Model) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"name": model.name, "version": str(version), "state": "READY", "reason": model.refused.get(str(version), "")}
        | _name_version(model, version)
        for version in sorted(model.versions)
    ]
    refused = {
        key: reason for key, reason in model.refused.items() if not (key.isdigit() and int(key) in model.versions)
    }
    rows += [
        {"name": model.name, "version": version, "state": "UNAVAILABLE", "reason": reason}
        for version, reason in refused.items()
    ]
    return rows


def _name_version(model: Model, version: int) -> dict[str, Any]:
    """Return what else a version goes by: whether paths without a version mean it, and its labels."""
    is_latest = model.versions[version] is model.latest
    labels = sorted(label for label, number in model.settings.labels.items() if number == version)
    return ({"latest": True} if is_latest else {}) | ({"labels": labels} if labels else {})


async def _change(reconciler: Reconciler, request: Request) -> Response:
    """Load, unload or roll back a model on every worker, and answer when all have."""
    name, action = request.path_params["name"], request.path_params["action"]
    fields = await _read_object(request)
    parameters = fields.get("parameters", {})
    if not isinstance(parameters, dict):
        raise InvalidRequestError(f"parameters is {kind_of(parameters)}, expected an object")
    if any(key == "config" or key.startswith("file:") for key in parameters):
        raise InvalidRequestError("models and configuration are not taken over the network; put them into the folder")
    if action == "load":
        await reconciler.load(name)
    elif action == "unload":
        await reconciler.unload(name)
    else:
        await reconciler.roll_back(name, parameters.get("version"))
    model = reconciler.registry.models.get(name)
    latest = model.latest if model else None
    return OrjsonResponse(
        {
            "name": name,
            action: True,
            "versions": [str(version) for version in sorted(model.versions)] if model else [],
            "latest": str(latest.manifest.version) if latest else None,
        }
    )


async def _read_object(request: Request) -> dict[str, Any]:
    try:
        body = await request.body()
    except ClientDisconnect:
        raise InvalidRequestError("the client closed the connection before the body was complete") from None
    if not body.strip():
        return {}
    return read_object(body)
