"""A Ray cluster of two nodes with the service; it has the interface of `tests.servers.Server`."""

import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import psutil
import requests

from tests.servers import ROOT, clean_environment

START_SECONDS = 120
STOP_SECONDS = 60
REPLICA = "ray::ServeReplica"


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def choose_environment(folder: Path) -> dict[str, str]:
    """Return Ray's environment: that of `deploy/ray/environment`, and paths and ports that clusters must not share."""
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "service.hosts.ray_proxy:build_middlewares",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


class RayServer:
    """The cluster; a context manager that ends all its processes."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp")  # sockets want short paths
        self._log = (Path(self._folder.name) / "log").open("wb")
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.ray.driver", str(self._port)],
            cwd=ROOT,
            env=clean_environment(choose_environment(Path(self._folder.name))),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        self._known: dict[int, psutil.Process] = {}

    def __enter__(self) -> Self:
        """Wait until it has started."""
        try:
            assert self._read() == "ready", self.log()
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it, and kill any process it leaves behind."""
        self.members()
        try:
            self.order("stop")
            self._process.wait(STOP_SECONDS)
        finally:
            self._kill()

    def log(self) -> str:
        """Return the end of the driver's log."""
        return Path(self._log.name).read_text()[-3000:]

    def order(self, what: str, **more: object) -> Any:
        """Send the driver a command and return its reply."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what, **more}) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        assert not (isinstance(answer, dict) and "error" in answer), f"{answer} {self.log()}"
        return answer

    def deploy(self, models_dir: Path, environment: Mapping[str, str] | None = None, **options: object) -> None:
        """Serve a models folder; `options` are the deployment's."""
        own = {"SERVICE_MODELS_DIR": str(models_dir), "SERVICE_ACCESS_LOG": "false", "SERVICE_RELOAD_INTERVAL": "0.5"}
        options = {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0.4}} | options
        self.order("deploy", environment=own | dict(environment or {}), options=options)
        scaling: Any = options.get("autoscaling_config") or {}
        count: Any = scaling.get("min_replicas") or options["num_replicas"]
        self._wait_until_settled(count)
        self.wait_until_answered()

    def wait_until_answered(self) -> float:
        """Wait until the service is ready through the proxy, three times in a row; return the seconds."""
        began, good = time.monotonic(), 0
        while good < 3:
            assert time.monotonic() - began < START_SECONDS, self.log()
            try:
                good = good + 1 if self.get("/health/ready").status_code == 200 else 0
            except requests.ConnectionError:
                good = 0
            time.sleep(0.05)
        return time.monotonic() - began

    def _wait_until_settled(self, count: int) -> None:
        """Wait until the old replicas are gone and `count` new ones are running."""
        until = time.monotonic() + START_SECONDS
        wanted = {"application": "RUNNING", "replicas": {"RUNNING": count}}
        while wanted != {key: self.order("status")[key] for key in wanted} or len(self.replicas()) != count:
            assert time.monotonic() < until, self.log()
            time.sleep(0.1)

    def members(self) -> list[psutil.Process]:
        """Return the live processes of the cluster."""
        found = [self._process.pid] if self._process.poll() is None else []
        for pid in [*found, *self._known]:
            try:
                process = psutil.Process(pid)
                self._known |= {each.pid: each for each in process.children(recursive=True)}
            except psutil.NoSuchProcess:
                continue
        self._known = {pid: process for pid, process in self._known.items() if process.is_running()}
        return list(self._known.values())

    def replicas(self) -> list[psutil.Process]:
        """Return the replicas' processes."""
        found = []
        for process in self.members():
            try:
                if " ".join(process.cmdline()).startswith(REPLICA):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def get(self, path: str, **more: object) -> requests.Response:
        """Send GET on a connection of its own."""
        return requests.get(self.url + path, timeout=30, **more)  # type: ignore[arg-type]

    def post(self, path: str, json: object = None, **more: object) -> requests.Response:
        """Send POST on a connection of its own."""
        return requests.post(self.url + path, json=json, timeout=30, **more)  # type: ignore[arg-type]

    def predict(self, model: str, instances: object) -> requests.Response:
        """Ask a model for predictions."""
        return self.post(f"/v1/models/{model}:predict", json={"instances": instances})

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the driver has ended: {self.log()}"
        return json.loads(line)

    def _kill(self) -> None:
        for process in self.members():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()
        self._folder.cleanup()
