"""Run one command of the command line."""

import logging
import os
import sys
from collections.abc import Sequence

from service.cli.demo import DEMO
from service.cli.parser import parse
from service.errors import ServiceError
from service.settings import load_settings


def run(arguments: Sequence[str] | None, program: str) -> int:
    """Run a command and return its exit code; see `service.__main__.main`."""
    flags = parse(arguments, program)
    if flags.get("demo"):
        flags["models_dir"] = str(DEMO)
    try:
        code = int(flags["run"](load_settings(flags), flags))
        sys.stdout.flush()  # flush here so that BrokenPipeError can be caught
        return code
    except BrokenPipeError:  # stdout was closed, as in `verify | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes again at exit
        return 1
    except ServiceError as error:
        logging.getLogger("service").debug("", exc_info=error)
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
