"""Versions that crash, hang or fill the process that opens them, and files that are none: each is refused alone."""

import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests import fakes
from tests.hostile import endless, glutton, killer
from tests.servers import Server
from tests.wire import napper, rounds_for, wait_until

RIGHT = [{"prediction": 4.0}]
FAST = ("--reload-interval", "0.2", "--open-timeout", "2")


def reason(server: Server, model: str) -> str:
    """Return why a model's version 1 is refused, as /v1 says."""
    return str(server.get(f"/v1/models/{model}").json().get("refused", {}).get("1", ""))


@pytest.mark.parametrize("placement", ["auto", "inline", "engine"])
def test_service_starts_beside_versions_that_end_what_opens_them(placement: str, empty_dir: Path) -> None:
    """Wherever models run: each hostile version is named with what it did; the others serve, and no worker has died."""
    fakes.write_version(empty_dir, fakes.doubler())
    for hostile in (killer(), endless(), glutton()):
        fakes.write_version(empty_dir, hostile)
    with Server(empty_dir, "--workers", "2", "--placement", placement, *FAST) as server:
        assert server.predict("doubler", [[2.0]]).json()["predictions"] == RIGHT
        said = {
            "killer": "killed by SIGFPE while opening",
            "endless": "not open after 2 s (--open-timeout)",
            "glutton": "",
        }
        ready = server.get("/health/ready")
        assert ready.status_code == 503
        metrics = server.get("/metrics").text
        for model, sentence in said.items():
            wait_until(lambda line=f"model {model} version 1 is not served: {sentence}": line in server.log())  # type: ignore[misc]
            assert server.log().count(f"model {model} version 1 is not served") == 1
            assert f"{model}: {sentence}" in ready.json()["error"]
            assert reason(server, model).startswith(sentence)
            assert f'service_model_refused{{model="{model}",version="1"}} 2.0' in metrics
        assert "worker-" not in server.log()


def test_quarantine_ends_with_a_change_of_the_files(empty_dir: Path) -> None:
    """Neither a new worker nor a load opens the version again; what replaces its files is served."""
    fakes.write_version(empty_dir, fakes.doubler())
    folder = fakes.write_version(empty_dir, killer("coin"))
    with Server(empty_dir, "--workers", "1", *FAST) as server:
        server.workers()[0].kill()
        wait_until(lambda: "starting another" in server.log() and server.workers())
        wait_until(lambda: server.predict("doubler", [[2.0]]).status_code == 200)
        assert server.post("/v2/repository/models/coin/load").status_code == 400
        assert "SIGFPE" in reason(server, "coin")
        assert server.log().count("checker ended with code") == 1
        shutil.rmtree(folder)
        fakes.write_version(empty_dir, fakes.coin())
        wait_until(lambda: server.predict("coin", [[1, 2]]).status_code == 200)
        assert server.get("/health/ready").status_code == 200


def test_others_are_swapped_while_one_hangs(empty_dir: Path) -> None:
    """While a version never opens, predictions go on, and what is published beside it is served after its time."""
    fakes.write_version(empty_dir, fakes.doubler())
    with Server(empty_dir, "--workers", "2", *FAST) as server:
        fakes.write_version(empty_dir, endless())
        wait_until(lambda: _is_busy(server.checker()))
        fakes.write_version(empty_dir, fakes.doubler(version=2, factor=2.5))
        assert server.predict("doubler", [[2.0]]).json()["predictions"] == RIGHT
        wait_until(lambda: server.predict("doubler", [[2.0]]).json()["version"] == 2)
        wait_until(lambda: reason(server, "endless").startswith("not open after 2 s"))
        wait_until(lambda: server.checker() is None)  # it has nothing left to do


def _is_busy(checker: psutil.Process | None) -> bool:
    try:
        return checker is not None and checker.cpu_times().user > 0.3
    except psutil.NoSuchProcess:
        return False


