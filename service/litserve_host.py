"""The host on one machine: LitServe's worker processes, each serving the whole application on one shared socket.

LitServe (https://lightning.ai/docs/litserve) gives the life cycle (`LitAPI.setup(device)` in every worker), the
placement of workers on devices, and the loop a worker runs. Its API server and its request queue are not started: each
worker answers HTTP itself, so a request crosses no process. Workers are forked from the parent once everything is
imported, which shares memory and starts in a fraction of a second, and are started again when they die.
"""

import logging
import multiprocessing as mp
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

import litserve as ls
import uvicorn
from litserve.loops import LitLoop
from litserve.loops.loops import inference_worker
from litserve.utils import WorkerSetupStatus

from service.app import Application, create_app
from service.backends import list_accelerators
from service.errors import StartError
from service.http_protocol import PredictProtocol
from service.settings import Settings, count_cores

logger = logging.getLogger("service")

BACKLOG = 2048
GRACE_SECONDS = 10.0
SWITCH_SECONDS = 0.0005  # a thread that reads a large body gives way to the event loop after this, not after 5 ms
_fork = mp.get_context("fork")


class ModelHost(ls.LitAPI):
    """LitServe's face of the service: what one worker sets up on its device."""

    app: Application

    def __init__(self, settings: Settings, listener: socket.socket, threads: int) -> None:
        super().__init__(loop=HttpLoop(), api_path="/predict")
        self.settings = settings
        self.listener = listener
        self.threads = threads

    def setup(self, device: str) -> None:
        """Load every model in this worker; called by LitServe with the device it placed the worker on."""
        try:
            self.app = create_app(self.settings, self.threads, preferred_device=device)
        except StartError as error:
            logger.error("%s", error)
            sys.exit(1)

    def predict(self, x: object, **_: object) -> object:
        """Refuse: LitServe's queue is not on the request path."""
        raise NotImplementedError("requests are answered by the worker's own HTTP server")


class HttpLoop(LitLoop):
    """What a worker does after setup: serve HTTP on the shared listening socket until it is told to stop."""

    def run(self, lit_api: ModelHost, *_: object, **__: object) -> None:
        """Serve, then end the process."""
        config = uvicorn.Config(
            lit_api.app,
            loop="uvloop" if sys.platform != "win32" else "asyncio",
            http=PredictProtocol,
            proxy_headers=False,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=int(GRACE_SECONDS),
        )
        sys.setswitchinterval(SWITCH_SECONDS)
        uvicorn.Server(config).run(sockets=[lit_api.listener])
        sys.exit(0)


@dataclass
class _Worker:
    """One worker process, and the pipe by which it says that it is set up."""

    process: BaseProcess
    status: Connection
    ready: bool = False
    started_at: float = field(default_factory=time.monotonic)


class _Status:
    """Stands for LitServe's table of worker states: writes what a worker says of itself into a pipe."""

    def __init__(self, sender: Connection) -> None:
        self._sender = sender

    def __setitem__(self, key: str, value: str) -> None:
        self._sender.send(value)


