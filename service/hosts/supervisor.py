"""Workers and engines: processes forked after the imports, restarted when they die, ended with their parent.

Forking after the imports shares their memory and starts a worker in a fraction of a second. The parent waits on the
sentinels of its workers, so it sees a death at once. A worker that dies before it is ready is retried with increasing
pauses.
"""

import contextlib
import logging
import math
import multiprocessing as mp
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from service.errors import StartError
from service.telemetry import metrics, shared_metrics

logger = logging.getLogger("service")

FIRST_PAUSE = 0.1  # seconds before a worker that died while starting is retried; doubled each time
LONGEST_PAUSE = 5.0
SETTLED_SECONDS = 1.0  # a worker that dies sooner after it was ready counts as one that could not be started
MAX_FAILURES = 5  # in a row, with no other worker ready: then the service ends, so that its own supervisor notices
CHECK_SECONDS = 1.0  # between checks of the heartbeats
ECHO_SECONDS = 0.5  # a signal that follows another within this time is a copy of it
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_READY = "ready"  # a message of a worker; any other is the name of an engine that it needs
_fork = mp.get_context("fork")


class WorkerContext(NamedTuple):
    """What a worker process gets from its supervisor."""

    device: str
    report_ready: Callable[[], None]  # to be called once, when the worker can serve
    heartbeat: Callable[[], None]  # to be called from its event loop at least once a second
    previous_exit: int  # how the process before it ended: 0 where there was none, negative for a signal
    request_engine: Callable[[str], None]  # has the engine of that name started, if it is not running
    number: int  # among all processes, counted from 0; a successor has that of the process before it


Run = Callable[[WorkerContext], None]


class Timeouts(NamedTuple):
    """Limits of a worker, in seconds."""

    drain_delay: float  # from a signal until listening ends
    grace: float  # for the requests that are then in flight
    heartbeat: float  # without a heartbeat, after which a worker is killed


@dataclass
class _Worker:
    """One worker or engine, across the processes that run it in turn."""

    index: int
    name: str
    device: str
    run: Run
    is_engine: bool = False
    process: BaseProcess | None = None
    pipe: Connection | None = None  # the process reports on it that it is ready
    ready: bool = False
    failures: int = 0
    was_ready: bool = True  # of the process before
    ready_at: float = 0.0
    start_at: float = 0.0
    heartbeats: int = 0  # at the last check
    silent: float = 0.0  # seconds without a heartbeat
    previous_exit: int = 0
    problem: str | None = ""  # why no process could be forked for it the last time


