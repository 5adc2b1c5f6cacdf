"""Requests that send each column or feature as an input of its own, as tables are sent (MLServer's PandasCodec).

The graph's own inputs may take several columns in one tensor, codes for categories and days for dates. Here values are
those of `/v1`: texts for categories and dates, and null, or NaN as binary data, for what is not known.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from service.api.v1.columns import read_columns
from service.api.v1.instances import read_instances
from service.api.v2.datatypes import Tensor
from service.errors import InvalidRequestError
from service.model.backends import Array
from service.model.columns import Rows
from service.model.manifest import AnyManifest, ColumnsInput, Manifest, TabularInput
from service.model.tensor_model import as_text

Described = Mapping[str, tuple[str, tuple[int, ...]]]
"""Datatype and shape of each input of a request, by name."""


def is_by_column(inputs: Described, manifest: AnyManifest) -> bool:
    """Tell whether the inputs of a request are columns or features, and are not just what the graph takes."""
    spec = manifest.input if isinstance(manifest, Manifest) else None
    if isinstance(spec, TabularInput):
        return len(inputs) > 1 and inputs.keys() <= {feature.name for feature in spec.features}
    if not isinstance(spec, ColumnsInput):
        return False
    graph = {each.name: (each.datatype, (len(each.columns),)) for each in spec.tensors}
    own = {name: (datatype, shape[1:]) for name, (datatype, shape) in inputs.items()}
    return own != graph and own.keys() <= {column.name for column in spec.columns}


def check_columns(inputs: Described) -> None:
    """Check that each column has shape [N] or [N, 1], and all have the same N.

    Raises:
        InvalidRequestError: one has not.
    """
    counts = set()
    for name, (_, shape) in inputs.items():
        if not shape or shape[0] < 1 or shape[1:] not in ((), (1,)):
            raise InvalidRequestError(f"column {name!r} has shape {list(shape)}, expected [N] or [N, 1] with N from 1")
        counts.add(shape[0])
    if len(counts) > 1:
        raise InvalidRequestError(f"the columns have {', '.join(map(str, sorted(counts)))} rows; send equally many")


def read_rows(tensors: Mapping[str, Tensor], manifest: Manifest) -> Rows | Array:
    """Return the rows of columns that were sent as inputs of their own, or float32 (N, features).

    Raises:
        InvalidRequestError: a value cannot be used; the sentence says which and why.
    """
    columns = [_list_values(name, tensor.reshape(-1)) for name, tensor in tensors.items()]
    instances = [dict(zip(tensors, row, strict=True)) for row in zip(*columns, strict=True)]
    if not isinstance(manifest.input, ColumnsInput):
        return read_instances(instances, manifest)
    return read_columns(instances, manifest.input, (manifest.name, manifest.version))


def _list_values(name: str, tensor: Tensor) -> Sequence[Any]:
    """Return the JSON values that elements stand for."""
    if tensor.dtype == object:
        values: list[Any] = as_text(tensor, name).tolist() if _has_bytes(tensor) else tensor.tolist()
        return values
    values = tensor.tolist()
    if tensor.dtype.kind != "f":
        return values
    if math.inf in values or -math.inf in values:
        raise InvalidRequestError(f"column {name!r} has a number that is not finite")
    return [None if math.isnan(value) else value for value in values]


def _has_bytes(tensor: Tensor) -> bool:
    return isinstance(tensor[0], bytes)  # then all are: binary data, or those of gRPC
