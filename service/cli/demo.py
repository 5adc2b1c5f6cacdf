"""The models that are installed with the service, and `init`, which makes a models folder of one of them."""

import shutil
from pathlib import Path
from typing import Any

from service.errors import InvalidRequestError
from service.settings import Settings

DEMO = Path(__file__).parents[1] / "demo"
_EXAMPLE = "logistic-hours"


def init(settings: Settings, flags: dict[str, Any]) -> int:
    """Make a models folder with one example, and say what to do with it."""
    del settings
    root = Path(flags["folder"])
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise InvalidRequestError(f"{root} exists and is not an empty folder; name another")
    try:
        shutil.copytree(DEMO / _EXAMPLE, root / _EXAMPLE)
    except OSError as error:
        raise InvalidRequestError(f"{root} cannot be written: {error.strerror}") from error
    print(f"made {root}/ with the model {_EXAMPLE}; next:")
    print(f"  model-service serve --models-dir {root}")
    print(f"  model-service package your.onnx --models-dir {root}")
    return 0
