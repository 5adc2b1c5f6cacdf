"""The argument types of the command line."""

import argparse
import math
from collections.abc import Sequence

LARGEST = 2**31 - 1  # the highest version a manifest accepts
MOST_SEEDS = 1000


def read_seeds(text: str) -> Sequence[int]:
    """Return the seeds of `0-3` or `1,5,9`, each once.

    Raises:
        argparse.ArgumentTypeError: the text is neither, or more than 1,000 seeds.
    """
    first, dash, last = text.partition("-")
    parts = [first, last] if dash else text.split(",")
    numbers = [int(part) for part in parts if part.isdecimal() and len(part) <= len(str(LARGEST))]
    if len(numbers) == len(parts):
        seeds = range(numbers[0], numbers[1] + 1) if dash else tuple(dict.fromkeys(numbers))
        if 0 < len(seeds) <= MOST_SEEDS and max(seeds) <= LARGEST:
            return seeds
    raise argparse.ArgumentTypeError(f"{text!r} is not a list of seeds such as 0-3 or 1,5,9")


def read_positive(text: str) -> int:
    """Return a positive integer.

    Raises:
        argparse.ArgumentTypeError: the text is not one.
    """
    if not text.isdecimal() or not 1 <= int(text) <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 1 to {LARGEST}")
    return int(text)


def read_sizes(text: str) -> tuple[int, ...]:
    """Return the sizes of `512,128`; the empty text is no layer.

    Raises:
        argparse.ArgumentTypeError: one is not a positive integer.
    """
    return tuple(read_positive(part) for part in text.split(",")) if text else ()


def read_rate(text: str) -> float:
    """Return a positive number.

    Raises:
        argparse.ArgumentTypeError: the text is not one.
    """
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return rate
