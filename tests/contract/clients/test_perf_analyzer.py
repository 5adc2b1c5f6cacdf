"""Triton's load generator measures this service as it measures Triton, and prints its tables.

Its last release that pip can install is 2.51.0. Source: https://github.com/triton-inference-server/perf_analyzer
"""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.clients.environments import SECONDS, find_client
from tests.contract.clients.grpc_server import GrpcServer

SHORT = ("--measurement-mode", "count_windows", "--measurement-request-count", "20", "--measurement-interval", "100")
STABLE = ("--stability-percentage", "999", "--max-trials", "3")  # nothing is concluded from the figures
_LEVEL = re.compile(r"^Concurrency: (\d+), throughput: ([\d.]+) infer/sec, latency \d+ usec$", re.MULTILINE)


@pytest.fixture(scope="module")
def server(models_dir: Path) -> Iterator[GrpcServer]:
    """A server with gRPC."""
    with GrpcServer(models_dir, "--workers", "1") as running:
        yield running


@pytest.mark.parametrize(
    ("protocol", "flags", "levels"),
    [
        ("http", ("--concurrency-range", "1:8:7"), [1, 8]),
        ("http", ("--input-tensor-format", "json", "--output-tensor-format", "json"), [1]),
        ("http", ("-b", "16"), [1]),
        ("grpc", ("--concurrency-range", "1:8:7"), [1, 8]),
        ("grpc", ("-b", "16", "--streaming"), [1]),
    ],
    ids=["binary", "JSON", "batches", "gRPC", "streamed batches"],
)
def test_tables_are_printed(protocol: str, flags: tuple[str, ...], levels: list[int], server: GrpcServer) -> None:
    """The client's figures, and the server's from its statistics, for each level of concurrency."""
    program = find_client("tritonclient", "bin/perf_analyzer")
    libraries = [*program.parents[1].glob("usr/lib/*-linux-gnu"), *program.parents[1].glob("lib/*/*/nvidia/*/lib")]
    if len(libraries) < 2:
        pytest.skip("libb64.so.0d and libcudart.so.12 are not both installed; `make clients` installs them on Debian")
    address = server.url.removeprefix("http://") if protocol == "http" else server.address
    command = [
        str(program),
        "-m",
        "compass",
        "-i",
        protocol,
        "-u",
        address,
        "--input-data",
        "zero",
        *SHORT,
        *STABLE,
        *flags,
    ]
    environment = os.environ | {"LD_LIBRARY_PATH": ":".join(map(str, libraries))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    measured = _LEVEL.findall(done.stdout)
    assert [int(concurrency) for concurrency, _ in measured] == levels, done.stdout
    assert all(float(throughput) > 0 for _, throughput in measured)
    if "--streaming" not in flags:  # then it prints none
        assert len(re.findall(r"compute infer \d+ usec", done.stdout)) == len(levels), done.stdout
