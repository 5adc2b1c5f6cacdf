"""What both command lines of training read: whole numbers, and seeds."""

import argparse
from collections.abc import Sequence

LARGEST = 2**31 - 1  # that a manifest takes as a version
MOST_SEEDS = 1000


def read_seeds(text: str) -> Sequence[int]:
    """Return the seeds of `0-3` or `1,5,9`, each once.

    Raises:
        argparse.ArgumentTypeError: the text is neither, or means more than 1,000 seeds.
    """
    first, dash, last = text.partition("-")
    parts = [first, last] if dash else text.split(",")
    numbers = [int(part) for part in parts if part.isdecimal() and len(part) <= len(str(LARGEST))]
    if len(numbers) == len(parts):
        seeds = range(numbers[0], numbers[1] + 1) if dash else tuple(dict.fromkeys(numbers))
        if 0 < len(seeds) <= MOST_SEEDS and max(seeds) <= LARGEST:
            return seeds
    raise argparse.ArgumentTypeError(f"{text!r} is not like 0-3 or 1,5,9")


def read_positive(text: str) -> int:
    """Return a whole number above 0.

    Raises:
        argparse.ArgumentTypeError: the text is none.
    """
    if not text.isdecimal() or not 1 <= int(text) <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {LARGEST}")
    return int(text)