class ModelServer(ls.LitServer):
    """LitServe's server with its own processes replaced by `HttpLoop` workers and a supervisor that misses no death."""

    def __init__(self, api: ModelHost, accelerator: str, devices: Any, workers_per_device: int) -> None:  # noqa: ANN401
        super().__init__(api, accelerator, devices, workers_per_device, restart_workers=True, disable_openapi_url=True)
        self._api = api
        self._workers: list[_Worker] = []
        self._stopping = False

    def serve(self, announce: Callable[[], None]) -> None:
        """Start the workers, call `announce` once all are ready, and keep them running until SIGTERM or SIGINT.

        Raises:
            StartError: a worker could not be set up at the start.
        """
        wake, waker = mp.Pipe(duplex=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop(waker))
        try:
            self._workers = [self._start(index) for index in range(len(self._places()))]
            while not self._stopping:
                self._watch(wake, announce)
        finally:
            self._end_all()

    def _places(self) -> list[Any]:
        places: list[Any] = self._inference_workers_config_for_api(self._api.api_path)
        return places

    def _start(self, index: int) -> _Worker:
        receiver, sender = mp.Pipe(duplex=False)
        place = self._places()[index]
        device = place[0] if isinstance(place, list) else place
        process = _fork.Process(
            target=_run_worker,
            args=(self._api, device, index, _Status(sender), self._callback_runner),
            name=f"worker-{index}",
        )
        process.start()
        sender.close()
        return _Worker(process, receiver)

    def _watch(self, wake: Connection, announce: Callable[[], None]) -> None:
        """Wait for a worker's word or death, or for a signal, and see to it."""
        waiting = [worker.status for worker in self._workers if not worker.ready]
        wait([wake, *waiting, *(worker.process.sentinel for worker in self._workers)])
        starting = any(not worker.ready for worker in self._workers)
        for index, worker in enumerate(self._workers):
            if not worker.ready and worker.status.poll():
                worker.ready = _receive(worker.status) == WorkerSetupStatus.READY
            if not worker.process.is_alive() and not self._stopping:
                self._replace(index, worker)
        if starting and all(worker.ready for worker in self._workers):
            announce()

    def _replace(self, index: int, worker: _Worker) -> None:
        if not worker.ready:
            raise StartError("a worker could not be started; its reason stands above")
        logger.error("worker %d ended with code %s; starting another", index, worker.process.exitcode)
        worker.status.close()
        self._workers[index] = self._start(index)

    def _stop(self, waker: Connection) -> None:
        self._stopping = True
        waker.send(None)

    def _end_all(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
        until = time.monotonic() + GRACE_SECONDS + 1
        for worker in self._workers:
            worker.process.join(max(0.0, until - time.monotonic()))
            if worker.process.is_alive():
                logger.error("%s did not end in time and was killed", worker.process.name)
                worker.process.kill()
                worker.process.join()


def _receive(connection: Connection) -> object:
    try:
        return connection.recv()
    except EOFError:
        return None


def _run_worker(api: ModelHost, device: str, index: int, status: _Status, callbacks: object) -> None:
    """Run in the child: LitServe's worker (setup, then loop), ended with the parent and by signals."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, _exit_at_once)  # until the HTTP server installs its own handler
    threading.Thread(target=_end_with_parent, daemon=True).start()
    inference_worker(api, device, index, None, None, status, callbacks, True)


def _exit_at_once(number: int, frame: FrameType | None) -> None:
    del number, frame
    os._exit(0)


def _end_with_parent() -> None:
    parent = mp.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        os._exit(1)


def open_listener(host: str, port: int) -> socket.socket:
    """Bind the address that all workers share.

    Raises:
        StartError: the address is in use or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise StartError(f"cannot listen on {host} port {port}: {error.strerror}; try --port") from error
    listener.set_inheritable(True)
    return listener


def serve(settings: Settings) -> None:
    """Serve until told to stop; see `ModelServer.serve`."""
    if not settings.models_dir.is_dir():
        raise StartError(f"models folder {settings.models_dir} does not exist; pass --models-dir")
    cores = count_cores()
    accelerator, devices = choose_placement(settings)
    places = len(devices) if isinstance(devices, list) else 1
    total = settings.workers or (places if accelerator != "cpu" else cores)
    listener = open_listener(settings.host, settings.port)
    host, port = listener.getsockname()[:2]
    api = ModelHost(settings, listener, threads=max(1, cores // total))
    server = ModelServer(api, accelerator, devices, workers_per_device=max(1, total // places))

    def announce() -> None:
        listener.listen(BACKLOG)  # all models are loaded; whoever connects before a worker accepts, waits
        shown = f"[{host}]" if ":" in host else host
        logger.info("serving on http://%s:%d with %d workers; try http://%s:%d/docs", shown, port, total, shown, port)

    server.serve(announce)


def choose_placement(settings: Settings) -> tuple[str, Any]:
    """Return LitServe's accelerator and devices for the device asked for: every usable GPU, or the CPU."""
    if settings.device == "cpu":
        return "cpu", 1
    wanted = [settings.backend] if settings.backend != "auto" else ["onnx", "torchscript"]
    found = sorted({device for name in wanted for device in list_accelerators(name)})  # type: ignore[arg-type]
    if settings.device not in ("auto", "cuda") and settings.device not in found:
        raise StartError(f"device {settings.device} is not usable here; usable: {', '.join(['cpu', *found])}")
    if settings.device == "cuda" and not any(device.startswith("cuda") for device in found):
        raise StartError(f"device cuda is not usable here; usable: {', '.join(['cpu', *found])}")
    if "mps" in found and settings.device in ("auto", "mps"):
        return "mps", [0]
    cuda = [int(device.partition(":")[2]) for device in found if device.startswith("cuda")]
    if settings.device.startswith("cuda:"):
        cuda = [int(settings.device.partition(":")[2])]
    return ("cuda", cuda) if cuda else ("cpu", 1)
