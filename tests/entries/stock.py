"""The ASGI application under a stock uvicorn, `python -m tests.entries.stock`: what any ASGI server does with it."""

import argparse
import asyncio
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

import uvicorn
from starlette.types import Receive, Scope, Send

from service.app import Application, create_app
from service.settings import add_flags, count_cores, load_settings
from service.telemetry import log
from tests.servers import ROOT, START_SECONDS, Server, clean_environment
from tests.wire import Reply, exchange

TICK_SECONDS = 0.05


class StockServer(Server):
    """The ASGI application under a stock uvicorn, in a process group of its own."""

    def __init__(self, models_dir: Path, *flags: str, environment: Mapping[str, str] | None = None) -> None:
        self._text = ""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by kill
        with socket.create_server(("127.0.0.1", 0)) as listener:  # who connects before it serves waits
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            number = listener.fileno()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.entries.stock", str(number), "--models-dir", str(models_dir), *flags],
                cwd=ROOT,
                env=clean_environment(environment),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,
                pass_fds=(number,),
            )

    def __enter__(self) -> Self:
        """Wait until it answers."""
        reply = Reply()
        with suppress(OSError):
            reply = exchange(self.url, b"GET /health/ready HTTP/1.1\r\nHost: test\r\n\r\n", START_SECONDS)
        if reply.status != 200:
            self.kill()
            raise AssertionError(f"the server did not start: {self.log()}")
        return self


class _Hosted:
    """The application with the ticks that a host gives it."""

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return
        ticking = asyncio.create_task(self._tick())
        await self._app(scope, receive, send)
        ticking.cancel()
        self._app.tick()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._app.tick()


def main() -> None:
    """Serve the application by uvicorn on a listening socket that was handed over."""
    parser = argparse.ArgumentParser()
    parser.add_argument("listener", type=int)
    add_flags(parser)
    flags = vars(parser.parse_args())
    settings = load_settings(flags)
    log.configure(settings.log_format)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises the signal again once it has drained
    config = uvicorn.Config(
        _Hosted(create_app(settings, count_cores())),
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
    )
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=flags["listener"])])


if __name__ == "__main__":
    main()
