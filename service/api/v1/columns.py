"""Decoded JSON instances of a model with columns to rows, a column at a time.

Each column is converted in a few calls for all instances. Where that does not work, its values are looked at one by one
for the sentence that says which is wrong and what is allowed.
"""

import difflib
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.api.json_values import kind_of
from service.errors import InvalidRequestError
from service.model.columns import Rows, count_days
from service.model.manifest import Column, ColumnsInput, Datatype
from service.telemetry import metrics

_KINDS: dict[str, tuple[frozenset[type], str]] = {  # JSON types that a column takes, and their name in errors
    "number": (frozenset({int, float}), "a number"),
    "integer": (frozenset({int, float}), "a whole number"),
    "boolean": (frozenset({bool}), "true or false"),
    "category": (frozenset({str, int}), ""),
    "text": (frozenset({str}), "a string"),
    "datetime": (frozenset({str}), "a date and time in ISO 8601, such as 2024-01-31T12:00:00Z"),
}
_MOST_SHOWN = 6  # of the values of a category
_NULL = type(None)
_LARGEST = float(np.finfo(np.float32).max)


def read_columns(instances: list[Any], spec: ColumnsInput, model: tuple[str, int], first: int = 0) -> Rows:
    """Return the rows of decoded instances: objects by column, or lists in the order of the columns.

    Args:
        instances: decoded JSON, at least one.
        spec: of the model's columns.
        model: its name and version, for which numbers outside their range are counted.
        first: index of the first instance in the request.

    Raises:
        InvalidRequestError: with where and what is wrong.
    """
    values = _take_columns(instances, spec, first)
    rows = np.empty(len(instances), spec.row_dtype)
    for tensor in spec.tensors:
        field = rows[tensor.name]
        for index, (column, codes) in enumerate(zip(tensor.columns, tensor.codes, strict=True)):
            found = _convert(values[column.name], column, tensor.datatype, codes)
            if found is None:
                raise _describe_first(values[column.name], column, tensor.datatype, codes, first)
            field[:, index] = found
            if column.minimum is not None or column.maximum is not None:
                _count_outside(field[:, index], column, model)
    return rows


def _take_columns(instances: list[Any], spec: ColumnsInput, first: int) -> dict[str, Sequence[Any]]:
    """Return the values of each column by name."""
    names = [column.name for column in spec.columns]
    kinds = set(map(type, instances))
    if len(names) == 1 and kinds.isdisjoint((list, dict)):
        return {names[0]: instances}
    if kinds == {list}:
        _check_lengths(instances, names, first)
        return dict(zip(names, zip(*instances, strict=True), strict=True))
    if kinds != {dict}:
        for index, instance in enumerate(instances, first):
            if type(instance) not in (dict, list):
                expected = f"an object of {', '.join(names)}, or a list of their values"
                raise InvalidRequestError(f"instances[{index}] is {kind_of(instance)}, expected {expected}")
        _check_lengths(instances, names, first)
        instances = [dict(zip(names, each, strict=True)) if type(each) is list else each for each in instances]
    known = frozenset(names)
    for index, instance in enumerate(instances, first):
        if not instance.keys() <= known:
            unknown = next(name for name in instance if name not in known)
            where = f"instances[{index}] has an unknown column {unknown[:60]!r}"
            raise InvalidRequestError(f"{where}; {_hint(unknown, names)}")
    return {column.name: _take(instances, column, first) for column in spec.columns}


def _check_lengths(instances: list[Any], names: Sequence[str], first: int) -> None:
    for index, instance in enumerate(instances, first):
        if type(instance) is list and len(instance) != len(names):
            count = f"instances[{index}] has {len(instance)} values, expected {len(names)}"
            raise InvalidRequestError(f"{count}: {', '.join(names)}")


def _take(instances: list[dict[str, Any]], column: Column, first: int) -> list[Any]:
    name = column.name
    try:
        return [instance[name] for instance in instances]
    except KeyError:
        if column.default is not None or column.nullable:
            return [instance.get(name, column.default) for instance in instances]
        index = next(index for index, instance in enumerate(instances, first) if name not in instance)
        raise InvalidRequestError(f"instances[{index}] lacks the column {name!r}, which has no default") from None


