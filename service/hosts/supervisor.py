"""Worker processes: forked once everything is imported, watched by their sentinels, started again when they die.

Forking after the imports shares memory and starts a worker in a fraction of a second. A worker's death is known at
once, not by a poll; one that dies before it is ready is tried again after a growing pause. Workers end when their
parent does. LitServe's part is the placement on devices (`LitServer`) and what a worker runs (`inference_worker`:
`LitAPI.setup(device)`, then the loop); its API server, manager process and queues are never started.
"""

import logging
import multiprocessing as mp
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, NamedTuple

import litserve as ls
from litserve.loops.loops import inference_worker
from litserve.utils import WorkerSetupStatus
from prometheus_client.multiprocess import mark_process_dead

from service.errors import StartError
from service.telemetry import metrics

logger = logging.getLogger("service")

FIRST_PAUSE = 0.1  # seconds before a worker that died while starting is tried again; doubled each time
LONGEST_PAUSE = 5.0
SETTLED_SECONDS = 1.0  # a worker that dies sooner after it was ready counts as one that could not be started
MAX_FAILURES = 5  # in a row, with no other worker ready: then the service ends, for whoever watches it to see
LOOK_SECONDS = 1.0  # between looks at the workers' pulses
ECHO_SECONDS = 0.5  # within which a signal is the one before, come by a second way
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_fork = mp.get_context("fork")


@dataclass
class _Worker:
    """One place for a worker process: who is in it, and the pipe by which it says that it is set up."""

    index: int
    device: str
    process: BaseProcess | None = None
    status: Connection | None = None
    ready: bool = False
    failures: int = 0
    was_ready: bool = True
    ready_at: float = 0.0
    start_at: float = 0.0
    pulse: int = 0
    silent: float = 0.0  # seconds, as far as looks at the pulse have shown


class _Status:
    """Stands for LitServe's table of worker states: writes what a worker says of itself into a pipe."""

    def __init__(self, sender: Connection) -> None:
        self._sender = sender

    def __setitem__(self, key: str, value: str) -> None:
        self._sender.send(value)


class Times(NamedTuple):
    """Seconds: from a signal to the end of listening, for requests in flight then, and of silence until a kill."""

    delay: float
    grace: float
    silence: float


