"""What a conversion gives."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from service.model.manifest import BackendName

Predict = Callable[[Any], NDArray[Any]]


@dataclass(frozen=True)
class Converted:
    """An ONNX graph, what the library knows of it as flags, and the library's own answers.

    `predict` gives them, (N, K) for N inputs; it is None where they cannot be compared. `beside` is the model itself,
    where it can be served beside the graph. `types` are those of the columns that go into the graph as floats and are
    no numbers: "integer", "boolean", or the values of a category.
    """

    content: bytes
    predict: Predict | None
    flags: dict[str, Any] = field(default_factory=dict)
    beside: dict[BackendName, bytes] = field(default_factory=dict)
    types: dict[str, str | list[str]] = field(default_factory=dict)


def read_array(rows: NDArray[Any]) -> NDArray[Any]:
    """Return inputs (N, K) that may have a field for their only tensor."""
    return rows[rows.dtype.names[0]] if rows.dtype.names else rows
