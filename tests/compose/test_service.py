"""The service in its container: what was promised of it, and what it does when things go wrong."""

import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from shutil import copytree, rmtree

import pytest
import requests

from service.settings import count_cores
from tests import fakes
from tests.compose import engine
from tests.compose.engine import Callers, Project, docker, inspect
from tests.servers import ROOT
from tests.wire import napper, rounds_for, wait_until

MOST_IDLE = 300 * 2**20  # bytes, with two workers
HOURS = "/v1/models/logistic-hours:predict"
NAP = 1.0  # seconds, more or less: what a slow request takes


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of the registry, and a slow one."""
    folder: Path = tmp_path_factory.mktemp("models") / "models"
    copytree(ROOT / "models", folder)
    fakes.write_version(folder, napper())
    folder.parent.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def service(image: str, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """One replica with two workers on one CPU."""
    settings = {"IMAGE": image, "MODELS_DIR": str(models), "CPUS": "1", "SERVICE_WORKERS": "2"}
    settings["PUBLISH_PORT"] = engine.find_free_port()
    # Longer than usual: on a busy machine the slow requests of a test take many times what they should.
    settings |= {"SERVICE_SHUTDOWN_GRACE": "60", "STOP_GRACE_PERIOD": "90s"}
    with Project("service", tmp_path_factory.mktemp("project"), **settings) as project:
        project.up()
        yield project


def until_health(project: Project, wanted: str) -> float:
    """Wait until docker says that of the container, and return the seconds that it took."""
    return wait_until(lambda: project.health() == wanted, engine.SECONDS)


def test_predicts_from_the_host(service: Project) -> None:
    """What the README's curl answers, on a port of the loopback."""
    url = service.url()
    assert url.startswith("http://127.0.0.1:")
    answer = requests.post(url + HOURS, json={"instances": [{"hours": 2}, {"hours": 4}]}, timeout=30)
    assert [each["label"] for each in answer.json()["predictions"]] == ["fail", "pass"]


def test_start_and_memory(image: str, tmp_path: Path) -> None:
    """As it comes, with two workers: healthy soon after its start, and small when idle; the figures are printed."""
    settings = {"IMAGE": image, "CPUS": str(min(2, count_cores())), "SERVICE_WORKERS": "2"}
    with Project("start", tmp_path, **settings) as project:
        project.up()
        state = inspect(project.container())["State"]
        began, ready = (datetime.fromisoformat(text[:26]) for text in (state["StartedAt"], _healthy_at(state)))
        used = docker("stats", "--no-stream", "--format", "{{.MemUsage}}", project.container()).split()[0]
    print(f"healthy {(ready - began).total_seconds():.1f} s after the start; {used} of memory at idle, two workers")
    assert float(used.removesuffix("MiB")) * 2**20 <= MOST_IDLE


def _healthy_at(state: dict[str, dict[str, list[dict[str, str]]]]) -> str:
    """Return when the first check that succeeded had ended, in UTC."""
    good = next(check for check in state["Health"]["Log"] if not check["ExitCode"])
    return good["End"].replace(" ", "T")


def test_locked_down(service: Project) -> None:
    """A user without rights, a root that cannot be written, no capabilities, limits; as the kernel sees it."""
    program = (
        "import os\n"
        "def writable(folder):\n"
        "    try: open(folder + '/probe', 'w').close(); os.remove(folder + '/probe'); return True\n"
        "    except OSError as error: return error.strerror\n"
        "print(os.getuid(), os.getgid())\n"
        "for folder in ('/app', '/models', '/opt/venv', '/tmp'): print(folder, writable(folder))\n"
        "status = dict(line.split(':', 1) for line in open('/proc/1/status'))\n"
        "for name in ('CapEff', 'CapBnd', 'NoNewPrivs'): print(name, int(status[name], 16))\n"
        "from service.settings import count_cores\n"
        "print(count_cores(), 'core')\n"
    )
    assert service.execute(program).splitlines() == [
        "10001 10001",
        "/app Read-only file system",
        "/models Read-only file system",
        "/opt/venv Read-only file system",
        "/tmp True",
        "CapEff 0",
        "CapBnd 0",
        "NoNewPrivs 1",
        "1 core",
    ]
    host = inspect(service.container())["HostConfig"]
    assert (host["Memory"], host["NanoCpus"]) == (2**30, 10**9)
    assert host["RestartPolicy"]["Name"] == "unless-stopped"
    assert host["LogConfig"]["Config"] == {"max-size": "10m", "max-file": "3"}
    assert not host["Privileged"]


def test_only_the_command_in_the_container_changes_models(service: Project) -> None:
    """A request through the published port, which docker's proxy passes on from loopback, does not."""
    answer = requests.post(service.url() + "/v2/repository/models/linear/unload", json={}, timeout=30)
    assert answer.status_code == 401
    for action, shown in (("unload", "nothing"), ("load", "1")):
        said = docker("exec", service.container(), "python", "-m", "service", "models", action, "linear")
        assert said.startswith(f"linear: serving {shown}")


def test_not_ready_while_a_model_is_broken(service: Project, models: Path) -> None:
    """Docker calls it unhealthy and says why, the other models answer, and it is healthy again when it is mended."""
    folder = fakes.write_version(models, fakes.liar())
    try:
        until_health(service, "unhealthy")
        assert requests.get(service.url() + "/health/ready", timeout=30).status_code == 503
        last = inspect(service.container())["State"]["Health"]["Log"][-1]
        assert "liar" in last["Output"]
        assert requests.post(service.url() + HOURS, json={"instances": [[4]]}, timeout=30).status_code == 200
    finally:
        rmtree(folder.parent)
    until_health(service, "healthy")


def test_killed_under_load_it_comes_back(service: Project) -> None:
    """Kill -9 of the main process: docker starts the container again, and it answers and is healthy."""
    started = inspect(service.container())["State"]["StartedAt"]
    with Callers(service.url()) as callers:
        wait_until(lambda: len(callers.answers) > 50)
        service.kill_main_process()
        wait_until(lambda: inspect(service.container())["State"]["StartedAt"] != started, engine.SECONDS)
        seconds = until_health(service, "healthy")
        before = len(callers.answers)
        wait_until(lambda: len(callers.answers) > before + 50)
    print(f"killed: healthy again {seconds:.1f} s after docker had started it; {len(callers.failures)} calls failed")
    assert {status for status, _ in callers.answers} == {200}


def test_stopped_it_finishes_what_is_in_flight(service: Project) -> None:
    """SIGTERM: not ready at once, what is in flight is answered, and the exit code is 0."""
    url, codes = service.url(), []
    body = {"instances": [[rounds_for(NAP)]]}

    def ask() -> None:
        codes.append(requests.post(f"{url}/v1/models/napper:predict", json=body, timeout=90).status_code)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    assert not codes  # they are in flight
    stopping = threading.Thread(target=service.compose, args=("stop", "service"))
    stopping.start()
    wait_until(lambda: requests.get(url + "/health/ready", timeout=30).status_code == 503)
    answer = requests.post(url + HOURS, json={"instances": [[4]]}, timeout=30)  # the delay in which proxies notice
    for thread in [*threads, stopping]:
        thread.join()
    assert codes == [200] * 2
    assert answer.status_code == 200
    assert inspect(service.container())["State"]["ExitCode"] == 0
    service.up()
