"""Tables of samples with typed columns: CSV, Parquet or .npy, read as text cells, and rows for a graph from them."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidRequestError
from service.model.manifest import Column, ColumnsInput

_NULLS = ("", "nan", "na", "null", "none")
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_MOST_VALUES = 50  # of a category
_TYPES = {
    "tensor(string)": "text",
    "tensor(bool)": "boolean",
    "tensor(int64)": "integer",
    "tensor(int32)": "integer",
    "tensor(float)": "number",
    "tensor(double)": "number",
}
_DATATYPES = {"tensor(int32)": "INT32", "tensor(double)": "FP64"}


@dataclass(frozen=True)
class Table:
    """Cells as text, by column; a null is ""."""

    columns: dict[str, list[str]]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(next(iter(self.columns.values()), []))

    def pick(self, names: list[str]) -> "Table":
        """Return the table with these columns, in this order.

        Raises:
            InvalidRequestError: It has no such column.
        """
        if missing := [name for name in names if name not in self.columns]:
            raise InvalidRequestError(f"--samples has no column {missing[0]}; it has {', '.join(self.columns)}")
        return Table({name: self.columns[name] for name in names})

    @property
    def is_plain(self) -> bool:
        """Whether no cell is null, and no column boolean."""
        return not any("" in cells or find_type(cells) == "boolean" for cells in self.columns.values())


def read_table(path: Path, features: list[str]) -> Table:
    """Read a CSV file with a header, a Parquet file, or a .npy array (N, columns); `features` names its columns.

    Raises:
        InvalidRequestError: The file cannot be read, or is not a table.
    """
    try:
        names, rows = _READERS.get(path.suffix, _read_csv)(path)
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, csv.Error) as error:
        raise InvalidRequestError(f"{path} is not a table: {error}") from error
    width = len(rows[0]) if rows else 0
    if not rows or any(len(row) != width for row in rows):
        raise InvalidRequestError(f"{path} has no rows, or rows of several lengths")
    names = names or features or [f"x{index}" for index in range(width)]
    if len(names) != width:
        raise InvalidRequestError(f"{path} has {width} columns for {len(names)} names")
    cells = [["" if cell.strip().lower() in _NULLS else cell.strip() for cell in row] for row in rows]
    return Table({name: [row[index] for row in cells] for index, name in enumerate(names)})


def _read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = [line for line in csv.reader(file) if line]
    is_header = bool(lines) and not any(find_type([cell]) in ("number", "integer") for cell in lines[0])
    return ([cell.strip() for cell in lines[0]], lines[1:]) if is_header else ([], lines)


def read_parquet(path: Path) -> tuple[list[str], list[list[str]]]:
    """Return the names of a Parquet file's columns, and its rows as text; a null is "".

    Raises:
        InvalidRequestError: pandas or pyarrow is not installed.
    """
    try:
        import pandas  # noqa: PLC0415 - only for this kind of file

        with path.open("rb") as file:
            frame = pandas.read_parquet(file)
    except ImportError as error:  # pandas names pyarrow in a sentence only
        raise InvalidRequestError(f"{path} cannot be read without pandas and pyarrow: pip install them") from error
    text = frame.astype(object).where(frame.notna(), "").astype(str)
    return [str(name) for name in frame.columns], text.to_numpy().tolist()


def _read_npy(path: Path) -> tuple[list[str], list[list[str]]]:
    array = np.load(path, allow_pickle=False)
    return [], array.reshape(len(array), -1).astype(str).tolist()


_READERS: dict[str, Callable[[Path], tuple[list[str], list[list[str]]]]] = {
    ".parquet": read_parquet,
    ".npy": _read_npy,
}


def find_type(cells: list[str]) -> str:
    """Return the type of a column whose cells are text: integer, number, boolean or text."""
    filled = [cell for cell in cells if cell]
    for kind, parse in (("integer", int), ("number", float)):
        try:
            for cell in filled:
                parse(cell)
        except ValueError:
            continue
        return kind if filled else "number"
    return "boolean" if all(cell.lower() in ("true", "false") for cell in filled) else "text"


def describe_column(name: str, tensor_type: str, cells: list[str], known: str | list[str] = "") -> dict[str, Any]:
    """Return the manifest's fields of a column that goes into a tensor of this type.

    Args:
        name: The column's name.
        tensor_type: As onnxruntime names it, such as "tensor(float)".
        cells: What the samples have in this column, if anything.
        known: The column's type, or a category's values, where the tensor's type does not say it.

    Raises:
        InvalidRequestError: No column goes into such a tensor, or a cell is no value of its type.
    """
    kind = _TYPES.get(tensor_type)
    if kind is None:
        raise InvalidRequestError(f"input {name} is {tensor_type}; only --task tensors takes that")
    if isinstance(known, list):
        return {"name": name, "type": "category", "values": known, "nullable": True}
    if kind == "number" and not known and cells and find_type(cells) == "boolean":
        known = "boolean"
    column: dict[str, Any] = {"name": name, "type": known or kind}
    if tensor_type in _DATATYPES:
        column["datatype"] = _DATATYPES[tensor_type]
    elif known and kind == "number":
        column["datatype"] = "FP32"
    if "" in cells and kind in ("number", "text"):
        column["nullable"] = True
    filled = [cell for cell in cells if cell]
    if kind == "text" and not known and filled and len(set(filled)) <= min(_MOST_VALUES, len(filled) // 2):
        return column | {"type": "category", "values": sorted(set(filled))}
    if column["type"] in ("number", "integer") and filled:
        values = [_parse(column["type"], cell, name) for cell in filled]
        if min(values) < max(values):
            column |= {"minimum": min(values), "maximum": max(values)}
    return column


def build_rows(spec: ColumnsInput, table: Table, most: int) -> NDArray[Any]:
    """Return the first `most` rows of a table as the graph takes them, but with float64 for float32.

    See `service.model.columns`.
    """
    fields = [(name, spec.row_dtype[name]) for name in spec.row_dtype.names or ()]
    exact = [(name, np.float64 if field.base == np.float32 else field.base, field.shape) for name, field in fields]
    rows = np.empty(min(len(table), most), exact)
    for tensor in spec.tensors:
        for index, (column, codes) in enumerate(zip(tensor.columns, tensor.codes, strict=True)):
            values = [_read_cell(column, cell) for cell in table.columns[column.name][: len(rows)]]
            if unknown := set(values) - set(codes or values):
                raise InvalidRequestError(f"--samples has {unknown.pop()!r} in column {column.name}, no value of it")
            null = column.missing if tensor.datatype == "BYTES" else np.nan
            rows[tensor.name][:, index] = [
                codes[value] if codes else null if value is None else value for value in values
            ]
    return rows


def _read_cell(column: Column, cell: str) -> Any:  # noqa: ANN401 - a JSON value
    if not cell:
        if not column.nullable:
            raise InvalidRequestError(f"--samples has no value in column {column.name}, which is {column.type}")
        return None
    return _parse(column.type, cell, column.name)


def _parse(kind: str, cell: str, name: str) -> Any:  # noqa: ANN401 - a JSON value
    try:
        if kind == "integer":
            return int(float(cell))
        if kind == "number":
            return float(cell)
        return _BOOLEANS[cell.lower()] if kind == "boolean" else cell
    except (ValueError, KeyError) as error:
        raise InvalidRequestError(f"--samples has {cell!r} in column {name}, which is {kind}") from error
