"""Rows: structured arrays (N,) with a field for each tensor of a graph, so that they are batched like plain ones.

A model with columns takes rows with a field (number of columns,) for each input of its graph. Text is `str` objects,
as onnxruntime takes it. A model with named outputs gives rows with a field for each of them. Slicing and concatenating
rows slices and concatenates every tensor. Nothing here depends on HTTP.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.model.manifest import Column, ColumnsInput, Datatype, Manifest

Rows = NDArray[Any]
_SECONDS_A_DAY = 86_400
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def join_tensors(tensors: Mapping[str, NDArray[Any]], dtype: np.dtype[Any], count: int | None = None) -> Rows:
    """Return `count` rows of tensors by name, each (N, *its shape); by default, as many as the first has.

    Raises:
        ValueError: A tensor has another shape.
    """
    assert dtype.names is not None
    rows = np.empty(len(tensors[dtype.names[0]]) if count is None else count, dtype)
    for name in dtype.names:
        if tensors[name].shape != rows[name].shape:
            raise ValueError(f"{name} has shape {list(tensors[name].shape)}, expected {list(rows[name].shape)}")
        rows[name] = tensors[name]
    return rows


def split_rows(rows: Rows) -> dict[str, NDArray[Any]]:
    """Return the tensors of rows by name."""
    return {name: rows[name] for name in rows.dtype.names or ()}


def count_days(text: str) -> float:
    """Return a date and time of ISO 8601 as days since 1970-01-01 UTC; without a zone, it is UTC."""
    moment = datetime.fromisoformat(text)
    moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return (moment - _EPOCH).total_seconds() / _SECONDS_A_DAY


def choose_example(column: Column) -> Any:  # noqa: ANN401 - a JSON value
    """Return a value that a column takes: its default, or else a plain one."""
    if column.default is not None:
        return column.default
    if column.type == "category":
        return column.values[0]
    low = column.minimum if column.minimum is not None else (column.maximum or 1.0) - 1.0
    middle = (low + column.maximum) / 2 if column.maximum is not None else low + 0.5
    whole = round(middle) if column.type == "integer" else 0
    plain = {"number": middle, "integer": whole, "boolean": False, "text": "text", "datetime": "2024-01-31T12:00:00"}
    return plain[column.type]


def read_row(spec: ColumnsInput, row: Any) -> dict[str, Any]:  # noqa: ANN401 - an np.void of rows
    """Return the JSON values that one of the rows was made of, by column."""
    values: dict[str, Any] = {}
    for tensor in spec.tensors:
        for column, element in zip(tensor.columns, row[tensor.name].tolist(), strict=True):
            values[column.name] = _read_element(column, element, tensor.datatype)
    return {column.name: values[column.name] for column in spec.columns}


def _read_element(column: Column, element: Any, datatype: Datatype) -> Any:  # noqa: ANN401 - a JSON value
    is_null = element == column.missing if datatype == "BYTES" else element != element  # noqa: PLR0124 - NaN
    if column.nullable and is_null and element not in column.values:
        return None
    if column.type == "category" and isinstance(column.values[0], int):
        return int(element)
    if column.type == "category" and datatype != "BYTES":
        return column.values[int(element)]
    if column.type == "datetime" and datatype != "BYTES":
        return (_EPOCH + timedelta(days=element)).isoformat()
    if column.type == "number":
        return float(str(np.float32(element))) if datatype == "FP32" else element
    return {"integer": int, "boolean": bool}.get(column.type, str)(element)


def build_row(spec: ColumnsInput) -> Rows:
    """Return one row (1,) of example values."""
    row = np.empty(1, spec.row_dtype)
    for tensor in spec.tensors:
        for index, (column, codes) in enumerate(zip(tensor.columns, tensor.codes, strict=True)):
            value = choose_example(column)
            if column.type == "datetime" and tensor.datatype != "BYTES":
                value = count_days(value)
            row[tensor.name][0, index] = codes.get(value, value)
    return row


def build_inputs(manifest: Manifest, count: int) -> NDArray[Any]:
    """Return `count` inputs to try a graph on: zeros, or the first golden row or an example of columns."""
    if not isinstance(manifest.input, ColumnsInput):
        return np.zeros((count, *manifest.input.shape), np.float32)
    rows = manifest.golden_rows.inputs if manifest.golden_rows is not None else build_row(manifest.input)
    return np.repeat(rows[:1], count)
