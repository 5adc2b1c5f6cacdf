"""The servers that the cases are run against, each on a free port of this machine."""

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests import fakes
from tests.servers import ROOT, Server, clean_environment

_SECONDS = 20
_ECHO = "tests.conformance.echo:app"
_FLAGS = ("--workers", "1", "--header-timeout", "2", "--request-timeout", "4")  # so that what is incomplete ends soon
_NGINX = """daemon off; master_process off; pid {folder}/pid; error_log {folder}/errors crit;
events {{ worker_connections 1024; }}
http {{ access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream echo {{ server 127.0.0.1:{behind}; keepalive 8; }}
  server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://echo; proxy_http_version 1.1;
    proxy_set_header Connection ""; }} }} }}
"""
_HAPROXY = """defaults
  mode http
  timeout connect 5s
  timeout client 5s
  timeout server 5s
  timeout http-request 5s
listen echo
  bind 127.0.0.1:{port}
  server echo 127.0.0.1:{behind}
"""


_CONFIGURATIONS = {"nginx": _NGINX, "HAProxy": _HAPROXY}  # both in front of uvicorn with h11
_COMMANDS = {
    "uvicorn h11": f"{sys.executable} -m uvicorn {_ECHO} --http h11 --port {{port}}",
    "uvicorn httptools": f"{sys.executable} -m uvicorn {_ECHO} --http httptools --port {{port}}",
    "hypercorn": f"hypercorn {_ECHO} --bind 127.0.0.1:{{port}}",
    "granian": f"granian --interface asgi --http 1 --port {{port}} {_ECHO}",
    "nginx": "nginx -c {file}",
    "HAProxy": "haproxy -f {file}",
}


def _find_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def run_ours(models: Path) -> Iterator[int]:
    """Run this service, and give its port."""
    fakes.write_version(models, fakes.doubler().only("onnx"))
    with Server(models, *_FLAGS) as server:
        yield int(server.url.rpartition(":")[2])


def list_installed() -> list[str]:
    """Return the names of the servers that are installed here, this one first."""
    return ["this service", *(name for name in _COMMANDS if shutil.which(_COMMANDS[name].split()[0]))]


@contextmanager
def run_server(name: str) -> Iterator[int]:
    """Run one of them, and give its port."""
    with tempfile.TemporaryDirectory() as folder:
        if name == "this service":
            with run_ours(Path(folder) / "models") as port:
                yield port
        elif name in _CONFIGURATIONS:
            behind, port, file = _find_port(), _find_port(), Path(folder) / "configuration"
            file.write_text(_CONFIGURATIONS[name].format(port=port, behind=behind, folder=folder))
            with _run(behind, _COMMANDS["uvicorn h11"]), _run(port, _COMMANDS[name], file):
                yield port
        else:
            with _run(_find_port(), _COMMANDS[name]) as port:
                yield port


@contextmanager
def _run(port: int, line: str, file: Path | None = None) -> Iterator[int]:
    """Run a server and wait until it listens."""
    command = line.format(port=port, file=file).split()
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=ROOT, env=clean_environment(), stdout=quiet, stderr=quiet)
    try:
        until = time.monotonic() + _SECONDS
        while True:
            assert process.poll() is None, f"{command[0]} has ended"
            assert time.monotonic() < until, f"{command[0]} does not listen"
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait()
