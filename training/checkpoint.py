"""The state of a long fit on disk, so that a fit which was cut short goes on.

A state is taken up only by the very fit that wrote it; one that cannot be read or kept costs time, never the fit. Each
such case is said in a line on stderr.
"""

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import torch

_UNREADABLE = (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError)


def load_checkpoint(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return the saved state of a fit, or None where there is none of this very fit.

    Args:
        path: of the file.
        identity: what must be equal for a state to be of the same fit; see `course.identify`.
    """
    if not path.is_file():
        return None
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        state, is_same = saved["state"], saved["identity"] == identity
    except _UNREADABLE:
        _say(f"{path} cannot be read; beginning anew")
        return None
    if not is_same:
        _say(f"{path} is of another fit (other code, data, seed or device); beginning anew")
        return None
    _say(f"going on from {path}, after epoch {len(state['history'])}")
    return dict(state)


def save_checkpoint(path: Path, identity: dict[str, Any], state: dict[str, Any]) -> bool:
    """Write a state beside its place and rename it there, so that one is always whole; tell whether it is kept."""
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save({"identity": identity, "state": state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "it could not be written whole"
        _say(f"no state is kept in {path} ({reason}); if this fit is cut short, it begins anew")
        return False
    return True


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
