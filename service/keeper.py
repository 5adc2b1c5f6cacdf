"""Keeps what is served equal to what stands in the folder, and to what the workers have agreed on.

It looks at the folder every `--reload-interval`, and at once when a worker was told to load, unload or roll back. The
work is done in a thread; the event loop only looks at a number four times a second.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from service.agreement import Agreement
from service.errors import DeadlineExceededError, InvalidRequestError, ModelRefusedError, NotFoundError
from service.repository import Repository
from service.settings import Settings
from service.shelf import Slot, list_slots, save_settings

logger = logging.getLogger("service")

LOOK_SECONDS = 0.25
CHANGE_SECONDS = 30.0


class Keeper:
    """One worker's keeper; all methods belong to the event loop."""

    def __init__(self, repository: Repository, settings: Settings, agreement: Agreement) -> None:
        self.repository = repository
        self._settings = settings
        self._agreement = agreement
        self._generation = 0  # whatever was agreed on while the models were being loaded is looked at first
        self._looked_at = time.monotonic()

    async def keep(self) -> None:
        """Look after the repository until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self._look()
            except Exception:  # whatever is wrong with the folder, what is served goes on
                logger.exception("the models folder could not be looked at")

    async def _look(self) -> None:
        interval = self._settings.reload_interval
        state = self._agreement.read()
        now = time.monotonic()
        if state.generation == self._generation and not (interval and now - self._looked_at >= interval):
            return
        patient = state.generation == self._generation  # nobody has asked, it is only time to look
        loop = asyncio.get_running_loop()
        changed = await loop.run_in_executor(None, self.repository.refresh, state.unloaded, patient)
        self._looked_at = now
        if changed and state.generation == self._generation:  # the first to see it: the others need not wait
            generation = self._agreement.change(lambda unloaded: unloaded)
            if generation == state.generation + 1:  # else another was agreed on meanwhile, and is looked at next
                self._generation = generation
                self._agreement.confirm(generation)
        elif state.generation != self._generation:
            self._generation = state.generation
            self._agreement.confirm(state.generation)

    async def load(self, name: str) -> None:
        """Serve what stands in the folder of a model, on every worker.

        Raises:
            NotFoundError: nothing does.
            InvalidRequestError: no version of it passes its checks.
        """
        self._check_exists(name)
        await self._agree(lambda unloaded: unloaded - {name})
        model = self.repository.models.get(name)
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
        latest = self.repository.get(name).manifest.version
        versions = self.repository.models[name].versions
        if version is None:
            earlier = [number for number in versions if number < latest]
            if not earlier:
                raise InvalidRequestError(f"'{name}' has no served version before {latest}")
            target = max(earlier)
        else:
            target = self.repository.get(name, str(version)).manifest.version
        try:
            save_settings(self._settings.models_dir, name, {"latest": target})
        except ModelRefusedError as error:  # they are malformed, and what they say is not thrown away
            raise InvalidRequestError(f"'{name}' cannot be rolled back: {error}") from error
        await self._agree(lambda unloaded: unloaded)

    def list_unloaded(self) -> list[Slot]:
        """Return the versions that stand in the folder and are not served because their model has been unloaded."""
        unloaded = self._agreement.read().unloaded
        return [slot for slot in self._list_slots() if slot.name in unloaded] if unloaded else []

    def _list_slots(self) -> list[Slot]:
        return list_slots(self._settings.models_dir, self._settings.model_name)

    def _check_exists(self, name: str) -> None:
        if not any(slot.name == name for slot in self._list_slots()):
            raise NotFoundError(f"Request for unknown model: '{name[:80]}' has no version in the models folder")

    async def _agree(self, update: Callable[[frozenset[str]], frozenset[str]]) -> None:
        """Change the shared state and return when every worker serves what it wants."""
        generation = self._agreement.change(update)
        until = time.monotonic() + CHANGE_SECONDS
        while self._generation < generation or not self._agreement.is_reached(generation):
            if time.monotonic() > until:
                raise DeadlineExceededError(f"not every worker has followed within {CHANGE_SECONDS:.0f} s")
            await asyncio.sleep(LOOK_SECONDS / 5)
