"""Implementation of `python -m service sign`."""

from pathlib import Path
from typing import Any

from service.model.signature import sign_version
from service.settings import Settings


def sign(settings: Settings, flags: dict[str, Any]) -> int:
    """Sign a version folder with a private key."""
    del settings
    print(f"wrote {sign_version(Path(flags['folder']), Path(flags['key']))}")
    return 0
