"""A table of the user's own: the types of its columns, its target, and splits that do not leak.

It becomes one float32 matrix (rows, columns), as the service feeds it to the graph: a category is its index among the
column's values, a date the days since 1970, a boolean 0 or 1, and a missing value NaN.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from service.errors import InvalidRequestError
from service.model.columns import count_days
from service.model.manifest import Column, Task
from service.model.manifest.inputs import is_datetime
from service.packaging.table import find_type, read_table
from training.data import Split, Splits
from training.errors import DataError

TEST, VALIDATION = 0.2, 0.16  # shares of the rows; the others are for training
LEAST_ROWS, LEAST_OF_A_CLASS = 30, 5
_MOST_VALUES = 200  # of a category
_MOST_LABELS = 100
_MOST_CLASSES = 20  # that whole numbers may stand for,
_ROWS_OF_A_CLASS = 10  # where each has so many rows on average
_STRATA = 10  # of a regression's target
_NUMBERS = ("integer", "number")
_PARTS = ("training", "validation", "test")

Floats = NDArray[np.float64]
Indices = NDArray[np.integer]


@dataclass(frozen=True)
class TableOptions:
    """What the user says of a table. `group`: rows with the same value stay in one split. `time`: the newest test."""

    file: Path
    target: str
    task: str = "auto"
    exclude: tuple[str, ...] = ()
    group: str | None = None
    time: str | None = None


@dataclass(frozen=True)
class UserTable:
    """A table that has been read. `left_out` says why a column is not used."""

    columns: tuple[Column, ...]
    task: Task
    labels: tuple[str, ...]
    splits: Splits
    left_out: dict[str, str]

    @property
    def outputs(self) -> int:
        """K, how many logits or values a net has."""
        return len(self.labels) if self.task == "multiclass" else 1


def load_table(options: TableOptions) -> UserTable:
    """Read a CSV or Parquet file, infer the types, and split the rows.

    Raises:
        DataError: the file cannot be read, a column that is named is not there, or nothing can be learned from it.
    """
    cells = _read(options)
    task, labels, values = read_target(cells[options.target], options)
    named = {options.target: "", **dict.fromkeys(options.exclude, "excluded")}
    named |= {name: why for name, why in ((options.group, "group"), (options.time, "time")) if name}
    found = {name: choose_column(name, column) for name, column in cells.items() if name not in named}
    columns = tuple(each for each in found.values() if isinstance(each, Column))
    left_out = {name: why for name, why in named.items() if why}
    left_out |= {name: why for name, why in found.items() if isinstance(why, str)}
    if not columns:
        raise DataError(f"{options.file} has no column to predict {options.target} from")
    matrix = np.stack([encode(each, cells[each.name]) for each in columns], axis=1).astype(np.float32)
    parts = _split(options, cells, matrix, values, task)
    check_parts(parts, values, labels)
    inputs = torch.from_numpy(matrix)
    targets = torch.from_numpy(values).long() if task == "multiclass" else torch.from_numpy(values).float()[:, None]
    train, validation, test = (
        Split(inputs[chosen], targets[chosen]) for chosen in (torch.from_numpy(parts == index) for index in range(3))
    )
    return UserTable(columns, task, labels, Splits(train, test, validation), left_out)


def _read(options: TableOptions) -> dict[str, list[str]]:
    """Return the cells by column, without the rows that lack a target."""
    try:
        cells = read_table(options.file, []).columns
    except InvalidRequestError as error:
        raise DataError(str(error)) from error
    for name in (options.target, options.group, options.time, *options.exclude):
        if name is not None and name not in cells:
            raise DataError(f"{options.file} has no column {name!r}; it has {', '.join(cells)}")
    kept = [index for index, cell in enumerate(cells[options.target]) if cell]
    if len(kept) < LEAST_ROWS:
        raise DataError(f"{options.file} has {len(kept)} rows with {options.target}; at least {LEAST_ROWS} are needed")
    return {name: [column[index] for index in kept] for name, column in cells.items()}


def read_target(cells: list[str], options: TableOptions) -> tuple[Task, tuple[str, ...], Floats]:
    """Return task, labels and targets (rows,): values, or indices of labels.

    Two different values are a binary task, and so are more a multiclass one if they are texts or few whole numbers.
    """
    kind, distinct = find_type(cells), set(cells)
    are_few = len(distinct) <= min(_MOST_CLASSES, len(cells) // _ROWS_OF_A_CLASS) and kind == "integer"
    are_classes = len(distinct) == 2 or kind not in _NUMBERS or are_few  # noqa: PLR2004 - two labels
    if len(distinct) < 2:  # noqa: PLR2004
        raise DataError(f"{options.target} has the same value in every row")
    if options.task == "regression" or (options.task == "auto" and not are_classes):
        if kind not in _NUMBERS:
            raise DataError(f"{options.target} is not numbers, which --task regression predicts")
        values = np.array(cells, np.float64)
        if not np.isfinite(values).all():
            raise DataError(f"{options.target} has a value that is not finite")
        return "regression", (), values
    if len(distinct) > _MOST_LABELS:
        raise DataError(f"{options.target} has {len(distinct)} different values, too many for classes")
    labels = sorted(distinct, key=float) if kind in _NUMBERS else sorted(distinct)
    task: Task = "binary" if len(labels) == 2 else "multiclass"  # noqa: PLR2004
    if options.task not in ("auto", task):
        raise DataError(f"{options.target} has {len(labels)} different values, which is --task {task}")
    codes = {label: index for index, label in enumerate(labels)}
    return task, tuple(labels), np.array([codes[cell] for cell in cells], np.float64)


def choose_column(name: str, cells: list[str]) -> Column | str:
    """Return a column as the manifest describes it, or why it is of no use."""
    filled = [cell for cell in cells if cell]
    distinct, kind, has_gaps = set(filled), find_type(cells), len(filled) < len(cells)
    if len(distinct) + has_gaps < 2 or not filled:  # noqa: PLR2004
        return "every row has the same value"
    if kind in _NUMBERS:
        return _describe_numbers(name, kind, np.array(filled, np.float64), has_gaps)
    fields: dict[str, Any] = {"name": name, "type": "category", "nullable": has_gaps}
    if kind == "boolean":
        fields["type"] = "boolean"
    elif all(is_datetime(cell) for cell in filled):
        fields["type"] = "datetime"
    elif len(distinct) > min(_MOST_VALUES, len(filled) // 2):
        return f"it is text with {len(distinct)} different values"
    else:
        fields["values"] = tuple(sorted(distinct))
    return Column(**fields)


def _describe_numbers(name: str, kind: str, values: Floats, has_gaps: bool) -> Column | str:
    distinct, finite = len(np.unique(values)), values[np.isfinite(values)]
    if kind == "integer" and not has_gaps and distinct == len(values) == np.ptp(values) + 1:
        return "it numbers the rows"
    if not len(finite):
        return "no value is finite"
    fields: dict[str, Any] = {"name": name, "type": kind, "nullable": has_gaps or len(finite) < len(values)}
    if np.ptp(finite) > 0:
        fields |= {"minimum": finite.min(), "maximum": finite.max()}
    return Column(**fields)


def encode(column: Column, cells: list[str]) -> Floats:
    """Return a column's cells as numbers (rows,), as the service will make them of JSON."""
    codes = {value: index for index, value in enumerate(column.values)}

    def read(cell: str) -> float:
        if not cell:
            return math.nan
        if column.type == "category":
            return codes[cell]
        if column.type == "datetime":
            return count_days(cell)
        return float(cell.lower() == "true") if column.type == "boolean" else float(cell)

    numbers = np.array([read(cell) for cell in cells], np.float64)
    return np.where(np.isfinite(numbers), numbers, np.nan)


