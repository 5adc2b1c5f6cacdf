"""The gRPC server itself: keys, health, reflection, TLS, limits, workers, and its end."""

import concurrent.futures
import datetime
import ipaddress
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from service.grpc import messages
from tests import fakes
from tests.contract.clients.grpc_server import GrpcServer
from tests.servers import ROOT, run_service
from tests.wire import napper, rounds_for, wait_until

SECONDS = 60
Metadata = tuple[tuple[str, str], ...]


class Caller:
    """A plain client of the protocol's calls, on a connection of its own."""

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | None = None) -> None:
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))
        secure = credentials is not None
        self.channel = (
            grpc.secure_channel(address, credentials, options) if secure else grpc.insecure_channel(address, options)
        )

    def __enter__(self) -> "Caller":
        """Return the client."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self.channel.close()

    def start(self, name: str, message: Any = None, metadata: Metadata = ()) -> Any:
        """Start a call, and return its future."""
        method = messages.SERVICE.methods_by_name[name]
        answer_class = messages.get_message(method.output_type.name)
        call = self.channel.unary_unary(
            f"/{messages.SERVICE.full_name}/{name}", messages.serialize, answer_class.FromString
        )
        message = messages.get_message(method.input_type.name)() if message is None else message
        return call.future(message, timeout=SECONDS, metadata=metadata)

    def call(self, name: str, message: Any = None, metadata: Metadata = ()) -> Any:
        """Make a call, and return its answer."""
        return self.start(name, message, metadata).result()


def build_infer(model: str, *rows: list[float]) -> Any:
    """Return an infer request with raw contents."""
    array = np.array(rows, np.float32)
    request = messages.get_message("ModelInferRequest")(model_name=model)
    request.inputs.add(name="inputs", datatype="FP32", shape=array.shape)
    request.raw_input_contents.append(array.tobytes())
    return request


def read_outputs(answer: Any) -> list[float]:
    """Return the first output of an answer."""
    return list(map(float, np.frombuffer(answer.raw_output_contents[0], np.float32)))


def wait_for_log(server: GrpcServer, text: str) -> None:
    """Wait until the server has logged a text."""
    wait_until(lambda: text in server.log())


def read_error(call: Any) -> tuple[grpc.StatusCode, str]:
    """Return code and sentence of a call that fails."""
    with pytest.raises(grpc.RpcError):
        call.result()
    return call.code(), call.details()


@pytest.fixture(scope="module")
def keyed(models_dir: Path) -> Iterator[GrpcServer]:
    """A server that wants a key, with small limits."""
    flags = ("--workers", "1", "--api-key", "user", "--admin-key", "root", "--max-request-bytes", "65536")
    with GrpcServer(models_dir, *flags) as running:
        yield running


def test_keys_are_metadata(keyed: GrpcServer) -> None:
    """Only health needs no key; a key is taken as HTTP takes it; only the admin key changes what is served."""
    change = messages.get_message("RepositoryModelLoadRequest")(model_name="doubler")
    kserve = messages.get_message("RepositoryModelLoadRequest")(repository_name="doubler")
    with Caller(keyed.address) as caller:
        assert caller.call("ServerLive").live
        assert caller.call("ServerReady").ready
        for name, message in (("ModelInfer", build_infer("doubler", [2])), ("ServerMetadata", None)):
            code, sentence = read_error(caller.start(name, message))
            assert (code, "a key is needed" in sentence) == (grpc.StatusCode.UNAUTHENTICATED, True)
            assert read_error(caller.start(name, message, (("x-api-key", "wrong"),)))[0] == code
            for metadata in (("x-api-key", "user"), ("authorization", "Bearer user")):
                assert caller.call(name, message, (metadata,))
        user, root = (("x-api-key", "user"),), (("x-api-key", "root"),)
        code, sentence = read_error(caller.start("RepositoryModelLoad", change, user))
        assert (code, sentence.startswith("this needs the admin key")) == (grpc.StatusCode.UNAUTHENTICATED, True)
        for message in (change, kserve):
            assert caller.call("RepositoryModelLoad", message, root).isLoaded
        stream = caller.channel.stream_stream(f"/{messages.SERVICE.full_name}/ModelStreamInfer")
        refused = stream(iter([build_infer("doubler", [2]).SerializeToString()]), timeout=SECONDS)
        with pytest.raises(grpc.RpcError):
            next(refused)
        assert refused.code() == grpc.StatusCode.UNAUTHENTICATED


def test_request_id_comes_back(keyed: GrpcServer) -> None:
    """The caller's id, or one of the service's, is in the trailing metadata and the access log."""
    with Caller(keyed.address) as caller:
        for sent in ((("x-request-id", "from-here"),), ()):
            call = caller.start("ModelInfer", build_infer("doubler", [2]), (("x-api-key", "user"), *sent))
            assert read_outputs(call.result()) == [5.0]
            ids = [value for name, value in call.trailing_metadata() if name == "x-request-id"]
            assert len(ids) == 1
            assert ids == [value for _, value in sent] or not sent
            wait_for_log(keyed, f"{ids[0]} POST /inference.GRPCInferenceService/ModelInfer 200")


def test_large_and_broken_requests(keyed: GrpcServer) -> None:
    """A message over the limit, and one that is none, are refused with their codes."""
    key = (("x-api-key", "user"),)
    with Caller(keyed.address) as caller:
        large = caller.start("ModelInfer", build_infer("doubler", *[[1.0]] * 20_000), key)
        assert read_error(large)[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
        call = caller.channel.unary_unary(f"/{messages.SERVICE.full_name}/ModelInfer")
        for body in (b"\xff", b"\x0a\x7fx", b"\x2a\x02\xff\xff"):
            sentence = read_error(call.future(body, timeout=SECONDS, metadata=key))
            assert sentence[0] in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
        assert read_outputs(caller.call("ModelInfer", build_infer("doubler", [2]), key)) == [5.0]


def test_health_and_reflection(keyed: GrpcServer) -> None:
    """The standard health service knows the services; reflection lists them and describes the messages."""
    with Caller(keyed.address) as caller:
        health = health_pb2_grpc.HealthStub(caller.channel)
        for name in ("", messages.SERVICE.full_name):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=SECONDS)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError, match="there is no service"):
            health.Check(health_pb2.HealthCheckRequest(service="nosuch"), timeout=SECONDS)
        stub = reflection_pb2_grpc.ServerReflectionStub(caller.channel)
        ask = reflection_pb2.ServerReflectionRequest
        names = (messages.SERVICE.full_name, "grpc.health.v1.Health")
        asked = [ask(list_services=""), *(ask(file_containing_symbol=name) for name in names)]
        listed, *described = stub.ServerReflectionInfo(iter(asked), timeout=SECONDS)
        assert set(names) <= {each.name for each in listed.list_services_response.service}
        assert all(each.file_descriptor_response.file_descriptor_proto for each in described)


def test_watch_of_health_ends_with_the_service(models_dir: Path) -> None:
    """A watch hears that the service drains, and does not hold up its end; nor does an idle stream."""
    with GrpcServer(models_dir, "--workers", "1", "--drain-delay", "1") as server, Caller(server.address) as caller:
        watch = health_pb2_grpc.HealthStub(caller.channel).Watch(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        idle = concurrent.futures.Future[bytes]()
        stream = caller.channel.stream_stream(f"/{messages.SERVICE.full_name}/ModelStreamInfer")
        answers = stream((idle.result(SECONDS) for _ in range(1)), timeout=SECONDS)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert list(watch) == []
        with pytest.raises(grpc.RpcError, match="shutting down"):
            next(answers)
        assert server.process.wait(SECONDS) == 0
        assert time.monotonic() - began < 9  # the grace is 10
        idle.set_result(b"")
        server.kill()


def test_requests_in_flight_are_finished(empty_dir: Path) -> None:
    """What was accepted when the end came is answered, alone and in a stream."""
    fakes.write_version(empty_dir, napper(least=rounds_for(0.02)))
    request = build_infer("napper", [float(rounds_for(1.0))])
    with GrpcServer(empty_dir, "--workers", "1", "--shutdown-grace", "30") as server, Caller(server.address) as caller:
        running = caller.start("ModelInfer", request)
        idle = concurrent.futures.Future[bytes]()
        stream = caller.channel.stream_stream(f"/{messages.SERVICE.full_name}/ModelStreamInfer")
        bodies = (body or idle.result(SECONDS) for body in (request.SerializeToString(), None))
        answers = stream(bodies, timeout=SECONDS)
        wait_until(lambda: "service_requests_in_flight 2.0" in server.get("/metrics").text)
        assert server.stop(signal.SIGTERM) == 0
        assert len(read_outputs(running.result())) == 1
        answer = messages.get_message("ModelStreamInferResponse").FromString(next(answers))
        assert len(read_outputs(answer.infer_response)) == 1
        idle.set_result(b"")
        assert answers.code() == grpc.StatusCode.UNAVAILABLE


def test_all_workers_share_the_port(models_dir: Path) -> None:
    """Connections reach every worker: a request's id begins with its worker's prefix. A killed one is replaced."""
    with GrpcServer(models_dir, "--workers", "2") as server:

        def find_worker() -> str:
            with Caller(server.address) as caller:
                call = caller.start("ModelInfer", build_infer("doubler", [2]))
                call.result()
                return str(dict(call.trailing_metadata())["x-request-id"]).partition("-")[0]

        def has_seen(count: int) -> bool:
            seen.add(find_worker())
            return len(seen) == count

        seen: set[str] = set()
        wait_until(lambda: has_seen(2))
        first = server.workers()[0]
        first.kill()
        wait_until(lambda: len(server.workers()) == 2 and first.pid not in {each.pid for each in server.workers()})
        wait_until(lambda: has_seen(3))
        wait_until(lambda: re.search(r'service_requests_total{.*model="doubler".*} [1-9]', server.get("/metrics").text))


def write_certificate(folder: Path, name: str) -> bytes:
    """Write a certificate and its key for 127.0.0.1, replacing earlier ones, and return the certificate."""
    key, subject = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = built.public_bytes(serialization.Encoding.PEM)
    form, without = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, form, without))
    (folder / "cert.pem").write_bytes(pem)
    return pem


def test_tls_takes_a_renewed_certificate(models_dir: Path, tmp_path: Path) -> None:
    """Calls are encrypted, and a certificate that is replaced is used for the next connection."""
    first = write_certificate(tmp_path, "first")
    files = ("--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem"))

    def answers(pem: bytes) -> bool:
        with Caller(server.address, grpc.ssl_channel_credentials(pem)) as caller:
            call = caller.start("ModelInfer", build_infer("doubler", [2]))
            return call.exception() is None and read_outputs(call.result()) == [5.0]

    with GrpcServer(models_dir, "--workers", "1", *files) as server:
        assert "with TLS" in server.log()
        assert answers(first)
        with Caller(server.address) as plain:
            assert read_error(plain.start("ServerLive"))[0] == grpc.StatusCode.UNAVAILABLE
        (tmp_path / "cert.pem").write_bytes(b"half")  # the previous one stays
        assert answers(first)
        second = write_certificate(tmp_path, "second")
        assert answers(second)
        assert not answers(first)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--tls-cert", "a.pem"), "--tls-cert and --tls-key need --grpc-port"),
        (("--grpc-port", "0", "--tls-cert", "a.pem"), "TLS needs both --tls-cert and --tls-key"),
        (
            ("--grpc-port", "0", "--tls-cert", "a", "--tls-key", "b"),
            "--tls-cert a and --tls-key cannot be used: No such",
        ),
        (("--grpc-port", "70000"), "--grpc-port='70000': "),
    ],
)
def test_unusable_settings_are_one_line(flags: tuple[str, ...], sentence: str, models_dir: Path) -> None:
    """What cannot work is refused at the start."""
    done = run_service("serve", "--port", "0", "--models-dir", str(models_dir), *flags)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(f"error: {sentence}")


def test_port_in_use_is_refused(models_dir: Path) -> None:
    """Two services do not share a port by mistake, although the workers of one do."""
    with GrpcServer(models_dir, "--workers", "1") as server:
        port = server.address.rpartition(":")[2]
        done = run_service("serve", "--port", "0", "--grpc-port", port, "--models-dir", str(models_dir))
    assert done.returncode == 1
    assert done.stderr == f"error: cannot listen on 127.0.0.1 port {port}: Address already in use; try --grpc-port\n"


def test_missing_extra_is_said(models_dir: Path, tmp_path: Path) -> None:
    """Without the packages, one sentence says what to install; without the flag, nothing of gRPC is imported."""
    script = tmp_path / "without.py"
    script.write_text(
        "import importlib.util, runpy, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name == 'grpc_health' else find(name, *more)\n"
        "sys.argv[0] = 'service'\n"
        "runpy.run_module('service', run_name='__main__')\n"
    )
    flags = ("serve", "--port", "0", "--grpc-port", "0", "--models-dir", str(models_dir))
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, str(script), *flags],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=environment,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "error: --grpc-port needs packages that are not installed: pip install '.[grpc]'\n"
    code = "import sys, service.__main__, service.hosts.litserve; sys.exit('grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=SECONDS, check=False).returncode == 0
