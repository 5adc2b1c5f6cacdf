"""Tests of service.hosts.supervisor: workers are small functions, each supervisor runs in a process of its own."""

import errno
import logging
import multiprocessing as mp
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from service.errors import StartError
from service.hosts import supervisor
from service.hosts.supervisor import Supervisor, Timeouts, WorkerContext
from tests.wire import wait_until

_spawn = mp.get_context("spawn")


def beat(context: WorkerContext) -> None:
    """Become ready and send heartbeats until SIGTERM."""
    context.report_ready()
    logging.getLogger("service").info("%s is ready", context.device)
    while True:
        context.heartbeat()
        time.sleep(0.02)


def stall(context: WorkerContext) -> None:
    """Become ready, and never send a heartbeat."""
    context.report_ready()
    time.sleep(60)


def ignore_sigterm(context: WorkerContext) -> None:
    """Become ready, and ignore the request to drain."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    beat(context)


def refuse(_: WorkerContext) -> None:
    """Fail with a start error."""
    raise StartError("there is no such folder")


def crash(_: WorkerContext) -> None:
    """Fail with an error that nobody expects."""
    raise ValueError("a bug")


def start_once(context: WorkerContext) -> None:
    """Become ready in the first process of a worker, and fail in all that follow."""
    mark = Path(os.environ["MARKS_DIR"], context.device)
    if mark.exists():
        refuse(context)
    mark.touch()
    beat(context)


def need_engine(context: WorkerContext) -> None:
    """Request an engine until it has run seven times, and only then become ready."""
    runs = Path(os.environ["MARKS_DIR"], "runs")
    while not runs.exists() or len(runs.read_text()) < 7:
        context.request_engine("engine-test")
        time.sleep(0.02)
    beat(context)


def run_engine(context: WorkerContext) -> None:
    """Become ready and die, six times; then end as an engine does that has nothing left to do."""
    runs = Path(os.environ["MARKS_DIR"], "runs")
    context.report_ready()
    with runs.open("a") as file:
        file.write("x")
    logging.getLogger("service").info("the one before ended with %d", context.previous_exit)
    if len(runs.read_text()) < 7:
        os.kill(os.getpid(), signal.SIGSEGV)


def fork_unless_told_not_to() -> int:
    """Fork; fail as the system does where there are too many processes, while a file says so."""
    marks = Path(os.environ["MARKS_DIR"])
    if (marks / "no-forks").exists():
        with (marks / "failures").open("a") as file:
            file.write("x")
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return _real_fork()


_real_fork = os.fork


def supervise(run_worker: Callable[[WorkerContext], None], devices: list[str], log: Path, grace: float) -> None:
    """Run a supervisor with short times, in the process of its own; log to a file."""
    logging.basicConfig(filename=log, level=logging.INFO, format="%(message)s", force=True)
    logger = logging.getLogger("service")
    supervisor.CHECK_SECONDS = 0.2
    supervisor.FIRST_PAUSE = 0.01
    os.fork = fork_unless_told_not_to
    timeouts = Timeouts(drain_delay=0.1, grace=grace, heartbeat=0.6)
    try:
        Supervisor(run_worker, devices, {"engine-test": run_engine}).run(
            lambda: logger.info("all ready"), lambda: logger.info("end listening"), timeouts
        )
    except StartError as error:
        logger.info("start error: %s", error)


class Supervised:
    """A supervisor in a process, and what it has logged."""

    def __init__(
        self, run_worker: Callable[[WorkerContext], None], devices: list[str], folder: Path, grace: float
    ) -> None:
        self.path = folder / "log"
        self.path.touch()
        self.process = _spawn.Process(target=supervise, args=(run_worker, devices, self.path, grace))
        self.process.start()

    def lines(self) -> list[str]:
        """Return the lines logged so far."""
        return self.path.read_text().splitlines()

    def wait_for(self, line: str, count: int = 1) -> None:
        """Wait until a line has been logged that many times."""
        wait_until(lambda: self.lines().count(line) >= count)

    def workers(self) -> list[psutil.Process]:
        """Return the worker processes."""
        return psutil.Process(self.process.pid).children()

    def stop(self, *numbers: int) -> None:
        """Send signals, more than an echo apart, and wait for the end."""
        assert self.process.pid is not None
        for number in numbers:
            os.kill(self.process.pid, number)
            time.sleep(supervisor.ECHO_SECONDS + 0.1 if len(numbers) > 1 else 0)
        self.process.join(20)
        assert self.process.exitcode == 0


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Supervised]]:
    """A function that starts a supervisor; it is killed at the end of the test, and its workers end with it."""
    monkeypatch.setenv("MARKS_DIR", str(tmp_path))
    started: list[Supervised] = []

    def start_one(run_worker: Callable[[WorkerContext], None], *devices: str, grace: float = 2.0) -> Supervised:
        started.append(Supervised(run_worker, list(devices), tmp_path, grace))
        return started[-1]

    yield start_one
    for each in started:
        each.process.kill()
        each.process.join()


def test_workers_run_on_their_devices_until_a_signal(start: Callable[..., Supervised]) -> None:
    """Each device has its worker; ready is announced once; SIGTERM drains, and listening ends then."""
    supervised = start(beat, "cuda:0", "cuda:1", "cuda:0")
    supervised.wait_for("all ready")
    assert len(supervised.workers()) == 3
    supervised.stop(signal.SIGTERM)
    assert sorted(supervised.lines()[:4]) == ["all ready", "cuda:0 is ready", "cuda:0 is ready", "cuda:1 is ready"]
    assert supervised.lines()[4:] == ["received SIGTERM, draining", "end listening"]


def test_dead_worker_is_replaced(start: Callable[..., Supervised]) -> None:
    """A killed worker is started again on its device; the others stay, and ready is not announced twice."""
    supervised = start(beat, "cuda:0", "cuda:1")
    supervised.wait_for("all ready")
    victim, other = sorted(supervised.workers(), key=lambda process: process.pid)
    victim.kill()
    supervised.wait_for("cuda:0 is ready", 2)
    assert "worker-0 ended with code -9; starting another" in supervised.lines()
    assert other in supervised.workers()
    assert len(supervised.workers()) == 2
    supervised.stop(signal.SIGINT)
    assert supervised.lines().count("all ready") == 1
    assert "received SIGINT, draining" in supervised.lines()


def test_worker_without_heartbeat_is_killed(start: Callable[..., Supervised]) -> None:
    """A worker that sends no heartbeat for the time given is killed and replaced."""
    supervised = start(stall, "cpu")
    supervised.wait_for("worker-0 has not responded for 1 s; killing it")
    supervised.wait_for("worker-0 ended with code -9; starting another")
    supervised.stop(signal.SIGTERM)


@pytest.mark.parametrize(("worker", "reason"), [(refuse, "there is no such folder"), (crash, "ValueError: a bug")])
def test_first_worker_that_fails_ends_the_start(
    worker: Callable[[WorkerContext], None], reason: str, start: Callable[..., Supervised]
) -> None:
    """Nothing is retried before everything was ready once; only an unexpected error has a traceback."""
    supervised = start(worker, "cpu")
    supervised.process.join(20)
    assert reason in supervised.lines()
    assert any(line.startswith("Traceback") for line in supervised.lines()) == (worker is crash)
    assert supervised.lines()[-1] == "start error: a worker could not be started; the reason is above"


def test_worker_that_cannot_be_started_again_ends_the_service(start: Callable[..., Supervised]) -> None:
    """After five attempts without any ready worker the supervisor gives up; the reason is logged once."""
    supervised = start(start_once, "cpu")
    supervised.wait_for("all ready")
    time.sleep(supervisor.SETTLED_SECONDS)
    supervised.workers()[0].kill()
    supervised.process.join(20)
    assert supervised.lines()[-1] == "start error: no worker could be started in 5 attempts; the reason is above"
    assert supervised.lines().count("there is no such folder") == 1
    assert supervised.lines().count("worker-0 died while starting; retrying with increasing pauses") == 1


@pytest.mark.parametrize(("signals", "grace", "least"), [(1, 2.0, 3.0), (2, 60.0, 0.0)])
def test_worker_that_does_not_drain_is_killed(
    signals: int, grace: float, least: float, start: Callable[..., Supervised]
) -> None:
    """After the grace, or at once on a second signal, a worker that still runs is killed."""
    supervised = start(ignore_sigterm, "cpu", grace=grace)
    supervised.wait_for("all ready")
    began = time.monotonic()
    supervised.stop(*[signal.SIGTERM] * signals)
    assert time.monotonic() - began > least
    assert supervised.lines()[-1] == "worker-0 did not end in time and was killed"


def test_workers_end_with_their_parent(start: Callable[..., Supervised]) -> None:
    """A supervisor that is killed leaves no worker, not even one that ignores SIGTERM."""
    supervised = start(ignore_sigterm, "cpu", "cpu")
    supervised.wait_for("all ready")
    workers = supervised.workers()
    supervised.process.kill()
    supervised.process.join()
    wait_until(lambda: not any(worker.is_running() for worker in workers))


def test_engine_runs_when_it_is_requested_and_ends_nothing_else(start: Callable[..., Supervised]) -> None:
    """An engine that crashes again and again while the workers start is started again; one that is done is not."""
    supervised = start(need_engine, "cpu")
    supervised.wait_for("all ready")
    assert supervised.lines().count("engine-test ended with code -11; starting another") == 6
    assert supervised.lines().count("the one before ended with -11") == 6
    wait_until(lambda: [worker.name() for worker in supervised.workers()] == ["worker-0"])
    supervised.stop(signal.SIGTERM)


def test_supervisor_that_cannot_fork_goes_on_trying(start: Callable[..., Supervised], tmp_path: Path) -> None:
    """The other workers go on meanwhile, it is logged once, and no file stays open for what could not be started."""
    supervised = start(beat, "cuda:0", "cuda:1")
    supervised.wait_for("all ready")
    victim, other = sorted(supervised.workers(), key=lambda process: process.pid)
    process = psutil.Process(supervised.process.pid)
    before = process.num_fds()
    (tmp_path / "no-forks").touch()
    victim.kill()
    wait_until(lambda: (tmp_path / "failures").exists() and len((tmp_path / "failures").read_text()) >= 6)
    assert supervised.workers() == [other]
    assert process.num_fds() <= before
    (tmp_path / "no-forks").unlink()
    supervised.wait_for("cuda:0 is ready", 2)
    sentence = f"worker-0 cannot be started: {os.strerror(errno.EAGAIN)}; retrying with increasing pauses"
    assert supervised.lines().count(sentence) == 1
    wait_until(lambda: process.num_fds() == before)
    supervised.stop(signal.SIGTERM)


def test_supervisor_that_cannot_fork_at_the_start_says_so(start: Callable[..., Supervised], tmp_path: Path) -> None:
    """Whoever starts the service hears the reason, rather than waiting for it."""
    (tmp_path / "no-forks").touch()
    supervised = start(beat, "cpu")
    supervised.process.join(20)
    assert supervised.lines() == [f"start error: a worker could not be started: {os.strerror(errno.EAGAIN)}"]
