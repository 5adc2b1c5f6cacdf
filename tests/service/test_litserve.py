"""Tests of service.hosts.litserve, on real processes."""

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import requests

from service.errors import StartError
from service.hosts import litserve as litserve_host
from service.hosts.litserve import choose_devices, choose_engines, choose_placement, list_in_child, open_listener
from service.settings import Settings
from tests import fakes
from tests.servers import Server, run_service


def test_listener_takes_a_free_port() -> None:
    """Port 0 picks a free port."""
    with open_listener("127.0.0.1", 0) as listener:
        assert listener.getsockname()[1] > 0


def test_listener_refuses_an_address_it_cannot_bind() -> None:
    """A port in use and an address of another machine are start errors; the message names them and the flag."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            StartError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use; try --port"
        ):
            open_listener("127.0.0.1", port)
    for address in ("192.0.2.1", "300.1.1.1"):
        with pytest.raises(StartError, match=rf"cannot listen on {address} port 0: .*; try --host$"):
            open_listener(address, 0)


@pytest.mark.parametrize(
    ("device", "found", "expected"),
    [
        ("cpu", ["cuda:0"], ["cpu"]),
        ("auto", [], ["cpu"]),
        ("auto", ["cuda:0", "cuda:1"], ["cuda:0", "cuda:1"]),
        ("cuda", ["cuda:0", "cuda:1"], ["cuda:0", "cuda:1"]),
        ("cuda:1", ["cuda:0", "cuda:1"], ["cuda:1"]),
        ("auto", ["mps"], ["mps"]),
        ("mps", ["mps"], ["mps"]),
    ],
)
def test_devices_are_every_usable_gpu_or_the_cpu(
    device: str, found: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default every usable GPU is taken; a device asked for by name is the only one."""
    monkeypatch.setattr(litserve_host, "list_accelerators", lambda name: found)
    assert choose_devices(Settings(device=device)) == expected


