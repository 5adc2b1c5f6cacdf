"""A worker's HTTP server: the application's life span, connections on a shared listening socket, and their end."""

import asyncio
import contextlib
import logging
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from types import FrameType
from typing import Protocol

from starlette.types import Message

from service.app import Application
from service.errors import StartError
from service.http.connection import Connection
from service.http.protocol import HttpProtocol
from service.http.timeouts import KEEP_ALIVE_SECONDS, check_timeouts

if sys.platform == "win32":
    from asyncio import new_event_loop
else:
    from uvloop import new_event_loop

logger = logging.getLogger("service")

BACKLOG = 2048
TICK_SECONDS = 0.1
IDLE_TICK_SECONDS = 1.0


class Companion(Protocol):
    """Another server, on the event loop of HTTP's."""

    async def start(self) -> None:
        """Listen."""

    async def stop(self, grace: float) -> None:
        """Take no more requests, and let those in flight finish within `grace` seconds."""


class HttpServer:
    """Serves an application on a listening socket that other workers share.

    Args:
        app: answers the requests.
        listener: bound; closed by the time `run` returns.
        heartbeat: called as long as the event loop turns.
        keep_alive: seconds that a connection may be idle.
        companion: started and stopped with this server.
    """

    def __init__(
        self,
        app: Application,
        listener: socket.socket,
        heartbeat: Callable[[], None],
        keep_alive: float = KEEP_ALIVE_SECONDS,
        companion: Companion | None = None,
    ) -> None:
        self.is_stuck = False
        self.connections: set[Connection] = set()
        self._app = app
        self._listener = listener
        self._heartbeat = heartbeat
        self._keep_alive = keep_alive
        self._companion = companion
        self._exit_at: float | None = None

    def run(self) -> None:
        """Serve until told to stop by `handle_exit`, or until a call of a model does not end."""
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(self._serve())

    def handle_exit(self, signum: int, frame: FrameType | None) -> None:
        """Start draining: not ready any more; the end of listening follows after the drain delay."""
        del signum, frame
        self._app.draining = True
        if self._exit_at is None:
            self._exit_at = time.monotonic() + self._app.settings.drain_delay
        self._app.arrival.set()  # an idle loop looks at once

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        async with run_lifespan(self._app):
            server = await loop.create_server(
                lambda: HttpProtocol(self._app, self.connections), sock=self._listener, backlog=BACKLOG
            )
            if self._companion:
                await self._companion.start()
            await self._tick_until_end()
            server.close()
            stop = self._companion.stop(self._app.settings.shutdown_grace) if self._companion else asyncio.sleep(0)
            await asyncio.gather(self._drain(), stop)
            self._app.tick()

    async def _tick_until_end(self) -> None:
        """Tick often while there are connections, and seldom while there are none, to cost little."""
        await asyncio.sleep(TICK_SECONDS)  # take in whoever has connected, even if the end has been asked for already
        while not self._is_over():
            self._app.arrival.clear()  # before looking: a signal may come between any two lines
            if self.connections or self._exit_at is not None:
                await asyncio.sleep(TICK_SECONDS)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(IDLE_TICK_SECONDS):
                    await self._app.arrival.wait()

    def _is_over(self) -> bool:
        """Look after connections and metrics, and tell whether to stop."""
        now = time.monotonic()
        self._tick()
        if not self.is_stuck and (name := self._app.find_stuck()):
            logger.error("a call of model %s does not end; this worker ends and is replaced", name)
            self.is_stuck, self._exit_at = True, now
        return self._exit_at is not None and now >= self._exit_at

    def _tick(self) -> None:
        self._heartbeat()
        self._app.tick()
        check_timeouts(self.connections, asyncio.get_running_loop().time(), self._keep_alive)

    async def _drain(self) -> None:
        """Let requests in flight finish, for as long as the shutdown grace lasts."""
        self._app.draining = True
        until = time.monotonic() + self._app.settings.shutdown_grace
        for connection in list(self.connections):
            connection.shut_down()
        while self.connections and time.monotonic() < until:
            await asyncio.sleep(TICK_SECONDS / 10)
            self._tick()
        for connection in list(self.connections):
            connection.transport.abort()
        await asyncio.sleep(0)  # for the connections to hear of it


@contextlib.asynccontextmanager
async def run_lifespan(app: Application) -> AsyncIterator[None]:
    """Run the application's start-up before, and its shutdown after (ASGI's lifespan protocol)."""
    received: asyncio.Queue[Message] = asyncio.Queue()
    sent: asyncio.Queue[Message] = asyncio.Queue()
    task = asyncio.create_task(app({"type": "lifespan", "asgi": {"version": "3.0"}}, received.get, sent.put))
    received.put_nowait({"type": "lifespan.startup"})
    if (message := await sent.get())["type"] != "lifespan.startup.complete":
        raise StartError(f"the application could not start: {message.get('message', '')}")
    try:
        yield
    finally:
        received.put_nowait({"type": "lifespan.shutdown"})
        await task
