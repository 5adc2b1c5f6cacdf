"""The host on one machine: LitServe workers, each serving the whole application on one shared listening socket.

LitServe (https://lightning.ai/docs/litserve) gives a worker its life cycle: `LitAPI.setup(device)`, then a `LitLoop`.
Its API server, request queue and manager process are not used: each worker answers HTTP itself, so a request stays in
one process. `import litserve` imports its server, too (200 modules, 0.14 s), so that is done once, before the fork.
"""

import errno
import gc
import ipaddress
import logging
import multiprocessing as mp
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from litserve import LitAPI
from litserve.loops import LitLoop

from service.api.access import restrict_hosts
from service.app import Application, create_app
from service.errors import StartError
from service.hosts.grpc_port import check_grpc, share_port
from service.hosts.open_files import fit_open_files
from service.hosts.supervisor import Supervisor, Timeouts, WorkerContext
from service.http.server import BACKLOG, Companion, HttpServer
from service.model import engine
from service.model.backends import describe_unused_gpu, list_accelerators
from service.model.checker import CHECKER, CheckerClient
from service.model.memory import keep_freed_memory, release_memory
from service.model.remote import EngineClient, Engines
from service.registry.coordination import Coordination, WorkerGroup
from service.registry.loading import CPU_ENGINE
from service.registry.registry import check_settings
from service.runtime_folder import RuntimeFolder
from service.settings import Settings, count_cores

logger = logging.getLogger("service")
_fork = mp.get_context("fork")

MIN_HEARTBEAT_SECONDS = 5.0  # a worker may be silent this long, however short the request timeout is
SWITCH_SECONDS = 0.0005  # a thread that decodes a large body yields to the event loop after this, not after 5 ms
GARBAGE_THRESHOLD = 20_000  # objects; a request makes no cycles, so the default of 700 only costs time


class ModelHost(LitAPI):
    """One worker: the application on its device, and the HTTP server that `HttpLoop` runs.

    Args:
        settings: how to run.
        listener: the listening socket that all workers share.
        threads: CPU threads that one backend call may use.
        coordination: with the other workers.
        token: by which the command line may change what is served.
        engines: where models are checked first, and where heavy ones run; without, all of that happens here.
        heartbeat: what the server calls while its event loop runs.
        open_companion: opens the server beside HTTP's, if there is one.
    """

    app: Application
    server: HttpServer

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        threads: int,
        coordination: Coordination,
        token: str,
        engines: Engines | None,
        heartbeat: Callable[[], None],
        open_companion: Callable[[Application], Companion] | None = None,
    ) -> None:
        super().__init__(loop=HttpLoop())
        self.settings = settings
        self.listener = listener
        self.threads = threads
        self.coordination = coordination
        self.token = token
        self.engines = engines
        self.heartbeat = heartbeat
        self.open_companion = open_companion

    def setup(self, device: str) -> None:
        """Load every model, those that belong on `device` in its engine; from then on SIGTERM drains the worker.

        Raises:
            StartError: the models folder, the backend or the device asked for is not there.
        """
        if not self.settings.memory_budget:  # with one, closed models give their memory back
            keep_freed_memory()
        self.app = create_app(self.settings, self.threads, device, self.coordination, self.engines, self.token)
        companion = self.open_companion(self.app) if self.open_companion else None
        self.server = HttpServer(self.app, self.listener, self.heartbeat, companion=companion)
        signal.signal(signal.SIGTERM, self.server.handle_exit)


class HttpLoop(LitLoop):
    """What a worker does after its setup."""

    def run(self, lit_api: ModelHost, *_: object, **__: object) -> None:
        """Serve HTTP on the shared socket until the worker is told to stop."""
        sys.setswitchinterval(SWITCH_SECONDS)
        release_memory()
        gc.freeze()  # objects made at start-up stay; no collection has to visit them
        gc.set_threshold(GARBAGE_THRESHOLD)
        lit_api.server.run()
        if lit_api.server.is_stuck:
            os._exit(1)  # the interpreter would wait for a thread that never ends