def _split(
    options: TableOptions, cells: dict[str, list[str]], matrix: NDArray[np.float32], values: Floats, task: Task
) -> Indices:
    """Return the part of each row (rows,): 0 training, 1 validation, 2 test."""
    if options.time is not None:
        return split_by_time(_read_times(cells[options.time], options.time))
    if options.group is not None:
        return split_by_group(np.unique(cells[options.group], return_inverse=True)[1], np.zeros(len(values)))
    rows = [row.tobytes() for row in matrix]
    codes = {row: index for index, row in enumerate(dict.fromkeys(rows))}
    are_distinct = 2 * len(codes) > len(rows)  # else equal rows are what a coarse table has, and no copies
    groups = np.array([codes[row] for row in rows]) if are_distinct else np.arange(len(rows))
    if task == "regression":
        return split_by_group(groups, np.searchsorted(np.quantile(values, np.arange(1, _STRATA) / _STRATA), values))
    return split_by_group(groups, values)


def _read_times(cells: list[str], name: str) -> Floats:
    column = choose_column(name, cells)
    if find_type(cells) in _NUMBERS and "" not in cells:
        return np.array(cells, np.float64)
    if not isinstance(column, Column) or column.type != "datetime" or column.nullable:
        raise DataError(f"--time {name} needs a number or a date of ISO 8601 in every row")
    return encode(column, cells)


def split_by_time(times: Floats) -> Indices:
    """Return the part of each row: the newest test, those before them validate; equal times stay together."""
    first, second = np.quantile(times, (1 - TEST - VALIDATION, 1 - TEST), method="lower")
    parts: Indices = (times > first).astype(np.int64) + (times > second)
    return parts


def split_by_group(groups: Indices, strata: Floats | Indices) -> Indices:
    """Return the part of each row: whole groups are dealt at random, stratum by stratum of their first rows."""
    _, first, of_row, counts = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    random, parts = np.random.default_rng(0), np.zeros(len(first), np.int64)
    for stratum in np.unique(strata[first]):
        members = random.permutation(np.flatnonzero(strata[first] == stratum))
        middles = (np.cumsum(counts[members]) - counts[members] / 2) / counts[members].sum()
        parts[members] = np.where(middles < TEST, 2, middles < TEST + VALIDATION)
    return parts[of_row]


def check_parts(parts: Indices, values: Floats | Indices, labels: tuple[str, ...]) -> None:
    """Check that each split (rows,) has rows, and rows of each class.

    Raises:
        DataError: one has none.
    """
    for index, name in enumerate(_PARTS):
        if not (parts == index).any():
            raise DataError(f"no row is left for the {name} split; there are too few groups or times")
        for code, label in enumerate(labels):
            if (values == code).sum() < LEAST_OF_A_CLASS:
                count = int((values == code).sum())
                raise DataError(f"class {label!r} has {count} rows; at least {LEAST_OF_A_CLASS} are needed")
            if not ((parts == index) & (values == code)).any():
                raise DataError(f"the {name} split has no row of class {label!r}; leave out --group or --time")
