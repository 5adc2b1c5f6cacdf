"""A real server under light load, and what its clients see while something happens to it."""

import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import requests

from tests import fakes
from tests.servers import Server
from tests.traffic import Client, Models, add
from tests.wire import open_wires

CLIENTS, PAUSE = 3, 0.03  # about a hundred requests/s
WORKERS = 2
TIMEOUT = 3  # seconds of a request
FLAGS = (
    "--workers",
    str(WORKERS),
    "--request-timeout",
    str(TIMEOUT),
    "--reload-interval",
    "0.4",
    "--access-log",
    "false",
)
RECOVERY_SECONDS = 60.0
AFTER_SECONDS = 0.5  # of load, when all is well again


class SkippedError(Exception):
    """A fault cannot be had here."""


@dataclass
class Row:
    """What came of a fault."""

    fault: str
    sent: int = 0
    wrong: int = 0
    hung: int = 0
    errors: int = 0  # answers 500 to 599
    closed: int = 0  # connections that ended without an answer, or could not be opened
    slowest: float = 0.0  # seconds until an answer, or the end of the connection
    recovered: float = 0.0  # seconds after the end of the fault, or after its begin if it does not end by itself
    skipped: str = ""
    problem: str = ""

    @property
    def is_good(self) -> bool:
        """Whether nothing was wrong or hung, and the service recovered."""
        return bool(self.skipped) or not (self.wrong or self.hung or self.problem)


class Rig:
    """A server with two workers and an engine; a context manager.

    Args:
        folder: of the test's own, for the models.
        flags: more of them.
        environment: more of it.
    """

    def __init__(self, folder: Path, *flags: str, environment: Mapping[str, str] | None = None) -> None:
        self.root = folder / "models"
        for fake in (fakes.doubler().only("onnx"), fakes.coin().only("onnx"), fakes.heavy()):
            if not (self.root / fake.name).exists():
                fakes.write_version(self.root, fake)
        self.models = Models(self.root)
        self.server = Server(self.root, *FLAGS, *flags, environment=environment)

    def __enter__(self) -> Self:
        """Wait until the server serves."""
        self.server.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the server."""
        if error is not None:
            self.server.kill()
        self.server.__exit__(kind, error, traceback)

    def suffer(self, fault: str, act: Callable[[], object], is_over: Callable[[], bool] = lambda: True) -> Row:
        """Let something happen under load, wait until all is well, and return what the clients saw.

        Args:
            fault: its name.
            act: returns when it is over, or has been done.
            is_over: what must be true, too, before all is well.
        """
        done = threading.Event()
        clients = [Client(lambda: self.server.url, self.models, number, 0.0, done, PAUSE) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        time.sleep(AFTER_SECONDS)
        problem = ""
        try:
            act()
            began = time.monotonic()
            while not (self.is_well() and is_over()):
                if time.monotonic() - began > RECOVERY_SECONDS:
                    problem = f"not well again after {RECOVERY_SECONDS:.0f} s"
                    break
                time.sleep(0.05)
            recovered = time.monotonic() - began
            time.sleep(AFTER_SECONDS)
        finally:
            done.set()
            for client in clients:
                client.join()
        record = add([client.record for client in clients])
        misjudged = [sentence for sentence in record.misjudged if "was answered 504" not in sentence]
        errors = sum(count for status, count in record.answered.items() if status >= 500)
        wrong = self.models.count_wrong(record.asked) + len(misjudged)
        closed = record.closed + record.refused_connections
        problem = problem or next(iter(misjudged), "")
        row = Row(fault, record.sent, wrong, record.hung, errors, closed, record.slowest, recovered, problem=problem)
        print(describe(row), flush=True)
        if problem:
            print(self.server.log()[-3000:], flush=True)
        return row

    def is_well(self) -> bool:
        """Tell whether all workers are there, and every model is ready and answers on several connections."""
        with suppress(requests.RequestException, psutil.Error):
            answers = [self._ask(model) for model in ("doubler", "coin", "heavy") for _ in range(2)]
            ready = requests.get(f"{self.server.url}/health/ready", timeout=TIMEOUT).status_code
            return {ready, *answers} == {200} and len(self.server.workers()) == WORKERS
        return False

    def _ask(self, model: str) -> int:
        url = f"{self.server.url}/v1/models/{model}:predict"
        return requests.post(
            url, json={"instances": [[1.0] * (2 if model == "coin" else 1)]}, timeout=TIMEOUT
        ).status_code

    def serves(self, version: int) -> bool:
        """Tell whether all workers serve a version of the doubler as its latest."""
        with suppress(requests.RequestException):
            for _ in range(6):
                reply = requests.get(f"{self.server.url}/v1/models/doubler", timeout=TIMEOUT)
                if version not in [int(each) for each in reply.json()["versions"]]:
                    return False
            return True
        return False

    def publish(self, version: int) -> Path:
        """Write a version of the doubler that gives the same answers."""
        return fakes.write_version(self.root, fakes.doubler(version=version).only("onnx"))

    def find(self, name: str) -> psutil.Process:
        """Return a process by its name."""
        if name == "supervisor":
            return psutil.Process(self.server.process.pid)
        return next(each for each in self.server.members() if each.name().startswith(name))

    @contextmanager
    def connected(self, count: int = 8) -> Iterator[None]:
        """Hold connections that say nothing."""
        with open_wires(self.server.url, count):
            yield


def describe(row: Row) -> str:
    """Return a line of the table."""
    if row.skipped:
        return f"{row.fault:<44}skipped: {row.skipped}"
    return (
        f"{row.fault:<44}{row.sent:>7}{row.wrong:>7}{row.hung:>6}{row.errors:>6}{row.closed:>8}"
        f"{row.slowest:>9.1f}{row.recovered:>11.1f}  {row.problem[:100]}"
    )


HEADER = f"{'fault':<44}{'sent':>7}{'wrong':>7}{'hung':>6}{'5xx':>6}{'closed':>8}{'slowest':>9}{'recovered':>11}"


@contextmanager
def mounted(folder: Path, *arguments: str) -> Iterator[Path]:
    """Mount something on a folder, a small tmpfs by default.

    Raises:
        SkippedError: that is not permitted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", *(arguments or ("-t", "tmpfs", "-o", "size=256k", "tmpfs")), str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        raise SkippedError("mounting is not permitted")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


def find_program(name: str, package: str) -> str:
    """Return where a program is.

    Raises:
        SkippedError: nowhere.
    """
    found = shutil.which(name)
    if found is None:
        raise SkippedError(f"{name} is not installed (Debian: {package})")
    return found
