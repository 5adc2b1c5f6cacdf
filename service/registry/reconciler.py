"""The reconciler keeps what a worker serves equal to the models folder and to what the workers have been asked for.

One worker, the leader, scans the folder twice in every `--reload-interval`. A change found there becomes a new
generation of the desired state, as does a load, an unload or a rollback. Every worker prepares it in a thread, waits
until all workers have, and commits it.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from service.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    ModelRefusedError,
    NotFoundError,
    UnavailableError,
)
from service.model.memory import release_memory
from service.registry.changes import log_changes, log_served
from service.registry.coordination import Coordination, DesiredState, Update, WorkerStatus
from service.registry.loading import Change
from service.registry.model_folder import Scan, VersionFolder, hash_scan, list_versions, save_settings, scan
from service.registry.registry import Registry
from service.registry.versions import NO_FAILURES, FailedVersions, VersionKey
from service.settings import Settings

logger = logging.getLogger("service")

CHANGE_SECONDS = 30.0
RETRY_SECONDS = 1.0
POLL_SECONDS = 1.0  # while other workers are waited for: one that dies notifies nobody
_FOLDER = VersionKey("", 0)  # stands for the whole folder among what failed in a worker


class Reconciler:
    """One worker's reconciler; all methods belong to the event loop.

    Args:
        registry: loaded from the models folder as `generation` demands.
        settings: how to run.
        coordination: with the other workers.
        generation: of the desired state that the registry was loaded for.
    """

    def __init__(self, registry: Registry, settings: Settings, coordination: Coordination, generation: int = 0) -> None:
        self.registry = registry
        self._settings = settings
        self._coordination = coordination
        self._generation = generation
        self._scanned_at = time.monotonic()
        self._notified = asyncio.Event()  # replaced by a new one at every notification
        self._last_error = ""
        self._failed = NO_FAILURES  # as reported last
        self._warned: tuple[str, ...] = ()
        self._report(generation, registry.scan)

    async def run(self) -> None:
        """Follow changes until cancelled."""
        while True:
            try:
                with self._coordination.listen(asyncio.get_running_loop(), self._wake):
                    await self._run_listening()
            except Exception:  # a worker that no longer follows would hold up every change
                logger.exception("cannot listen to the other workers; retrying")
                await asyncio.sleep(RETRY_SECONDS)

    async def _run_listening(self) -> None:
        interval = self._settings.reload_interval / 2 or None  # half to find a change, half to load it
        if self._coordination.is_leader():
            log_served(self.registry.models)
            self._warn_misplaced()
        while True:
            notified = self._notified  # taken first: a notification during the work below ends the wait at once
            try:
                while (state := self._coordination.read_state()).generation != self._generation:
                    await self._follow(state)
                await self._scan()
            except Exception as error:  # whatever is wrong with the folder, the loaded versions are served
                self._log_error(error)
            await _wait(notified, interval)

    async def _follow(self, state: DesiredState) -> None:
        """Prepare a generation, and commit it once every worker has prepared it."""
        change = await self._prepare(state)
        await self._wait_until(lambda: self._coordination.is_prepared(state.generation))
        self._commit(change, state)
        del change
        await asyncio.get_running_loop().run_in_executor(None, release_memory)

    async def _prepare(self, state: DesiredState) -> Change:
        prepare, loop = self.registry.prepare, asyncio.get_running_loop()
        try:
            change = await loop.run_in_executor(None, prepare, state.unloaded, state.debounce)
        except BaseException as error:
            self._generation = state.generation  # the others need not wait; while it is pending, all will look again
            failed = FailedVersions(self._failed.refused, {**self._failed.pending, _FOLDER: str(error)})
            self._report(state.generation, self.registry.scan, failed)
            raise
        self._report(state.generation, change.scan, change.failed)
        return change

    def _commit(self, change: Change, state: DesiredState) -> None:
        before = self.registry.models
        change = change.exclude(self._coordination.read_failures())
        self.registry.commit(change)
        self._generation = state.generation
        self._report(state.generation, change.scan, change.failed)
        self._last_error = ""
        if self._coordination.is_leader():
            log_changes(before, self.registry.models)
            if not state.debounce:
                self._warn_misplaced()

    async def _scan(self) -> None:
        """Have every worker follow a change in the models folder, if it is time and this worker's job to look."""
        interval, now = self._settings.reload_interval, time.monotonic()
        if not interval or now - self._scanned_at < interval / 2 or not self._coordination.is_leader():
            return
        self._scanned_at = now
        found = await asyncio.get_running_loop().run_in_executor(None, scan, self._settings.models_dir)
        is_due = self.registry.retry_at <= now
        if is_due or found != self.registry.scan or not self._coordination.is_settled():
            self._coordination.change(lambda unloaded: unloaded, debounce=True)
        else:  # nothing is being copied any more
            self._last_error = ""
            self._warn_misplaced()

    def _report(self, prepared: int, scanned: Scan, failed: FailedVersions = NO_FAILURES) -> None:
        self._failed = failed
        self._coordination.report(WorkerStatus(prepared, self._generation, failed, hash_scan(scanned)))

    def _warn_misplaced(self) -> None:
        """Warn of models in the wrong place, once of each for as long as it is there."""
        for warning in self.registry.misplaced:
            if warning not in self._warned:
                logger.warning("%s", warning)
        self._warned = self.registry.misplaced

    def _log_error(self, error: Exception) -> None:
        """Log an error once, not at every scan."""
        if str(error) == self._last_error:
            return
        self._last_error = str(error)
        folder = self._settings.models_dir
        if isinstance(error, OSError):
            logger.error("models folder %s cannot be read: %s; keeping the loaded versions", folder, error)
        else:
            logger.exception("models folder %s cannot be reloaded; keeping the loaded versions", folder)

    def _wake(self) -> None:
        self._notified.set()
        self._notified = asyncio.Event()

    async def _wait_until(self, is_done: Callable[[], bool]) -> bool:
        """Check at every notification whether all workers are done; give up after `CHANGE_SECONDS`."""
        deadline = time.monotonic() + CHANGE_SECONDS
        while not is_done():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            await _wait(self._notified, min(left, POLL_SECONDS))
        return True

    async def load(self, name: str) -> None:
        """Serve what the folder of a model holds, on every worker.

        Raises:
            NotFoundError: it holds no version.
            InvalidRequestError: no version of it passes its checks.
            DeadlineExceededError: a worker has not followed in time.
        """
        self._check_exists(name)
        await self._change(lambda unloaded: unloaded - {name})
        model = self.registry.models.get(name)
        if model is None or not model.versions:
            raise InvalidRequestError(f"failed to load '{name}': {model.reason if model else 'it has no version'}")

    async def unload(self, name: str) -> None:
        """Stop serving a model on every worker, until it is loaded again.

        Raises:
            NotFoundError: the models folder has no model of that name.
            DeadlineExceededError: a worker has not followed in time.
        """
        self._check_exists(name)
        await self._change(lambda unloaded: unloaded | {name})

    async def roll_back(self, name: str, version: object = None) -> None:
        """Make an earlier version the latest: the one given, else the one before the present latest.

        Raises:
            NotFoundError: there is no such model or version.
            InvalidRequestError: there is no earlier version, or the model's settings cannot be written.
            DeadlineExceededError: a worker has not followed in time.
        """
        latest = self.registry.get(name).manifest.version
        if version is None:
            earlier = [number for number in self.registry.models[name].versions if number < latest]
            if not earlier:
                raise InvalidRequestError(f"'{name}' has no served version before {latest}")
            target = max(earlier)
        else:
            target = self.registry.get(name, str(version)).manifest.version
        try:
            save_settings(self._settings.models_dir, name, {"latest": target})
        except ModelRefusedError as error:  # they are malformed, and not to be overwritten
            raise InvalidRequestError(f"'{name}' cannot be rolled back: {error}") from error
        await self._change(lambda unloaded: unloaded)

    def list_unloaded(self) -> list[VersionFolder]:
        """Return the versions in the folder that are not served because their model has been unloaded."""
        unloaded = self._coordination.read_state().unloaded
        return [folder for folder in self._list_versions() if folder.name in unloaded] if unloaded else []

    def _list_versions(self) -> list[VersionFolder]:
        return list_versions(self._settings.models_dir, self._settings.model_name)

    def _check_exists(self, name: str) -> None:
        if not any(folder.name == name for folder in self._list_versions()):
            raise NotFoundError(f"Request for unknown model: '{name[:80]}' has no version in the models folder")

    async def _change(self, update: Update) -> None:
        """Change the desired state, and return once every worker has committed it."""
        generation = self._coordination.change(update)
        if not await self._wait_until(lambda: self._coordination.is_committed(generation)):
            raise DeadlineExceededError(f"not every worker applied the change within {CHANGE_SECONDS:.0f} s")
        if reason := self._coordination.read_failures().pending.get(_FOLDER):
            raise UnavailableError(f"the change waits until the models folder can be read: {reason}")


async def _wait(event: asyncio.Event, seconds: float | None) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
