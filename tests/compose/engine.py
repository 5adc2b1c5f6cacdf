"""Docker and compose, and projects of them that leave nothing behind."""

import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import requests

from tests.servers import ROOT

NAME = "model-service-test"
BASE = "python:3.11-slim-bookworm"
SECONDS = 180.0  # until a test gives up on a container; a busy machine is no finding
BUILD_SECONDS = 1500.0
WHEELS_PORT = 28199
PAUSE = 0.02  # seconds between a caller's requests


def docker(*arguments: str, environment: dict[str, str] | None = None, seconds: float = SECONDS) -> str:
    """Run a docker command and return what it printed.

    Raises:
        AssertionError: it failed.
    """
    done = subprocess.run(
        ["docker", *arguments],
        cwd=ROOT,
        env=os.environ | {"DOCKER_BUILDKIT": "1"} | (environment or {}),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, f"docker {' '.join(arguments)}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def find_missing() -> str:
    """Return what these tests need and is not here, or the empty string."""
    if shutil.which("docker") is None:
        return "docker is not installed"
    for command in (["docker", "version"], ["docker", "compose", "version"]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip().splitlines()
            return f"{' '.join(command)}: {said[-1] if said else done.returncode}"
    return ""


def build(target: str, **arguments: str) -> str:
    """Build a target of the Dockerfile and return the image's name."""
    name = f"{NAME}:{target}"
    given = [part for key, value in arguments.items() for part in ("--build-arg", f"{key}={value}")]
    began = time.monotonic()
    # The host's network: an engine may give builds none of their own.
    docker("build", "--network=host", "--target", target, "--tag", name, *given, ".", seconds=BUILD_SECONDS)
    print(f"built {name} in {time.monotonic() - began:.0f} s, {inspect(name)['Size'] / 1e6:.0f} MB")
    return name


def find_free_port() -> str:
    """Return a port that nobody listens on; unlike one that docker chose, it stays the container's over a restart."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return str(listener.getsockname()[1])


def inspect(name: str) -> Any:
    """Return what docker knows of a container or an image."""
    return json.loads(docker("inspect", name))[0]


@contextmanager
def pytorch_arguments() -> Iterator[dict[str, str]]:
    """Give the arguments that build the training image.

    Where pip is set up to find PyTorch in a folder, the build takes it from there: a machine like that may not reach
    PyTorch's own index. It then does without torchvision, which only the recipe of digits needs.
    """
    command = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False).stdout
    folder = Path(os.environ.get("PIP_FIND_LINKS") or said.strip() or "nowhere")
    locked = re.search(r"^torch==(\S+)", (ROOT / "deploy/requirements-torch.lock").read_text(), re.MULTILINE)
    assert locked is not None
    if not list(folder.glob(f"torch-{locked[1]}-cp311*.whl")):
        yield {}
        return
    handler = partial(_Quiet, directory=str(folder))
    with _open_server(handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {
            "WITHOUT": "torchvision",
            "PIP_EXTRA_INDEX_URL": "",
            "PIP_FIND_LINKS": f"http://127.0.0.1:{server.server_port}/",
        }
        server.shutdown()


def _open_server(handler: Callable[..., http.server.BaseHTTPRequestHandler]) -> http.server.ThreadingHTTPServer:
    """Return a server on the same port as last time if it is free: a build with the same arguments is a cached one."""
    try:
        return http.server.ThreadingHTTPServer(("127.0.0.1", WHEELS_PORT), handler)
    except OSError:
        return http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and does not write a line for every file."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Project:
    """`docker-compose.yml` as a project of its own, on free ports; a context manager that takes it down."""

    def __init__(self, name: str, folder: Path, **settings: str) -> None:
        self.name = f"{NAME}-{name}"
        environment_file = folder / ".env"
        environment_file.write_text("")  # not the one that may stand in the registry
        self._base = ["compose", "--project-name", self.name, "--env-file", str(environment_file)]
        self._base += [part for profile in ("train", "monitoring", "proxy") for part in ("--profile", profile)]
        ports = dict.fromkeys(("PUBLISH_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT", "PROXY_PORT"), "0")
        self.settings = ports | settings

    def __enter__(self) -> Self:
        """Nothing is started yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Take everything down, and see that nothing is left."""
        if error is not None:
            print(self.compose("logs", "--no-color", "--tail", "60"))
        self.down()

    def compose(self, *arguments: str) -> str:
        """Run a compose command on the project."""
        return docker(*self._base, *arguments, environment=self.settings)

    def up(self, *services: str, scale: int = 1) -> None:
        """Start services, the service alone where none is named, and wait until they are healthy."""
        named = services or ("service",)
        self.compose("up", "--detach", "--no-build", "--wait", "--scale", f"service={scale}", *named)

    def down(self) -> None:
        """Take everything down.

        Raises:
            AssertionError: a container, network or volume is left.
        """
        self.compose("down", "--volumes", "--remove-orphans")
        for kind in ("container", "network", "volume"):
            every = ["--all"] if kind == "container" else []
            label = f"label=com.docker.compose.project={self.name}"
            assert not docker(kind, "ls", "--quiet", *every, "--filter", label), kind

    def container(self, service: str = "service", index: int = 1) -> str:
        """Return the id of a replica's container."""
        return self.compose("ps", "--all", "--quiet", "--no-trunc", service).split()[index - 1]

    def url(self, service: str = "service", port: int = 8000, index: int = 1) -> str:
        """Return where a container's port is reached from here."""
        return f"http://{self.compose('port', '--index', str(index), service, str(port)).strip()}"

    def execute(self, program: str, index: int = 1) -> str:
        """Run a Python program in the service's container."""
        return self.compose("exec", "-T", "--index", str(index), "service", "python", "-c", program)

    def kill_main_process(self, index: int = 1) -> None:
        """Kill -9 the program that the container runs: the child of its init process.

        Detached, for the container's end may take the one who ended it along.
        """
        program = (
            "import glob, os, signal\n"
            "for path in glob.glob('/proc/[0-9]*/stat'):\n"
            "    pid, parent = int(path.split('/')[2]), open(path).read().rpartition(')')[2].split()[1]\n"
            "    if parent == '1':\n"
            "        os.kill(pid, signal.SIGKILL)\n"
        )
        self.compose("exec", "--detach", "--index", str(index), "service", "python", "-c", program)

    def health(self, index: int = 1) -> str:
        """Return what docker says of a replica: starting, healthy or unhealthy."""
        return str(inspect(self.container(index=index))["State"]["Health"]["Status"])


class Callers:
    """Threads that ask one model over and over, each on a connection of its own; every answer is counted."""

    def __init__(self, url: str, count: int = 4, key: str = "") -> None:
        self.answers: list[tuple[int, int]] = []  # status and version
        self.failures: list[str] = []
        self._url = f"{url}/v1/models/logistic-hours:predict"
        self._headers = {"X-API-Key": key}
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(count)]

    def __enter__(self) -> Self:
        """Begin."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._done.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        session = requests.Session()
        while not self._done.wait(PAUSE):
            try:
                answer = session.post(self._url, json={"instances": [[4]]}, headers=self._headers, timeout=30)
            except requests.RequestException as error:
                self.failures.append(str(error))
                session = requests.Session()
                continue
            if answer.status_code != 200:
                self.failures.append(f"{answer.status_code}: {answer.text}")
            self.answers.append((answer.status_code, answer.json().get("version", 0)))
