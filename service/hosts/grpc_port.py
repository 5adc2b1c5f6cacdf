"""The port of gRPC: whether it can be served, and a socket that holds the port for the workers' own."""

import importlib.util
import socket
import ssl

from service.errors import StartError
from service.settings import Settings

_PACKAGES = ("grpc", "grpc_health", "grpc_reflection", "google.protobuf")


def check_grpc(settings: Settings) -> None:
    """Refuse settings of gRPC that cannot work; gRPC itself is not imported before the fork.

    Raises:
        StartError: a package, or a usable certificate, is missing.
    """
    if settings.grpc_port is None:
        if settings.tls_cert or settings.tls_key:
            raise StartError("--tls-cert and --tls-key need --grpc-port; HTTP has its TLS from a proxy")
        return
    if any(importlib.util.find_spec(name) is None for name in _PACKAGES):
        raise StartError("--grpc-port needs packages that are not installed: pip install '.[grpc]'")
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise StartError("TLS needs both --tls-cert and --tls-key")
    if settings.tls_cert:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_cert, settings.tls_key)
        except OSError as error:  # ssl.SSLError is one
            reason = error.strerror or str(error)
            raise StartError(f"--tls-cert {settings.tls_cert} and --tls-key cannot be used: {reason}") from error


def share_port(holder: socket.socket) -> str:
    """Let the workers listen on the port of a bound socket, which never listens, and return the address for gRPC.

    The port was bound without SO_REUSEPORT, so that one in use by another program is refused.
    """
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    host, port = holder.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
