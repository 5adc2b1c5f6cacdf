"""One measured load: wrk (https://github.com/wg/wrk) on one thread, closed loop, and what it saw."""

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_SCRIPT = """
local file = io.open(os.getenv("BENCH_BODY"), "rb")
wrk.method = "POST"
wrk.body = file:read("*a")
for name, value in string.gmatch(os.getenv("BENCH_HEADERS"), "([^:;]+):([^;]+)") do wrk.headers[name] = value end
function done(summary, latency, requests)
  local errors = summary.errors
  io.stderr:write(string.format(
    '{"requests": %d, "seconds": %f, "p50": %f, "p99": %f, "failed": %d}',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.status + errors.connect + errors.read + errors.write + errors.timeout))
end
"""


@dataclass(frozen=True)
class Load:
    """Requests a second, latencies in milliseconds, and how many requests failed."""

    requests: int
    seconds: float
    p50: float
    p99: float
    failed: int

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds


class Wrk:
    """A running wrk; `finish` waits for it."""

    def __init__(self, url: str, body: bytes, connections: int, seconds: float, headers: dict[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        (folder / "body").write_bytes(body)
        (folder / "load.lua").write_text(_SCRIPT)
        self._process = subprocess.Popen(
            ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--latency", "-s", str(folder / "load.lua"), url],
            env={
                "BENCH_BODY": str(folder / "body"),
                "BENCH_HEADERS": ";".join(f"{name}:{value}" for name, value in headers.items()),
                "PATH": "/usr/bin:/usr/local/bin",
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def finish(self) -> Load:
        """Return what it measured."""
        _, said = self._process.communicate()
        self._folder.cleanup()
        if self._process.returncode != 0:
            raise SystemExit(f"wrk failed: {said.decode().strip()}")
        return Load(**json.loads(said))


def check_wrk() -> None:
    """Say how to get wrk where it is missing."""
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed; on Debian: apt-get install wrk")
