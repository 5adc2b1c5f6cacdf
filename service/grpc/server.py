"""A worker's gRPC server on grpc.aio: on the event loop of HTTP, and on a port that all workers share."""

import logging
import os
import ssl
from collections.abc import Callable

import grpc
import grpc.aio
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from service.app import Application
from service.errors import StartError
from service.grpc import health, messages
from service.grpc.servicer import Servicer
from service.settings import Settings

logger = logging.getLogger("service")


class GrpcServer:
    """Serves an application's models. It is made after the fork, because gRPC starts threads.

    Args:
        app: the application.
        address: host and port; other workers listen on it, too.
        report_ready: called when the server listens.
    """

    def __init__(self, app: Application, address: str, report_ready: Callable[[], None]) -> None:
        self._app = app
        self._address = address
        self._report_ready = report_ready
        self._servicer = Servicer(app)
        self._health = health.Health(app, (messages.SERVICE.full_name,))

    async def start(self) -> None:
        """Listen.

        Raises:
            StartError: the address cannot be used.
        """
        settings = self._app.settings
        self._server = server = grpc.aio.server(
            options=(
                ("grpc.so_reuseport", 1),
                ("grpc.max_receive_message_length", settings.max_request_bytes),
                ("grpc.max_send_message_length", -1),
            ),
            maximum_concurrent_rpcs=settings.max_connections,
        )
        server.add_generic_rpc_handlers((self._servicer.build_handler(), self._health.build_handler()))
        _add_reflection(server)
        try:
            if settings.tls_cert:
                server.add_secure_port(self._address, _open_credentials(settings))
            else:
                server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise StartError(f"cannot serve gRPC on {self._address}; try another --grpc-port") from error
        await server.start()
        self._report_ready()

    async def stop(self, grace: float) -> None:
        """Take no more calls, and let those in flight finish within `grace` seconds."""
        self._health.is_ending = True
        self._servicer.end_streams()
        await self._server.stop(grace)


def _add_reflection(server: grpc.aio.Server) -> None:
    """Let tools such as grpcurl ask for the messages."""
    for module in (health_pb2, reflection_pb2):
        messages.POOL.Add(FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb))
    names = (messages.SERVICE.full_name, health.NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server, messages.POOL)


def _open_credentials(settings: Settings) -> grpc.ServerCredentials:
    """Return credentials that are read again, at the next connection, when their files have changed."""
    files = (settings.tls_key, settings.tls_cert)
    seen: list[tuple[int, ...]] = []

    def read() -> grpc.ServerCertificateConfiguration | None:
        """Return what is new, or None. gRPC calls this in threads of its own."""
        try:
            changed = tuple(os.stat(file).st_mtime_ns for file in files)
            if [changed] == seen:
                return None
            seen[:] = [changed]
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_cert, settings.tls_key)
            key, certificate = (_read_file(file) for file in files)
        except OSError as error:
            logger.error("keeping the previous certificate; %s cannot be used: %s", settings.tls_cert, error)
            return None
        return grpc.ssl_server_certificate_configuration([(key, certificate)])

    return grpc.dynamic_ssl_server_credentials(read(), read)


def _read_file(name: str) -> bytes:
    with open(name, "rb") as file:
        return file.read()
