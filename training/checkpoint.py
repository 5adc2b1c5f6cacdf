"""The state of a long fit on disk, so that an interrupted fit can resume.

A state is used only by the fit that saved it. If it cannot be read or saved, the fit goes on without it and says so in
one line on stderr.
"""

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import torch

_UNREADABLE = (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError)


def load_checkpoint(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return the saved state of a fit, or None if there is none.

    Args:
        path: the checkpoint file.
        identity: what must be equal for a state to belong to the same fit; see `Trainer.identity`.
    """
    if not path.is_file():
        return None
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        state, is_same = saved["state"], saved["identity"] == identity
    except _UNREADABLE:
        _warn(f"cannot read {path}; starting from the beginning")
        return None
    if not is_same:
        _warn(f"{path} belongs to another fit (other code, data, seed or device); starting from the beginning")
        return None
    _warn(f"resuming from {path} after epoch {len(state['history'])}")
    return dict(state)


def save_checkpoint(path: Path, identity: dict[str, Any], state: dict[str, Any]) -> bool:
    """Replace the checkpoint file in one step; return whether that worked."""
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save({"identity": identity, "state": state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "incomplete write"
        _warn(f"cannot save {path} ({reason}); if interrupted, this fit starts from the beginning")
        return False
    return True


def _warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
