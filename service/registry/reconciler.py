"""Keeps what is served equal to what stands in the folder, and to what the workers have agreed on.

One worker looks at the folder, twice in every `--reload-interval`; what has changed there, or a worker was told to
load, unload or roll back, is agreed on. Every worker then prepares it in a thread, waits for the others, and commits.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from service.errors import DeadlineExceededError, InvalidRequestError, ModelRefusedError, NotFoundError
from service.registry.coordination import Coordination, State, WorkerStatus
from service.registry.model_folder import Slot, digest, list_slots, look, save_settings
from service.registry.registry import Registry, give_back_memory
from service.registry.versions import NO_FAILURES, Failures
from service.settings import Settings

logger = logging.getLogger("service")

CHANGE_SECONDS = 30.0
RETRY_SECONDS = 1.0
POLL_SECONDS = 0.1  # while others are waited for: one that dies rings no bell


class Reconciler:
    """One worker's reconciler; all methods belong to the event loop.

    Args:
        registry: with what was in the folder at `generation`.
        settings: how to run.
        coordination: with the other workers.
        generation: that the registry was loaded in.
    """

    def __init__(self, registry: Registry, settings: Settings, coordination: Coordination, generation: int = 0) -> None:
        self.registry = registry
        self._settings = settings
        self._agreement = coordination
        self._generation = generation
        self._looked_at = time.monotonic()
        self._trouble = ""
        self._bell = asyncio.Event()
        self._report(generation, generation)

    async def run(self) -> None:
        """Look after the registry until cancelled."""
        while True:
            try:
                with self._agreement.listen(asyncio.get_running_loop(), self._bell.set):
                    await self._keep_listening()
            except Exception:  # a worker that no longer follows would hold up every change
                logger.exception("the other workers cannot be heard; trying again")
                await asyncio.sleep(RETRY_SECONDS)

    async def _keep_listening(self) -> None:
        interval = self._settings.reload_interval / 2 or None  # half for the look, half for loading
        self.registry.speaks = self._agreement.leads()  # one worker for all
        if self.registry.speaks:
            self.registry.tell_served()
            self.registry.tell_strays()
        while True:
            try:
                await self._keep_up()
                await self._look()
            except Exception as error:  # whatever is wrong with the folder, what is served goes on
                self._complain(error)
            await self._wait_for_bell(interval)

    async def _keep_up(self) -> None:
        while (state := self._agreement.read_state()).generation != self._generation:
            await self._follow(state)

    async def _follow(self, state: State) -> None:
        """Prepare what was agreed on, and commit it when all workers can."""
        loop, generation = asyncio.get_running_loop(), state.generation
        try:
            change = await loop.run_in_executor(None, self.registry.prepare, state.unloaded, state.patient)
        except BaseException:
            self._generation = generation
            self._report(generation, generation)  # the others need not wait
            raise
        self._report(generation, self._generation, Failures(change.refused, change.doubted))
        until = loop.time() + CHANGE_SECONDS
        while not self._agreement.is_prepared(generation) and loop.time() < until:
            await self._wait_for_bell(POLL_SECONDS)
        self.registry.speaks = self._agreement.leads()
        self.registry.commit(change, self._agreement.read_failures())
        self._generation = generation
        self._report(generation, generation, Failures(change.refused, change.doubted))
        self._trouble = ""
        if not state.patient and self.registry.speaks:
            self.registry.tell_strays()
        del change
        await loop.run_in_executor(None, give_back_memory)

    async def _look(self) -> None:
        interval, now = self._settings.reload_interval, time.monotonic()
        if not interval or now - self._looked_at < interval / 2 or not self._agreement.leads():
            return
        self._looked_at = now
        seen = await asyncio.get_running_loop().run_in_executor(None, look, self._settings.models_dir)
        if seen != self.registry.seen or not self._agreement.is_settled():
            self._agreement.change(lambda unloaded: unloaded, patient=True)
        else:  # nobody is copying anything any more
            self._trouble = ""
            self.registry.tell_strays()

    async def _wait_for_bell(self, seconds: float | None) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._bell.wait()
        self._bell.clear()

    def _report(self, prepared: int, committed: int, failures: Failures = NO_FAILURES) -> None:
        self._agreement.report(WorkerStatus(prepared, committed, failures, digest(self.registry.seen)))

    def _complain(self, error: Exception) -> None:
        """Log a trouble once, not at every look."""
        if str(error) != self._trouble:
            self._trouble = str(error)
            if isinstance(error, OSError):
                logger.error("the models folder cannot be read: %s; what was served before goes on", error)
            else:
                logger.exception("the models folder could not be looked at")

    async def load(self, name: str) -> None:
        """Serve what stands in the folder of a model, on every worker.

        Raises:
            NotFoundError: nothing does.
            InvalidRequestError: no version of it passes its checks.
        """
        self._check_exists(name)
        await self._agree(lambda unloaded: unloaded - {name})
        model = self.registry.models.get(name)
        if model is None or not model.versions:
            raise InvalidRequestError(f"failed to load '{name}': {model.reason if model else 'it has no version'}")

    async def unload(self, name: str) -> None:
        """Stop serving a model on every worker, until it is loaded again.

        Raises:
            NotFoundError: there is none of that name.
        """
        self._check_exists(name)
        await self._agree(lambda unloaded: unloaded | {name})

    async def roll_back(self, name: str, version: object = None) -> None:
        """Make an earlier version the latest: the one given, else the one before that which is the latest now.

        Raises:
            NotFoundError: there is no such model or version.
            InvalidRequestError: there is no earlier version, or the folder cannot be written.
        """
        latest = self.registry.get(name).manifest.version
        versions = self.registry.models[name].versions
        if version is None:
            earlier = [number for number in versions if number < latest]
            if not earlier:
                raise InvalidRequestError(f"'{name}' has no served version before {latest}")
            target = max(earlier)
        else:
            target = self.registry.get(name, str(version)).manifest.version
        try:
            save_settings(self._settings.models_dir, name, {"latest": target})
        except ModelRefusedError as error:  # they are malformed, and what they say is not thrown away
            raise InvalidRequestError(f"'{name}' cannot be rolled back: {error}") from error
        await self._agree(lambda unloaded: unloaded)

    def list_unloaded(self) -> list[Slot]:
        """Return the versions that stand in the folder and are not served because their model has been unloaded."""
        unloaded = self._agreement.read_state().unloaded
        return [slot for slot in self._list_slots() if slot.name in unloaded] if unloaded else []

    def _list_slots(self) -> list[Slot]:
        return list_slots(self._settings.models_dir, self._settings.model_name)

    def _check_exists(self, name: str) -> None:
        if not any(slot.name == name for slot in self._list_slots()):
            raise NotFoundError(f"Request for unknown model: '{name[:80]}' has no version in the models folder")

    async def _agree(self, update: Callable[[frozenset[str]], frozenset[str]]) -> None:
        """Change what is agreed on, and return when every worker has committed it."""
        generation = self._agreement.change(update)
        until = time.monotonic() + CHANGE_SECONDS
        while self._generation < generation or not self._agreement.is_committed(generation):
            if time.monotonic() > until:
                raise DeadlineExceededError(f"not every worker has followed within {CHANGE_SECONDS:.0f} s")
            await asyncio.sleep(POLL_SECONDS / 10)
