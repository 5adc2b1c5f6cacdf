"""Run the real server in its own process group, and check that it leaves no process behind."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import psutil
import requests

from service.runtime_folder import find_access

ROOT = Path(__file__).parents[1]
START_SECONDS = 60
STOP_SECONDS = 20
_ADDRESS = re.compile(r"serving on (http://\S+) with (\d+) workers?")


def clean_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment without the service's settings, but with any host allowed, plus `more`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SERVICE_", "PORT"))}
    return kept | {"PYTHONPATH": str(ROOT), "SERVICE_ALLOWED_HOSTS": "*"} | dict(more or {})


class Server:
    """`python -m service serve --port 0` on a models folder, as a context manager that stops it with SIGTERM."""

    module = "service"  # what is run

    def __init__(self, models_dir: Path, *flags: str, environment: Mapping[str, str] | None = None) -> None:
        self.url = ""
        self._text = ""
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by kill
        command = [sys.executable, "-m", self.module, "serve", "--port", "0", "--models-dir", str(models_dir), *flags]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=clean_environment(environment),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        """Wait until the server logs its address."""
        self._wait_for_address()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop the server with SIGTERM and check that it exits cleanly."""
        if self.process.returncode is None:
            assert self.stop() == 0, self.log()

    def log(self) -> str:
        """Return its output so far, stdout and stderr."""
        if self._log.closed:
            return self._text
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode()

    def members(self) -> list[psutil.Process]:
        """Return the live processes of its group."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getpgid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def workers(self) -> list[psutil.Process]:
        """Return its worker processes."""
        return self._find("worker")

    def engine(self, device: str = "") -> psutil.Process | None:
        """Return its engine process, or that of a device, if it has one."""
        return next(iter(self._find(f"engine-{device}")), None)

    def checker(self) -> psutil.Process | None:
        """Return the process that checks new versions, if it runs now."""
        return next(iter(self._find("checker")), None)

    def _find(self, name: str) -> list[psutil.Process]:
        """Return its processes whose names, given by the supervisor, begin with `name`."""
        found = []
        for process in self.members():
            with suppress(psutil.NoSuchProcess):
                if process.name().startswith(name):
                    found.append(process)
        return found

    def stop(self, number: int = signal.SIGTERM, *, whole_group: bool = False) -> int:
        """Send a signal to the parent, or to the whole group as a terminal does, and return the exit code.

        Raises:
            AssertionError: A process of the group is left behind.
            subprocess.TimeoutExpired: The parent does not exit.
        """
        try:
            if whole_group:
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)
            code = self.process.wait(STOP_SECONDS)
            until = time.monotonic() + 1  # init may not have reaped them yet
            while self.members() and time.monotonic() < until:
                time.sleep(0.02)
            assert not self.members(), f"processes are left: {self.members()}"
        finally:
            self.kill()
        return code

    def kill(self) -> None:
        """Kill every process left in the group."""
        for process in self.members():
            process.kill()
        self.process.wait()
        self._text = self.log()
        self._log.close()

    def get(self, path: str, **more: object) -> requests.Response:
        """Send a GET request on a new connection."""
        return requests.get(self.url + path, timeout=30, **more)  # type: ignore[arg-type]

    def post(self, path: str, json: object = None, **more: object) -> requests.Response:
        """Send a POST request on a new connection, with the command line's token where it changes what is served."""
        if path.startswith("/v2/repository/models/"):
            more.setdefault("headers", self.token_headers())
        return requests.post(self.url + path, json=json, timeout=30, **more)  # type: ignore[arg-type]

    def token_headers(self) -> dict[str, str]:
        """Return the header by which the command line may change what is served; none where an admin key is set."""
        access = find_access(self.url)
        return {"X-API-Key": access.token} if access else {}

    def predict(self, model: str, instances: object, **parameters: object) -> requests.Response:
        """Send a predict request."""
        body = {"instances": instances} | ({"parameters": parameters} if parameters else {})
        return self.post(f"/v1/models/{model}:predict", json=body)

    def _wait_for_address(self) -> None:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            match = _ADDRESS.search(self.log())
            if match:
                self.url = match[1]
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        text = self.log()
        self.kill()
        raise AssertionError(f"the server did not start: {text}")


def run_service(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `python -m service …` and wait for it to exit."""
    return subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        cwd=ROOT,
        env=clean_environment(environment),
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