@pytest.mark.parametrize(("device", "found"), [("cuda", []), ("cuda:2", ["cuda:0"]), ("mps", []), ("cuda", ["mps"])])
def test_device_that_is_not_there_is_refused(device: str, found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A device asked for by name is never replaced by another."""
    monkeypatch.setattr(litserve_host, "list_accelerators", lambda name: found)
    with pytest.raises(StartError, match=f"device {device} is not usable here; usable: cpu"):
        choose_devices(Settings(device=device))


def test_gpu_without_a_backend_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """With `auto` it is one line in the log; where a GPU was asked for, it belongs to the refusal."""
    monkeypatch.setattr(litserve_host, "list_accelerators", lambda name: [])
    monkeypatch.setattr(litserve_host, "describe_unused_gpu", lambda wanted: f"install something for {wanted}")
    assert choose_devices(Settings(device="cpu")) == ["cpu"]
    assert not caplog.records
    assert choose_devices(Settings()) == ["cpu"]
    assert [record.getMessage() for record in caplog.records] == ["install something for auto"]
    with pytest.raises(StartError, match="device cuda is not usable here; usable: cpu; install something for auto"):
        choose_devices(Settings(device="cuda"))


@pytest.mark.parametrize(
    ("workers", "found", "expected"),
    [
        (0, [], ["cpu"] * 3),
        (2, [], ["cpu"] * 2),
        (0, ["cuda:0", "cuda:1"], ["cuda:0", "cuda:1", "cuda:0"]),
        (3, ["cuda:0", "cuda:1"], ["cuda:0", "cuda:1", "cuda:0"]),
        (1, ["cuda:0", "cuda:1"], ["cuda:0"]),
    ],
)
def test_workers_are_placed_round_robin(
    workers: int, found: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are as many workers as asked for, or one per core; GPUs take them in turn."""
    monkeypatch.setattr(litserve_host, "list_accelerators", lambda name: found)
    monkeypatch.setattr(litserve_host, "count_cores", lambda: 3)
    assert choose_placement(Settings(workers=workers)) == expected


@pytest.mark.parametrize(
    ("flags", "devices", "expected"),
    [
        ({}, ["cpu"], ["engine-cpu"]),
        ({}, ["cuda:0", "cuda:1", "cuda:0"], ["engine-cpu", "engine-cuda:0", "engine-cuda:1"]),
        ({"placement": "inline"}, ["cpu"], []),
        ({"placement": "inline"}, ["cuda:0"], []),
        ({"placement": "inline", "device": "cuda"}, ["cuda:0"], ["engine-cuda:0"]),
    ],
)
def test_each_device_has_an_engine(flags: dict[str, Any], devices: list[str], expected: list[str]) -> None:
    """The checker, and an engine for the CPU and for each GPU that a worker uses."""
    assert choose_engines(Settings(**flags), devices) == ["checker", *expected]


def test_devices_are_none_where_looking_for_them_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that ends the process that asks is as good as none."""
    monkeypatch.setattr(litserve_host, "list_accelerators", lambda name: os._exit(1))
    assert list_in_child("onnx") == []


def answers(server: Server) -> bool:
    """Tell whether a prediction is right."""
    return bool(server.predict("doubler", [[2]]).json()["predictions"] == [{"prediction": 5.0}])


@pytest.mark.parametrize(
    ("number", "whole_group"), [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)]
)
def test_signals_end_every_process_and_exit_0(number: int, whole_group: bool, models_dir: Path) -> None:
    """SIGTERM, and Ctrl-C to the parent or the whole group, end all processes with exit code 0 and no traceback."""
    with Server(models_dir, "--workers", "2") as server:
        assert len(server.workers()) == 2
        assert answers(server)
        assert server.stop(number, whole_group=whole_group) == 0
        assert "Traceback" not in server.log()


def test_killed_worker_is_replaced_while_others_answer(models_dir: Path) -> None:
    """After kill -9 of a worker the service keeps answering, and soon has as many workers as before."""
    with Server(models_dir, "--workers", "2") as server:
        first, second = server.workers()
        first.kill()
        until = time.monotonic() + 20
        while time.monotonic() < until:
            assert answers(server)
            now = {worker.pid for worker in server.workers()}
            if len(now) == 2 and first.pid not in now:
                break
        assert second.pid in now
        assert len(now) == 2
        assert "ended with code -9; starting another" in server.log()


def test_workers_end_when_their_parent_is_killed(models_dir: Path) -> None:
    """After kill -9 of the parent no worker is left."""
    with Server(models_dir, "--workers", "2") as server:
        server.process.kill()
        server.process.wait()
        until = time.monotonic() + 10
        while server.members() and time.monotonic() < until:
            time.sleep(0.02)
        left = server.members()
        server.kill()
        assert not left


def test_both_workers_share_one_socket(models_dir: Path) -> None:
    """Every worker answers: a request id begins with its worker's prefix."""
    with Server(models_dir, "--workers", "2") as server:
        seen: set[str] = set()
        until = time.monotonic() + 20
        while len(seen) < 2 and time.monotonic() < until:
            connections = [requests.Session() for _ in range(8)]
            for connection in connections:
                answer = connection.get(f"{server.url}/health/live", timeout=10)
                seen.add(answer.headers["X-Request-ID"].partition("-")[0])
            for connection in connections:
                connection.close()
        assert len(seen) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "cuda:99"], "error: device cuda:99 is not usable here; usable: cpu"),
        (["--models-dir", "README.md"], "error: models folder README.md is a file, not a folder; pass --models-dir"),
        (["--models-dir", "nosuch"], "error: models folder nosuch does not exist; pass --models-dir"),
        (["--port", "99999"], "error: --port='99999': "),
        (["--host", "192.0.2.1"], "error: cannot listen on 192.0.2.1 port "),
    ],
)
def test_failed_start_is_one_line_and_exit_code_1(flags: list[str], message: str, models_dir: Path) -> None:
    """Unusable settings are refused at once, with one line on standard error."""
    done = run_service("serve", "--models-dir", str(models_dir), "--port", "0", *flags)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_port_in_use_is_one_line_and_exit_code_1(models_dir: Path) -> None:
    """A second server on the same port refuses to start."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run_service("serve", "--models-dir", str(models_dir), "--port", port)
    assert done.returncode == 1
    assert done.stderr == f"error: cannot listen on 127.0.0.1 port {port}: Address already in use; try --port\n"


def test_broken_model_does_not_affect_the_others(empty_dir: Path) -> None:
    """A refused version is logged, the others are served, and the service is not ready."""
    fakes.write_version(empty_dir, fakes.doubler(version=2, factor=2.5))
    fakes.write_version(empty_dir, fakes.liar())
    with Server(empty_dir, "--workers", "1") as server:
        assert answers(server)
        assert server.get("/health/ready").status_code == 503
        assert server.log().count("model liar version 1 is not served: ") == 1


def test_settings_reach_the_server_from_the_environment(models_dir: Path) -> None:
    """SERVICE_* variables configure a server; log lines are JSON when asked for."""
    environment = {"SERVICE_API_KEY": "k", "SERVICE_LOG_FORMAT": "json", "SERVICE_WORKERS": "1"}
    with Server(models_dir, environment=environment) as server:
        assert server.get("/v1/models").status_code == 401
        assert server.get("/v1/models", headers={"X-API-Key": "k"}).status_code == 200
        assert server.log().startswith('{"time": ')
