"""The command line, `python -m service` or `model-service`: serve models and manage the models folder."""

import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 for success, 1 for an error (one line on stderr), 130 for Ctrl-C.

    argparse exits with 2 if the command line is invalid.
    """
    try:
        from service.cli.main import run  # noqa: PLC0415 - so that a missing package is one line
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name == "service":
            raise
        print(
            f"error: {sys.executable} has no package {name}; run `make serve` once, then use .venv/bin/python",
            file=sys.stderr,
        )
        return 1
    is_module = Path(sys.argv[0]).name != "model-service"
    return run(arguments, "python -m service" if is_module else "model-service")


if __name__ == "__main__":
    sys.exit(main())