def test_checker_that_is_killed_may_try_once_more(empty_dir: Path) -> None:
    """SIGKILL may have nothing to do with the version; only what ends so twice is refused."""
    fakes.write_version(empty_dir, fakes.doubler())
    with Server(empty_dir, "--workers", "1", "--reload-interval", "0.2") as server:
        fakes.write_version(empty_dir, endless())
        for count in (1, 2):
            wait_until(lambda: _is_busy(server.checker()))
            checker = server.checker()
            assert checker is not None
            checker.kill()
            wait_until(lambda count=count: server.log().count("checker ended with code -9") == count)  # type: ignore[misc]
        wait_until(lambda: "SIGKILL" in reason(server, "endless"))
        assert server.predict("doubler", [[2.0]]).json()["predictions"] == RIGHT


def test_version_whose_checker_was_killed_twice_is_served_later(empty_dir: Path) -> None:
    """It is refused for a while, readiness says for how long, and then it is served though its files are the same."""
    fakes.write_version(empty_dir, fakes.doubler())
    with Server(empty_dir, "--workers", "2", "--reload-interval", "0.2") as server:
        fakes.write_version(empty_dir, napper(least=rounds_for(0.1)))
        for count in (1, 2):
            wait_until(lambda: _is_busy(server.checker()))
            checker = server.checker()
            assert checker is not None
            checker.kill()
            wait_until(lambda count=count: server.log().count("checker ended with code -9") == count)  # type: ignore[misc]
        wait_until(lambda: "tried again in 2 s" in server.get("/health/ready").text)
        wait_until(lambda: server.predict("napper", [[1.0]]).status_code == 200)
        assert server.get("/health/ready").status_code == 200


def test_sigterm_does_not_wait_for_a_version_that_never_opens(empty_dir: Path) -> None:
    """A service that is told to stop while a version hangs in the checker ends in its usual time."""
    fakes.write_version(empty_dir, fakes.doubler())
    with Server(empty_dir, "--workers", "2", "--reload-interval", "0.2") as server:
        fakes.write_version(empty_dir, endless())
        wait_until(lambda: _is_busy(server.checker()))
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 8
        assert "was killed" not in server.log()


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(path))


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "is a named pipe, not a file"),
    "zeros": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a file"),
    "folder": (lambda path: path.mkdir(), "is a folder, not a file"),
    "socket": (_socket, "is a socket, not a file"),
}


@pytest.mark.parametrize("file", ["manifest.json", "model.onnx", "settings.json"])
def test_only_files_are_read(file: str, empty_dir: Path) -> None:
    """A pipe, a device, a folder or a socket in a file's place is named, and hangs nothing; links to files are read."""
    fakes.write_version(empty_dir, fakes.coin().only("onnx"))
    linked = fakes.write_version(empty_dir, fakes.doubler().only("onnx"))
    (linked / "other").write_bytes((linked / "manifest.json").read_bytes())
    (linked / "manifest.json").unlink()
    (linked / "manifest.json").symlink_to("other")
    for name, (make, _) in ODD.items():
        folder = fakes.write_version(empty_dir, replace(fakes.doubler().only("onnx"), name=name))
        path = folder / file if file != "settings.json" else folder.parent / file
        path.unlink(missing_ok=True)
        make(path)
    with Server(empty_dir, "--workers", "1", "--reload-interval", "0.2") as server:
        for name, (_, sentence) in ODD.items():
            refused = server.get(f"/v1/models/{name}").json()["refused"]
            expected = f"{file} {sentence}" if name != "zeros" or file != "model.onnx" else "model.onnx is a link that"
            assert refused["settings" if file == "settings.json" else "1"].startswith(expected)
        assert server.predict("coin", [[1, 2]]).status_code == 200
        assert server.predict("doubler", [[2.0]]).json()["predictions"] == RIGHT
        fakes.write_version(empty_dir, fakes.doubler(version=2))
        wait_until(lambda: server.predict("doubler", [[2.0]]).json()["version"] == 2)
