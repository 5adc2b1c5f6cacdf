"""The standard health service (https://grpc.io/docs/guides/health-checking/), which says what `/health/ready` says."""

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from service.app import Application

SECONDS = 0.2  # between two looks of a watch
NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


class Health:
    """Answers for the whole service, and for the services of the server by name.

    Args:
        app: the application.
        names: of the services.
    """

    def __init__(self, app: Application, names: tuple[str, ...]) -> None:
        self.is_ending = False  # set when the server stops, to end the watches
        self._app = app
        self._names = ("", *names)

    def build_handler(self) -> grpc.GenericRpcHandler:
        """Return what a server calls."""
        request, response = health_pb2.HealthCheckRequest.FromString, health_pb2.HealthCheckResponse.SerializeToString
        handlers = {
            "Check": grpc.unary_unary_rpc_method_handler(self._check, request, response),
            "Watch": grpc.unary_stream_rpc_method_handler(self._watch, request, response),
        }
        return grpc.method_handlers_generic_handler(NAME, handlers)

    async def _check(self, request: Any, context: Any) -> Any:  # noqa: ANN401 - grpc and protobuf have no types
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.service[:60]!r} here")
        return self._read_status(request.service)

    async def _watch(self, request: Any, context: Any) -> None:  # noqa: ANN401
        sent = None
        while not self.is_ending:
            status = self._read_status(request.service)
            if status != sent:
                await context.write(status)
                sent = status
            await asyncio.sleep(SECONDS)

    def _read_status(self, name: str) -> Any:  # noqa: ANN401
        response = health_pb2.HealthCheckResponse
        if name not in self._names:
            return response(status=response.SERVICE_UNKNOWN)
        return response(status=response.NOT_SERVING if self._app.problem else response.SERVING)
