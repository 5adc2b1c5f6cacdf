"""Open versions on the device of an engine: on the CPU what the checker has verified, on a GPU what passes there."""

import logging
import os
from functools import cache
from pathlib import Path

from service.errors import DeviceLostError, ModelRefusedError, ServiceError
from service.model import channel
from service.model.checker import choose_rows
from service.model.cost import Cost
from service.model.openings import Openings, is_quarantined
from service.model.predictor import AnyPredictor, load_any_predictor
from service.settings import Settings

logger = logging.getLogger("service")


class Opener:
    """Opens versions on one device, in any thread.

    Args:
        settings: how to run.
        openings: where failures are kept, so that another worker that asks is told at once.
        device: "cpu", "cuda:N" or "mps".
        threads: CPU threads that one backend call may use.
    """

    def __init__(self, settings: Settings, openings: Openings, device: str, threads: int) -> None:
        self._settings = settings
        self._openings = openings
        self._device = device
        self._threads = threads

    def open(self, fields: channel.Fields) -> tuple[AnyPredictor, Cost]:
        """Open a version that a worker has described, and return what its calls cost.

        Raises:
            ServiceError: it cannot run here, now or before.
        """
        known = self._openings.read(fields["key"])
        if known is not None and "error" in known and (is_quarantined(known) or not fields["retry"]):
            error = channel.build_error(known["error"])
            if is_quarantined(known) and self._device != "cpu":  # other failures were logged when they happened
                _warn_once(f"model {fields['name']} version {fields['version']} cannot run on {self._device}: {error}")
            raise error
        with self._openings.opening(fields["key"]):
            return self._open_checked(fields) if self._device == "cpu" else self._try(fields)

    def _open_checked(self, fields: channel.Fields) -> tuple[AnyPredictor, Cost]:
        """Open a version on the CPU; what the checker has found, on the same device, is not done again."""
        predictor = load_any_predictor(
            Path(fields["path"]),
            self._settings.backend,
            "cpu",
            self._threads,
            serve_as=fields["serve_as"],
            verified=fields["verified"],
        )
        return predictor, Cost(*fields["cost"])

    def _try(self, fields: channel.Fields) -> tuple[AnyPredictor, Cost]:
        """Open, check and measure a version on an accelerator.

        Raises:
            ServiceError: it fails there, or costs more than `rival`, the seconds of a row on the CPU. That is logged,
                and kept for the other workers.
        """
        settings, about = self._settings, (fields["name"], fields["version"])
        try:
            predictor = load_any_predictor(
                Path(fields["path"]),
                settings.backend,
                self._device,
                self._threads,
                serve_as=fields["serve_as"],
                tf32=settings.tf32,
                public_key=settings.require_signature,
            )
            cost = predictor.measure_cost(choose_rows(predictor.manifest, settings))
        except ServiceError as error:
            logger.warning("model %s version %d cannot run on %s: %s", *about, self._device, error)
            self._openings.write(fields["key"], {"error": channel.describe_error(error)})
            if isinstance(error, DeviceLostError) or isinstance(error.__cause__, DeviceLostError):
                abandon_device(self._device, error)
            raise
        rival = fields.get("rival")
        if rival is not None and cost.per_row > rival:
            found = ModelRefusedError(
                f"a row takes {cost.per_row * 1e3:.3g} ms on {self._device} and {rival * 1e3:.3g} ms on the CPU"
            )
            logger.info("model %s version %d runs on the CPU: %s", *about, found)
            self._openings.write(fields["key"], {"error": channel.describe_error(found)})
            raise found
        return predictor, cost


def abandon_device(device: str, error: ServiceError) -> None:
    """Crash, in any thread: only another process can use the device, and workers tell what crashes engines."""
    logger.error("%s works no more (%s); this process ends and another takes over", device, error)
    os.abort()


@cache
def _warn_once(sentence: str) -> None:
    logger.warning("%s", sentence)
