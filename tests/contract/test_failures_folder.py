"""The service's private folder is cleaned away, or its disk is full: requests, reloads and restarts go on."""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import fakes
from tests.servers import Server, run_service
from tests.wire import wait_until

FLAGS = ("--workers", "2", "--reload-interval", "0.2")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where the service makes its folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture
def small_disk(place: Path) -> Iterator[Path]:
    """The same place, on a file system of 256 kB."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], check=False)
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(place: Path) -> None:
    """Write until the disk is full."""
    with contextlib.suppress(OSError), (place / "large").open("ab", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass


def environment(place: Path) -> dict[str, str]:
    """Return what makes a service, or a command, use a place; a login session would prefer the other."""
    return {"XDG_RUNTIME_DIR": str(place), "TMPDIR": str(place), "XDG_SESSION_ID": "1"}


def predictions(server: Server) -> set[object]:
    """Return the versions that several requests get, each on a connection of its own."""
    answers = [server.predict("doubler", [[2]]) for _ in range(12)]
    assert {answer.status_code for answer in answers} == {200}
    return {answer.json()["version"] for answer in answers}


def replace_a_worker(server: Server) -> None:
    """Kill a worker, and wait until another answers in its place."""
    victim = server.workers()[0]
    victim.kill()
    count = server.log().count("starting another")
    wait_until(lambda: victim.pid not in {each.pid for each in server.workers()})
    wait_until(lambda: len(server.workers()) == 2 and server.log().count("starting another") > count - 1)
    wait_until(lambda: server.get("/metrics").text.count("service_model_info{") >= 1 and total_served(server) == 2)


def total_served(server: Server) -> float:
    """Return how many workers serve the first version."""
    lines = server.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("service_model_info{") and '"1"' in line)


def test_folder_is_removed(empty_dir: Path, place: Path) -> None:
    """Its workers are replaced, new versions are served by all, and the command line works again within seconds."""
    fakes.write_version(empty_dir, fakes.doubler())
    with Server(empty_dir, *FLAGS, environment=environment(place)) as server:
        (folder,) = place.glob("model-service-*")
        port = server.url.rpartition(":")[2]
        shutil.rmtree(folder)
        assert predictions(server) == {1}
        replace_a_worker(server)
        fakes.write_version(empty_dir, fakes.doubler(version=2))
        wait_until(lambda: predictions(server) == {2})
        wait_until((folder / "access.json").exists)
        for action, shown in (("unload", "nothing"), ("load", "1, 2")):
            done = run_service("models", action, "doubler", "--port", port, environment=environment(place))
            assert (done.returncode, done.stdout.split(";")[0]) == (0, f"doubler: serving {shown}"), done.stderr
        assert "Traceback" not in server.log()
        assert "models folder" not in server.log()
    assert not list(place.glob("model-service-*"))


def test_disk_is_full(empty_dir: Path, small_disk: Path) -> None:
    """Nothing but the command line's token needs space, and the line that says so names the folder, once."""
    fakes.write_version(empty_dir, fakes.doubler())
    with Server(empty_dir, *FLAGS, environment=environment(small_disk)) as server:
        (folder,) = small_disk.glob("model-service-*")
        fill(small_disk)
        assert predictions(server) == {1}
        replace_a_worker(server)
        fakes.write_version(empty_dir, fakes.doubler(version=2))
        wait_until(lambda: predictions(server) == {2})
        assert server.get("/metrics").status_code == 200
        sentence = f"{folder} cannot be written to: No space left on device"
        while sentence not in server.log():  # it may have been written again before the disk was full again
            (folder / "access.json").unlink(missing_ok=True)
            fill(small_disk)
            time.sleep(0.2)
        assert "models folder" not in server.log()
        with Server(empty_dir, "--workers", "1", environment=environment(small_disk)) as other:
            assert predictions(other) == {2}
            assert len(list(small_disk.glob("model-service-*"))) == 1
        assert server.log().count(sentence) == 1