class Supervisor:
    """Keeps one worker process running for each device given, and engine processes while they are needed.

    Args:
        run_worker: what a worker does, in its own process; when it returns, the process ends. It may raise
            `StartError`, whose message is logged without a traceback.
        devices: the device of each worker; a device may be given several times.
        engines: what each engine does, by its name, once it is requested; it may return when it has nothing left to
            do. Its death at any time ends nothing else.
    """

    def __init__(self, run_worker: Run, devices: Sequence[str], engines: Mapping[str, Run] | None = None) -> None:
        self._workers = [
            _Worker(index, name, "cpu", run, is_engine=True, start_at=math.inf)
            for index, (name, run) in enumerate((engines or {}).items())
        ]  # before the workers, so that they start first
        first = len(self._workers)
        self._workers += [
            _Worker(first + number, f"worker-{number}", device, run_worker) for number, device in enumerate(devices)
        ]
        self._heartbeats = _fork.RawArray("Q", len(self._workers))
        shared_metrics.share(len(self._workers))
        self._checked_at = 0.0
        self._lifeline = os.pipe()  # only the parent keeps the write end open, so workers see EOF when it dies
        self._signals = 0
        self._signalled_at = 0.0
        self._signal = ""
        self._announced = False

    def request(self, name: str) -> None:
        """Have the engine of that name started, if it is not running; nothing happens where there is none."""
        for engine in self._workers:
            if engine.is_engine and engine.name == name and engine.start_at == math.inf:
                engine.start_at = time.monotonic()

    def run(
        self,
        announce: Callable[[], None],
        end_listening: Callable[[], None],
        timeouts: Timeouts,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Keep the workers running until SIGTERM or SIGINT, then drain them; a second signal kills them.

        Args:
            announce: called once, when all workers are ready.
            end_listening: called when no new connection may be accepted any more.
            timeouts: of the workers.
            check: called about once a second.

        Raises:
            StartError: no worker can be started.
        """
        wake, waker = mp.Pipe(duplex=False)

        def stop(number: int, frame: FrameType | None) -> None:
            del frame
            now = time.monotonic()
            if self._signals and now - self._signalled_at < ECHO_SECONDS:
                return  # a copy: the process group got the signal, and `make` passed it on
            self._signals, self._signalled_at = self._signals + 1, now
            self._signal = self._signal or signal.Signals(number).name
            waker.send(None)

        for number in _SIGNALS:
            signal.signal(number, stop)
        try:
            while not self._signals:
                self._start_due()
                self._wait(wake)
                self._check_processes(announce)
                self._check_heartbeats(timeouts.heartbeat)
                check()
            self._drain(wake, end_listening, timeouts)
        finally:
            self._kill_all()
            for number in _SIGNALS:  # ignore further signals
                signal.signal(number, signal.SIG_IGN)

    def _start_due(self) -> None:
        now = time.monotonic()
        for worker in self._workers:
            if worker.process is None and worker.start_at <= now:
                try:
                    self._start(worker)
                except OSError as error:  # too many processes or open files, or too little memory, for the moment
                    self._postpone(worker, error)

    def _postpone(self, worker: _Worker, error: OSError) -> None:
        """Start a worker later that cannot be started now; the others go on.

        Raises:
            StartError: the service is only starting.
        """
        if not self._announced and not worker.is_engine:
            raise StartError(f"a worker could not be started: {error.strerror}") from error
        if worker.problem != error.strerror:
            worker.problem = error.strerror
            logger.error("%s cannot be started: %s; retrying with increasing pauses", worker.name, error.strerror)
        worker.start_at = time.monotonic() + min(FIRST_PAUSE * 2**worker.failures, LONGEST_PAUSE)
        worker.failures += 1
        if worker.pipe is not None:
            worker.pipe.close()
            worker.pipe = None

    def _start(self, worker: _Worker) -> None:
        worker.pipe, sender = mp.Pipe(duplex=False)
        context = WorkerContext(
            worker.device,
            partial(sender.send, _READY),
            partial(_count_heartbeat, self._heartbeats, worker.index),
            worker.previous_exit,
            sender.send,
            worker.index,
        )
        process = _fork.Process(
            target=_run_in_child,
            args=(worker.run, context, self._lifeline, not worker.was_ready),
            name=worker.name,
        )
        # Between the fork and the child's own handlers a signal would reach the parent's handler, and be lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            _check_fork()
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            sender.close()
        worker.process, worker.problem = process, ""

    def _wait(self, wake: Connection) -> None:
        """Return when a worker is ready or dead, one is due to start, or a signal has arrived."""
        waiting: list[Any] = [wake]
        waiting += [worker.pipe for worker in self._workers if worker.pipe]
        waiting += [worker.process.sentinel for worker in self._workers if worker.process]
        due = [worker.start_at for worker in self._workers if worker.process is None]
        now = time.monotonic()
        wait(waiting, max(0.0, min([*due, now + CHECK_SECONDS]) - now))

    def _check_processes(self, announce: Callable[[], None]) -> None:
        for worker in self._workers:
            if worker.pipe is not None and worker.pipe.poll():
                self._read(worker, worker.pipe)
            if worker.process is not None and not worker.process.is_alive():
                self._handle_death(worker, worker.process)
        if not self._announced and all(worker.ready for worker in self._workers if not worker.is_engine):
            self._announced = True
            announce()

    def _read(self, worker: _Worker, pipe: Connection) -> None:
        """Take a message of a worker: it is ready, or needs an engine."""
        try:
            message = pipe.recv()
        except EOFError:  # the process is ending
            pipe.close()
            worker.pipe = None
            return
        if message == _READY:
            worker.ready, worker.ready_at = True, time.monotonic()
        else:
            self.request(message)

    def _handle_death(self, worker: _Worker, process: BaseProcess) -> None:
        if self._signals:
            return
        shared_metrics.forget_live(worker.index)
        is_done = worker.is_engine and process.exitcode == 0
        if is_done:
            logger.debug("%s has nothing left to do", process.name)
        elif worker.ready:
            logger.error("%s ended with code %s; starting another", process.name, process.exitcode)
        elif not self._announced and not worker.is_engine:
            raise StartError("a worker could not be started; the reason is above")
        # An engine that was ready is ended by what it opens or runs, and that is refused to its successors.
        settled = worker.ready and (worker.is_engine or time.monotonic() - worker.ready_at > SETTLED_SECONDS)
        worker.failures = 0 if settled else worker.failures + 1
        others = [other for other in self._workers if other is not worker and not other.is_engine]
        if worker.failures >= MAX_FAILURES and not (worker.is_engine or any(other.ready for other in others)):
            raise StartError(f"no worker could be started in {MAX_FAILURES} attempts; the reason is above")
        pause = min(FIRST_PAUSE * 2 ** (worker.failures - 1), LONGEST_PAUSE) if worker.failures else 0.0
        if worker.was_ready and not worker.ready and not is_done:
            logger.error("%s died while starting; retrying with increasing pauses", process.name)
        if worker.pipe is not None:
            worker.pipe.close()
        worker.previous_exit = process.exitcode or 0
        process.close()
        worker.was_ready = worker.ready
        worker.process, worker.pipe, worker.ready = None, None, False
        worker.start_at = math.inf if is_done else time.monotonic() + pause
        if not is_done:
            metrics.record_restart()

    def _check_heartbeats(self, limit: float) -> None:
        """Kill workers whose event loop has been blocked for too long: nothing else would end their requests.

        Engines may take twice as long to start; how long a worker takes depends on its models.

        Silence is counted in checks, not read from the clock: a machine that was suspended has no silent workers.
        """
        now = time.monotonic()
        if now - self._checked_at < CHECK_SECONDS:
            return
        self._checked_at = now
        for worker in self._workers:
            count = self._heartbeats[worker.index]
            is_watched = worker.process is not None and (worker.ready or worker.is_engine)
            worker.silent = worker.silent + CHECK_SECONDS if is_watched and count == worker.heartbeats else 0.0
            worker.heartbeats = count
            if worker.silent >= limit * (1 if worker.ready else 2) and worker.process is not None:
                logger.error("%s has not responded for %.0f s; killing it", worker.process.name, worker.silent)
                worker.process.kill()
                worker.silent = 0.0

    def _drain(self, wake: Connection, end_listening: Callable[[], None], timeouts: Timeouts) -> None:
        logger.info("received %s, draining", self._signal)
        processes = [worker.process for worker in self._workers if worker.process is not None]
        for process in processes:
            process.terminate()
        wake.recv()
        self._wait_for_end(processes, wake, timeouts.drain_delay)
        end_listening()
        self._wait_for_end(processes, wake, timeouts.grace + 1)

    def _wait_for_end(self, processes: list[BaseProcess], wake: Connection, seconds: float) -> None:
        """Wait until the processes have ended, the time is up, or a second signal has arrived."""
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


def _check_fork() -> None:
    """Fork a process that ends at once: where it cannot be done, `Process.start` would leave four files open each time.

    Raises:
        OSError: there are too many processes, or there is too little memory.
    """
    if pid := os.fork():
        os.waitpid(pid, 0)
    else:
        os._exit(0)


def _count_heartbeat(heartbeats: Any, index: int) -> None:  # noqa: ANN401 - a shared array
    heartbeats[index] += 1


def _run_in_child(run: Run, context: WorkerContext, lifeline: tuple[int, int], is_retry: bool) -> None:
    """Run the worker in its process; end with the parent, and by signals until the worker handles them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent passes on SIGTERM
    signal.signal(signal.SIGTERM, _exit_at_once)  # until the HTTP server's handler is installed
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    os.close(lifeline[1])
    shared_metrics.use(context.number)
    with contextlib.suppress(OSError):  # what `ps` and `top` show; elsewhere than on Linux, it stays "python"
        Path("/proc/self/comm").write_text(mp.current_process().name)
    threading.Thread(target=_end_with_parent, args=lifeline[:1], daemon=True).start()
    try:
        run(context)
    except StartError as error:
        logger.log(logging.DEBUG if is_retry else logging.ERROR, "%s", error)  # once, however often it is retried
        sys.exit(1)
    except Exception:
        logger.exception("%s failed", mp.current_process().name)
        sys.exit(1)


def _exit_at_once(number: int, frame: FrameType | None) -> None:
    del number, frame
    os._exit(0)


def _end_with_parent(lifeline: int) -> None:
    os.read(lifeline, 1)  # nothing is ever written: this returns when the parent has ended
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)
    os._exit(1)
