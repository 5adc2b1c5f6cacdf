"""Read sample inputs, the source of feature names, ranges and golden inputs for `package`."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidRequestError
from service.packaging.table import read_parquet


@dataclass(frozen=True)
class Samples:
    """Rows of numbers, (N, columns), and the column names; empty if neither a header nor a flag gives them."""

    names: tuple[str, ...]
    rows: NDArray[np.float64]


def read_samples(path: Path, features: list[str]) -> Samples:
    """Read a CSV file, with or without a header, a Parquet file, or an .npy file of shape (N, …).

    Args:
        path: The file.
        features: The columns to select, if the header has them all; otherwise the names of the columns, in order.

    Raises:
        InvalidRequestError: The file cannot be read, has no rows, has the wrong number of columns, or contains a value
            that is not a finite number.
    """
    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False).astype(np.float64)
            samples = Samples(tuple(features), array.reshape(len(array), -1))
        elif path.suffix == ".parquet":
            names, lines = read_parquet(path)
            samples = _read_table([names, *lines], features)
        else:
            with path.open(newline="", encoding="utf-8-sig") as file:
                samples = _read_table([line for line in csv.reader(file) if any(line)], features)
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, EOFError, csv.Error) as error:
        raise InvalidRequestError(f"{path} is not a table of numbers: {error}") from error
    if not samples.rows.size:
        raise InvalidRequestError(f"{path} has no rows")
    if samples.names and len(samples.names) != samples.rows.shape[1]:
        raise InvalidRequestError(f"{path} has {samples.rows.shape[1]} columns for {len(samples.names)} features")
    odd = np.flatnonzero(~np.isfinite(samples.rows).all(axis=1))
    if len(odd):
        raise InvalidRequestError(f"row {odd[0] + 1} of {path} has a value that is not finite; leave such rows out")
    return samples


def _read_table(lines: list[list[str]], features: list[str]) -> Samples:
    header = [cell.strip() for cell in lines[0]] if lines and not all(map(_is_number, lines[0])) else []
    lines = lines[bool(header) :]
    names = features or header
    width = len(header or (lines[0] if lines else ()))
    picks = [header.index(name) for name in names] if names and set(names) <= set(header) else list(range(width))
    rows = np.empty((len(lines), len(picks)))
    for number, line in enumerate(lines):
        cells = [line[pick] for pick in picks] if len(line) == width else []
        if not cells or not all(map(_is_number, cells)):
            shown = ",".join(line)[:60]
            raise ValueError(f"row {number + 1} is {shown!r}; --features chooses columns by the names in a header")
        rows[number] = [float(cell) for cell in cells]
    return Samples(tuple(names), rows)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
