"""The host on one machine: LitServe's workers, each serving the whole application on one shared listening socket.

LitServe (https://lightning.ai/docs/litserve) gives the life cycle (`LitAPI.setup(device)` in every worker), the
placement of workers on devices, and the loop that a worker runs. Its API server and its request queue are not started:
each worker answers HTTP itself, so a request crosses no process.
"""

import asyncio
import contextlib
import errno
import gc
import ipaddress
import logging
import multiprocessing as mp
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import litserve as ls
import uvicorn
from litserve.loops import LitLoop

from service.app import Application, create_app
from service.errors import StartError
from service.hosts.supervisor import Supervisor, Times
from service.http.connection import check_times
from service.http.protocol import PredictProtocol
from service.model.backends import list_accelerators
from service.registry.registry import check_settings
from service.settings import Settings, count_cores

logger = logging.getLogger("service")
_fork = mp.get_context("fork")

BACKLOG = 2048
TICK_SECONDS = 0.1
IDLE_TICK_SECONDS = 1.0
SHORTEST_SILENCE = 5.0  # of a worker's event loop, after which it is killed, however short the request timeout
SWITCH_SECONDS = 0.0005  # a thread that reads a large body gives way to the event loop after this, not after 5 ms
GARBAGE_THRESHOLD = 20_000  # objects; a request makes no cycles, so the default of 700 only costs time
KEEP_ALIVE_SECONDS = 75  # longer than proxies keep their end, so that they close first


class ModelHost(ls.LitAPI):
    """LitServe's face of the service: what one worker sets up on its device."""

    app: Application
    retrying = False  # the supervisor sets it in a worker whose predecessor died while it was set up
    pulse: Callable[[], None] = staticmethod(lambda: None)  # and this: how a worker shows that its loop turns
    server: "HttpServer"

    def __init__(self, settings: Settings, listener: socket.socket, threads: int, shared: Path | None) -> None:
        super().__init__(loop=HttpLoop(), api_path="/predict")
        self.settings = settings
        self.listener = listener
        self.threads = threads
        self.shared = shared

    def setup(self, device: str) -> None:
        """Load every model in this worker; called by LitServe with the device it placed the worker on."""
        try:
            self.app = create_app(self.settings, self.threads, device, self.shared)
        except StartError as error:
            logger.log(logging.DEBUG if self.retrying else logging.ERROR, "%s", error)
            sys.exit(1)
        self.server = HttpServer(build_config(self.app), self.app, self.pulse)
        # Before anybody hears that this worker is ready: from now on SIGTERM drains it, and does not end it at once.
        signal.signal(signal.SIGTERM, self.server.handle_exit)

    def predict(self, x: object, **_: object) -> object:
        """Refuse: LitServe's queue is not on the request path."""
        raise NotImplementedError("requests are answered by the worker's own HTTP server")


class HttpLoop(LitLoop):
    """What a worker does after setup: serve HTTP on the shared listening socket until it is told to stop."""

    def run(self, lit_api: ModelHost, *_: object, **__: object) -> None:
        """Serve, then end the process."""
        sys.setswitchinterval(SWITCH_SECONDS)
        gc.collect()
        gc.freeze()  # what start-up made stays: no collection need look at it again
        gc.set_threshold(GARBAGE_THRESHOLD)
        lit_api.server.run(sockets=[lit_api.listener])
        if lit_api.server.is_stuck:
            os._exit(1)  # a thread that never ends would be waited for
        sys.exit(0)


def build_config(app: Application) -> uvicorn.Config:
    """Return how uvicorn serves the application."""
    return uvicorn.Config(
        app,
        loop="uvloop" if sys.platform != "win32" else "asyncio",
        http=PredictProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, round(app.settings.shutdown_grace)),
    )