class Supervisor(ls.LitServer):
    """LitServe's server with processes of its own; `run` is replaced by `supervise`."""

    def __init__(self, api: ls.LitAPI, accelerator: str, devices: Any, workers_per_device: int) -> None:  # noqa: ANN401
        super().__init__(api, accelerator, devices, workers_per_device, restart_workers=True, disable_openapi_url=True)
        self._api = api
        places = self._inference_workers_config_for_api(api.api_path)
        devices = [place[0] if isinstance(place, list) else place for place in places]
        self._workers = [_Worker(index, device) for index, device in enumerate(devices)]
        self._pulses = _fork.RawArray("Q", len(self._workers))
        self._looked_at = 0.0
        self._lifeline = os.pipe()  # the parent alone keeps its second end open: workers see it close
        self._signals = 0
        self._signalled_at = 0.0
        self._signal = ""
        self._announced = False

    def supervise(self, announce: Callable[[], None], end_listening: Callable[[], None], times: Times) -> None:
        """Keep the workers running until SIGTERM or SIGINT; a second signal ends them without grace.

        Args:
            announce: called once, when all workers are ready.
            end_listening: called when no new connection is to be taken any more.
            times: how long what may take.

        Raises:
            StartError: no worker can be started.
        """
        wake, waker = mp.Pipe(duplex=False)

        def stop(number: int, frame: FrameType | None) -> None:
            del frame
            now = time.monotonic()
            if self._signals and now - self._signalled_at < ECHO_SECONDS:
                return  # the same once more: `make` passes on what its whole group has been sent
            self._signals, self._signalled_at = self._signals + 1, now
            self._signal = self._signal or signal.Signals(number).name
            waker.send(None)

        for number in _SIGNALS:
            signal.signal(number, stop)
        try:
            while not self._signals:
                self._start_due()
                self._wait(wake)
                self._look_after(announce)
                self._check_pulses(times.silence)
            self._end_gently(wake, end_listening, times)
        finally:
            self._kill_all()
            for number in _SIGNALS:  # one more has nothing left to say
                signal.signal(number, signal.SIG_IGN)

    def _start_due(self) -> None:
        now = time.monotonic()
        for worker in self._workers:
            if worker.process is None and worker.start_at <= now:
                self._start(worker)

    def _start(self, worker: _Worker) -> None:
        worker.status, sender = mp.Pipe(duplex=False)
        self._api.retrying = not worker.was_ready
        self._api.pulse = partial(_beat, self._pulses, worker.index)
        worker.process = _fork.Process(
            target=_run_worker,
            args=(self._api, worker.device, worker.index, _Status(sender), self._callback_runner, self._lifeline),
            name=f"worker-{worker.index}",
        )
        # A signal between the fork and the child's own handlers would meet the parent's, and be lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        worker.process.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        sender.close()

    def _wait(self, wake: Connection) -> None:
        """Return when a worker is ready or dead, one is due to start, or a signal has come."""
        waiting: list[Any] = [wake]
        waiting += [worker.status for worker in self._workers if worker.status and not worker.ready]
        waiting += [worker.process.sentinel for worker in self._workers if worker.process]
        due = [worker.start_at for worker in self._workers if worker.process is None]
        now = time.monotonic()
        wait(waiting, max(0.0, min([*due, now + LOOK_SECONDS]) - now))

    def _look_after(self, announce: Callable[[], None]) -> None:
        for worker in self._workers:
            if worker.status is not None and not worker.ready and worker.status.poll():
                worker.ready = _receive(worker.status) == WorkerSetupStatus.READY
                worker.ready_at = time.monotonic()
            if worker.process is not None and not worker.process.is_alive():
                self._note_death(worker, worker.process)
        if not self._announced and all(worker.ready for worker in self._workers):
            self._announced = True
            announce()

    def _note_death(self, worker: _Worker, process: BaseProcess) -> None:
        if self._signals:
            return
        mark_process_dead(process.pid)  # type: ignore[no-untyped-call]
        if worker.ready:
            logger.error("%s ended with code %s; starting another", process.name, process.exitcode)
        elif not self._announced:
            raise StartError("a worker could not be started; its reason stands above")
        lived = worker.ready and time.monotonic() - worker.ready_at > SETTLED_SECONDS
        worker.failures = 0 if lived else worker.failures + 1
        if worker.failures >= MAX_FAILURES and not any(other.ready for other in self._workers if other is not worker):
            raise StartError(f"no worker could be started in {MAX_FAILURES} attempts; the reason stands above")
        pause = min(FIRST_PAUSE * 2 ** (worker.failures - 1), LONGEST_PAUSE) if worker.failures else 0.0
        if worker.was_ready and not worker.ready:
            logger.error("%s died while starting; it is tried again after growing pauses", process.name)
        if worker.status is not None:
            worker.status.close()
        process.close()
        worker.was_ready = worker.ready
        worker.process, worker.status, worker.ready = None, None, False
        worker.start_at = time.monotonic() + pause
        metrics.record_restart()

    def _check_pulses(self, silence: float) -> None:
        """Kill workers whose event loop has stood still for too long: nothing else would ever end their requests.

        Only looks count, not the clock: a machine that slept has no silent workers.
        """
        now = time.monotonic()
        if now - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = now
        for worker in self._workers:
            pulse = self._pulses[worker.index]
            worker.silent = worker.silent + LOOK_SECONDS if worker.ready and pulse == worker.pulse else 0.0
            worker.pulse = pulse
            if worker.silent >= silence and worker.process is not None:
                logger.error("%s has stood still for %.0f s and is killed", worker.process.name, worker.silent)
                worker.process.kill()
                worker.silent = 0.0

    def _end_gently(self, wake: Connection, end_listening: Callable[[], None], times: Times) -> None:
        logger.info("%s has come: finishing what is in flight", self._signal)
        processes = [worker.process for worker in self._workers if worker.process is not None]
        for process in processes:
            process.terminate()
        wake.recv()
        self._wait_for(processes, wake, times.delay)
        end_listening()
        self._wait_for(processes, wake, times.grace + 1)

    def _wait_for(self, processes: list[BaseProcess], wake: Connection, seconds: float) -> None:
        """Wait until the processes have ended, the time is over, or a second signal has come."""
        until = time.monotonic() + seconds
        while self._signals < 2 and (left := [process for process in processes if process.is_alive()]):  # noqa: PLR2004
            remaining = until - time.monotonic()
            if remaining <= 0:
                return
            wait([wake, *(process.sentinel for process in left)], remaining)

    def _kill_all(self) -> None:
        for worker in self._workers:
            if worker.process is not None and worker.process.is_alive():
                logger.error("%s did not end in time and was killed", worker.process.name)
                worker.process.kill()
                worker.process.join()


def _receive(connection: Connection) -> object:
    try:
        return connection.recv()
    except EOFError:
        return None


def _beat(pulses: Any, index: int) -> None:  # noqa: ANN401 - a shared array
    pulses[index] += 1


def _run_worker(
    api: ls.LitAPI, device: str, index: int, status: _Status, callbacks: object, lifeline: tuple[int, int]
) -> None:
    """Run in the child: LitServe's worker, ended by signals and with its parent."""
    # Ctrl-C reaches the whole group: until the HTTP server's own handler drains this worker, the parent alone decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _exit_at_once)  # until the HTTP server's own handler stands
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    os.close(lifeline[1])
    threading.Thread(target=_end_with_parent, args=lifeline[:1], daemon=True).start()
    inference_worker(api, device, index, None, None, status, callbacks, True)


def _exit_at_once(number: int, frame: FrameType | None) -> None:
    del number, frame
    os._exit(0)


def _end_with_parent(lifeline: int) -> None:
    os.read(lifeline, 1)  # nothing is ever written: this returns when the parent has ended
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)
    os._exit(1)