def open_listener(host: str, port: int, setting: str = "--port") -> socket.socket:
    """Bind the address that all workers share; it does not listen yet. `setting` is that of the port.

    Raises:
        StartError: the address is in use, or not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        is_no_address = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        flag = "--host" if is_no_address else setting
        raise StartError(f"cannot listen on {host} port {port}: {error.strerror}; try {flag}") from error
    listener.set_inheritable(True)
    return listener


def serve(settings: Settings, folder: RuntimeFolder) -> None:
    """Serve until told to stop; `folder` is for the sockets of engines and the command line.

    Raises:
        StartError: the service cannot start with these settings.
    """
    check_settings(settings)
    check_grpc(settings)
    devices = choose_placement(settings)
    settings = settings.model_copy(update={"workers": len(devices)})
    cores = count_cores()
    threads = settings.threads or max(1, cores // len(devices))
    names = choose_engines(settings, devices)
    settings = fit_open_files(settings, len(names) + len(devices))
    listener = open_listener(settings.host, settings.port)
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_loopback:
        settings = restrict_hosts(settings)
    elif not settings.api_key:
        logger.warning("listening on %s without --api-key: anyone who can reach this port can use every model", host)
    holder = None if settings.grpc_port is None else open_listener(settings.host, settings.grpc_port, "--grpc-port")
    grpc_address = share_port(holder) if holder else ""
    token = "" if settings.admin_key else secrets.token_urlsafe()
    if token:
        folder.allow_command_line(host, port, token)
    group, shared = WorkerGroup(len(names) + len(devices)), folder.path

    def run_worker(context: WorkerContext) -> None:
        engines = connect_engines(settings, shared, names, context)
        coordination = group.join(context.number)
        open_grpc = partial(open_grpc_server, grpc_address, context.report_ready) if grpc_address else None
        api = ModelHost(settings, listener, threads, coordination, token, engines, context.heartbeat, open_grpc)
        api.setup(context.device)
        if not grpc_address:  # else its server reports it, when it listens
            context.report_ready()
        api.loop.run(api)

    def run_engine(name: str, context: WorkerContext) -> None:
        every_core, ready = settings.threads or cores, context.report_ready
        engine.run_engine(settings, shared, name, every_core, context.previous_exit, ready, context.heartbeat)

    def announce() -> None:
        listener.listen(BACKLOG)  # before the servers of the workers do: connections wait instead of being refused
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        if grpc_address:
            logger.info("serving gRPC on %s%s", grpc_address, " with TLS" if settings.tls_cert else "")
        count = "1 worker" if len(devices) == 1 else f"{len(devices)} workers"
        logger.info("serving on %s with %s; try %s/docs", url, count, url)

    timeouts = Timeouts(
        settings.drain_delay, settings.shutdown_grace, max(MIN_HEARTBEAT_SECONDS, settings.request_timeout)
    )
    gc.collect()
    gc.freeze()  # else a collection in a worker would copy the pages of every object that it visits
    with listener, holder or nullcontext():
        supervisor = Supervisor(run_worker, devices, {name: partial(run_engine, name) for name in names})
        supervisor.request(CHECKER)  # now rather than when the first worker asks for it
        supervisor.run(announce, listener.close, timeouts, folder.repair)
    logger.info("stopped")


def open_grpc_server(address: str, report_ready: Callable[[], None], app: Application) -> Companion:
    """Return a worker's gRPC server; only now is gRPC imported, as it cannot be used across a fork."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it would write lines of its own among the log's
    from service.grpc.server import GrpcServer  # noqa: PLC0415

    return GrpcServer(app, address, report_ready)


def choose_engines(settings: Settings, devices: Sequence[str]) -> list[str]:
    """Return the names of the processes beside the workers: the checker, and an engine for each device.

    With `--placement inline` there is none, except for accelerators that were asked for by name.
    """
    accelerators = sorted({device for device in devices if device != "cpu"})
    if settings.placement == "inline":
        accelerators = accelerators if settings.device != "auto" else []
        return [CHECKER, *(f"engine-{device}" for device in accelerators)]
    return [CHECKER, CPU_ENGINE, *(f"engine-{device}" for device in accelerators)]


def connect_engines(settings: Settings, shared: Path, names: Sequence[str], context: WorkerContext) -> Engines:
    """Return how a worker reaches the processes beside it: the checker, the CPU's engine, and that of its device."""
    request, ending, own = context.request_engine, threading.Event(), f"engine-{context.device}"
    engines = {
        name: EngineClient(shared / f"{name}.sock", settings.queue_size, partial(request, name), ending)
        for name in names
        if name in (CPU_ENGINE, own)
    }
    accelerator = own if own in engines and own != CPU_ENGINE else ""
    return Engines(CheckerClient(shared, partial(request, CHECKER), ending), engines, ending, accelerator)


def choose_placement(settings: Settings) -> list[str]:
    """Return the device of each worker: one worker per core unless told otherwise; accelerators take turns.

    Raises:
        StartError: the device asked for is not usable here.
    """
    devices = choose_devices(settings)
    return [devices[index % len(devices)] for index in range(settings.workers or count_cores())]


def choose_devices(settings: Settings) -> list[str]:
    """Return the devices to use: the one asked for, every usable GPU, or the CPU.

    Raises:
        StartError: the device asked for is not usable here.
    """
    if settings.device == "cpu":
        return ["cpu"]
    backends = [settings.backend] if settings.backend != "auto" else ["onnx", "torchscript"]
    found = sorted({device for name in backends for device in list_in_child(name)})
    fitting = [device for device in found if settings.device in ("auto", device, device.partition(":")[0])]
    unused = "" if found else describe_unused_gpu(settings.backend)
    if settings.device != "auto" and not fitting:
        usable = "; ".join(filter(None, [f"usable: {', '.join(['cpu', *found])}", unused]))
        raise StartError(f"device {settings.device} is not usable here; {usable}")
    if unused:
        logger.warning("%s", unused)
    return [device for device in fitting if device == "mps"] or fitting or ["cpu"]


def list_in_child(name: str) -> list[str]:
    """Return `list_accelerators(name)`, called in a child: a process that has initialised CUDA must not fork."""
    receiver, sender = _fork.Pipe(duplex=False)
    child = _fork.Process(target=lambda: sender.send(list_accelerators(name)))  # type: ignore[arg-type]
    child.start()
    sender.close()
    try:
        found: list[str] = receiver.recv()
    except EOFError:  # it crashed, and so would a worker
        found = []
    child.join()
    receiver.close()
    return found