class HttpServer(uvicorn.Server):
    """uvicorn's server with a drain before the end, and the application's housekeeping in its tick."""

    def __init__(self, config: uvicorn.Config, app: Application, pulse: Callable[[], None]) -> None:
        super().__init__(config)
        self.is_stuck = False
        self._app = app
        self._pulse = pulse
        self._exit_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Say that the service is not ready any more; the end of listening follows after the drain delay."""
        del sig, frame
        self._app.registry.draining = True
        if self._exit_at is None:
            self._exit_at = time.monotonic() + self._app.settings.drain_delay
        self._app.arrival.set()  # an idle loop looks at once

    async def main_loop(self) -> None:
        """Tick until the end: often while there are connections, seldom while there are none, to cost little."""
        await asyncio.sleep(TICK_SECONDS)  # who has connected is taken in, also if the end has been asked for already
        while not await self.on_tick(1):
            self._app.arrival.clear()  # before looking: a signal may come between any two lines
            if self.server_state.connections or self._exit_at is not None:
                await asyncio.sleep(TICK_SECONDS)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(IDLE_TICK_SECONDS):
                    await self._app.arrival.wait()

    async def on_tick(self, counter: int) -> bool:
        """Look after the connections and the figures; true ends the server."""
        now = time.monotonic()
        self._pulse()
        self._app.tick()
        check_times(self.server_state.connections, asyncio.get_running_loop().time())
        if not self.is_stuck and (name := self._app.find_stuck()):
            logger.error("a call of model %s does not end; this worker ends and another takes its place", name)
            self.is_stuck, self._exit_at = True, now
        ended = await super().on_tick(counter)
        return ended or (self._exit_at is not None and now >= self._exit_at)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what is in flight, and write what was gathered for the log."""
        await super().shutdown(sockets)
        self._app.tick()


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
        is_no_address = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        flag = "--host" if is_no_address else "--port"
        raise StartError(f"cannot listen on {host} port {port}: {error.strerror}; try {flag}") from error
    listener.set_inheritable(True)
    return listener


def serve(settings: Settings, shared: Path) -> None:
    """Serve until told to stop; the workers agree on what they serve in the folder `shared`."""
    check_settings(settings)
    cores = count_cores()
    accelerator, devices = choose_placement(settings)
    places = len(devices) if isinstance(devices, list) else 1
    total = settings.workers or (places if accelerator != "cpu" else cores)
    listener = open_listener(settings.host, settings.port)
    host, port = listener.getsockname()[:2]
    api = ModelHost(settings, listener, max(1, cores // total), shared)
    supervisor = Supervisor(api, accelerator, devices, workers_per_device=max(1, total // places))
    if not ipaddress.ip_address(host).is_loopback and not settings.api_key:
        logger.warning("listening on %s without --api-key: whoever reaches this port can use every model", host)

    def announce() -> None:
        listener.listen(BACKLOG)  # who connects before a worker's HTTP server accepts, waits instead of being refused
        shown = f"[{host}]" if ":" in host else host
        logger.info("serving on http://%s:%d with %d workers; try http://%s:%d/docs", shown, port, total, shown, port)

    with listener:
        times = Times(settings.drain_delay, settings.shutdown_grace, max(SHORTEST_SILENCE, settings.request_timeout))
        supervisor.supervise(announce, listener.close, times)
    logger.info("every process has ended")


def list_in_child(name: str) -> list[str]:
    """Return what `list_accelerators` does, asked in a process of its own: one that has touched a GPU must not fork."""
    receiver, sender = _fork.Pipe(duplex=False)
    child = _fork.Process(target=lambda: sender.send(list_accelerators(name)))  # type: ignore[arg-type]
    child.start()
    sender.close()
    try:
        found: list[str] = receiver.recv()
    except EOFError:  # it died, and so would a worker
        found = []
    child.join()
    receiver.close()
    return found


def choose_placement(settings: Settings) -> tuple[str, Any]:
    """Return LitServe's accelerator and devices for the device asked for: every usable GPU, or the CPU."""
    if settings.device == "cpu":
        return "cpu", 1
    wanted = [settings.backend] if settings.backend != "auto" else ["onnx", "torchscript"]
    found = sorted({device for name in wanted for device in list_in_child(name)})
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