def _convert(values: Sequence[Any], column: Column, datatype: Datatype, codes: dict[Any, Any]) -> Any:  # noqa: ANN401 - an array or a list
    """Return a column's elements as its tensor takes them; None if one of its values is wrong."""
    kinds = set(map(type, values))
    has_null = _NULL in kinds
    if (has_null and not column.nullable) or not kinds - {_NULL} <= _KINDS[column.type][0]:
        return None
    try:
        if column.type == "category":
            return [codes[value] for value in values]
        if column.type in ("text", "datetime"):
            return _convert_text(values, column, datatype)
        return _convert_numbers(values, column, datatype, float in kinds or has_null)
    except (KeyError, ValueError, OverflowError):
        return None


def _convert_text(values: Sequence[Any], column: Column, datatype: Datatype) -> list[Any]:
    if column.type == "datetime":
        if datatype != "BYTES":
            return [np.nan if value is None else count_days(value) for value in values]
        for value in values:
            if value is not None:
                datetime.fromisoformat(value)
    return [column.missing if value is None else value for value in values]


def _convert_numbers(
    values: Sequence[Any], column: Column, datatype: Datatype, is_float: bool
) -> "NDArray[Any] | None":
    """Return numbers or booleans; None is NaN. They must fit into the tensor's datatype, and be whole for integers."""
    if datatype == "BOOL":
        return np.array(values, np.bool_)
    if datatype in ("FP32", "FP64"):
        numbers = np.array(values, np.float64)
        if is_float and column.type == "integer" and not (np.isnan(numbers) | (numbers == np.trunc(numbers))).all():
            return None
        return None if datatype == "FP32" and (np.abs(numbers) > _LARGEST).any() else numbers
    whole = [int(value) for value in values] if is_float else values
    if is_float and whole != list(values):
        return None
    numbers = np.array(whole, np.int64)
    limits = np.iinfo(datatype.lower())
    return numbers if ((numbers >= limits.min) & (numbers <= limits.max)).all() else None


def _count_outside(numbers: NDArray[Any], column: Column, model: tuple[str, int]) -> None:
    """Count numbers outside the column's range, which are answered all the same."""
    low = -np.inf if column.minimum is None else column.minimum
    high = np.inf if column.maximum is None else column.maximum
    outside = int(np.count_nonzero((numbers < low) | (numbers > high)))
    if outside:
        metrics.record_out_of_range(*model, column.name, outside)


def _describe_first(
    values: Sequence[Any], column: Column, datatype: Datatype, codes: dict[Any, Any], first: int
) -> InvalidRequestError:
    """Return the error of the first value that is wrong."""
    index, value = next(
        (index, value) for index, value in enumerate(values) if _convert([value], column, datatype, codes) is None
    )
    where = f"instances[{first + index}].{column.name}"
    kinds, expected = _KINDS[column.type]
    if column.type == "category":
        shown = f'"{value[:60]}"' if isinstance(value, str) else value if type(value) is int else kind_of(value)
        texts = [str(each) for each in column.values]
        close = difflib.get_close_matches(str(value)[:60], texts, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return InvalidRequestError(f"{where} is {shown}, expected one of {_list_some(texts)}{hint}")
    if type(value) not in kinds:
        return InvalidRequestError(f"{where} is {kind_of(value)}, expected {expected}{' or null' * column.nullable}")
    if column.type == "datetime":
        return InvalidRequestError(f'{where} is "{value[:60]}", expected {expected}')
    if column.type == "integer" and isinstance(value, float) and not value.is_integer():
        return InvalidRequestError(f"{where} is {value}, expected {expected}")
    return InvalidRequestError(f"{where} is not a number that {datatype} can hold")


def _list_some(names: Sequence[str]) -> str:
    return ", ".join([*names[:_MOST_SHOWN], *(["…"] if len(names) > _MOST_SHOWN else [])])


def _hint(unknown: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(unknown[:60], names, 1)
    return f"did you mean {close[0]!r}?" if close else f"expected {', '.join(names)}"
