"""What a model with a task takes: rows of numbers, pictures, or typed columns."""

import math
from collections import Counter
from datetime import datetime
from functools import cached_property
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from service.model.manifest.parts import Datatype, Part, find_dtype

ColumnType = Literal["number", "integer", "boolean", "category", "text", "datetime"]
Scalar = Annotated[bool, Field(strict=True)] | Annotated[int, Field(strict=True)] | float | str
_DATATYPES: dict[ColumnType, tuple[Datatype, ...]] = {  # that a column's tensor may have, the plainest first
    "number": ("FP32", "FP64"),
    "integer": ("INT64", "INT32", "FP32", "FP64"),
    "boolean": ("BOOL", "INT64", "FP32", "FP64"),
    "category": ("BYTES", "INT64", "INT32", "FP32", "FP64"),
    "text": ("BYTES",),
    "datetime": ("BYTES", "FP32", "FP64"),
}
_TAKE_NULL = ("FP32", "FP64", "BYTES")


class Feature(Part):
    """A column of a tabular model: its name, its unit and the range of the training data."""

    name: str = Field(min_length=1, max_length=100)
    unit: str | None = None
    description: str | None = None
    minimum: float | None = None
    maximum: float | None = None

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if self.minimum is not None and self.maximum is not None and self.minimum >= self.maximum:
            raise ValueError(f"feature {self.name!r} has minimum {self.minimum} not below maximum {self.maximum}")
        return self


class Column(Feature):
    """A typed column.

    A number is float32 or float64, an integer INT64, a boolean BOOL, and the others are text, unless `datatype` says
    otherwise. In a numeric tensor, a category is the whole number that it is, or else its index in `values`, and a
    datetime is days since 1970-01-01 UTC. Null is NaN in a float tensor, and `missing` in a text one.
    """

    type: ColumnType
    nullable: bool = False
    values: tuple[Annotated[int, Field(strict=True)] | str, ...] = ()
    default: Scalar | None = None
    datatype: Datatype | None = None
    missing: str = Field(default="", description="what a text tensor has for null")
    tensor: str | None = Field(default=None, description="the graph's input; by default, of the column's name")

    @model_validator(mode="after")
    def _check_column(self) -> Self:
        of = f"column {self.name!r}"
        if (self.type == "category") != bool(self.values):
            raise ValueError(f"{of} is {self.type}, and only a category has values")
        if len(set(map(str, self.values))) != len(self.values) or len(set(map(type, self.values))) > 1:
            raise ValueError(f"{of} has values that repeat, or both text and numbers")
        if self.type not in ("number", "integer") and (self.minimum, self.maximum) != (None, None):
            raise ValueError(f"{of} is {self.type}, and only numbers and integers have a range")
        if self.datatype is not None and self.datatype not in _DATATYPES[self.type]:
            raise ValueError(f"{of} has datatype {self.datatype}, expected one of {', '.join(_DATATYPES[self.type])}")
        if self.nullable and self.datatype is not None and self.datatype not in _TAKE_NULL:
            raise ValueError(f"{of} is nullable, and {self.datatype} has no value for null")
        if self.default is not None and not self.takes(self.default):
            raise ValueError(f"{of} has a default that it would refuse")
        return self

    def takes(self, value: object) -> bool:
        """Return whether a JSON value, other than null, is one of this column's type."""
        if self.type == "category":
            return type(value) in (int, str) and value in self.values
        if self.type == "datetime":
            return isinstance(value, str) and is_datetime(value)
        if self.type == "integer" and isinstance(value, float):
            return value.is_integer()
        kinds = {"number": (int, float), "integer": (int,), "boolean": (bool,), "text": (str,)}
        return type(value) in kinds[self.type]

    def choose_datatype(self, feed: str) -> Datatype:
        """Return the datatype of the tensor that this column goes into."""
        if feed == "floats":
            return "FP32"
        if self.datatype is not None:
            return self.datatype
        if self.type == "category" and isinstance(self.values[0], int) and feed == "columns":
            return "FP32" if self.nullable else "INT64"
        plain = _DATATYPES[self.type][0]
        return plain if not self.nullable or plain in _TAKE_NULL else "FP32"


def is_datetime(text: str) -> bool:
    """Return whether a text is a date or a date and time in ISO 8601."""
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


class ColumnTensor(Part):
    """An input of the graph, (N, number of columns), and the columns that stand in it side by side."""

    name: str
    datatype: Datatype
    columns: tuple[Column, ...]

    @cached_property
    def codes(self) -> tuple[dict[Any, Any], ...]:
        """What this tensor has for each value of each category, and for null; empty for other columns."""
        return tuple(self._build_codes(column) if column.values else {} for column in self.columns)

    def _build_codes(self, column: Column) -> dict[Any, Any]:
        if self.datatype == "BYTES":
            return {value: str(value) for value in column.values} | {None: column.missing}
        codes = {value: value if isinstance(value, int) else index for index, value in enumerate(column.values)}
        return codes | {None: math.nan}


class ColumnsInput(Part):
    """Rows of typed columns.

    `feed` says how they go into the graph: "columns" as one tensor (N, 1) for each, or together in one for those that
    name the same `tensor`; "floats" as one float32 tensor (N, columns); "strings" as one text tensor (N, columns).
    """

    kind: Literal["columns"]
    columns: tuple[Column, ...] = Field(min_length=1)
    feed: Literal["columns", "floats", "strings"] = "columns"
    tensor: str | None = Field(
        default=None, description="the graph's only input, for floats and strings; else `inputs`"
    )

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        repeated = [name for name, count in Counter(column.name for column in self.columns).items() if count > 1]
        if repeated:
            raise ValueError(f"column {repeated[0]!r} is there twice")
        for column in self.columns:
            if self.feed == "floats" and column.type == "text":
                raise ValueError(f"column {column.name!r} is text, which a tensor of floats cannot have")
            if self.feed == "strings" and column.choose_datatype(self.feed) != "BYTES":
                raise ValueError(f"column {column.name!r} is {column.type}, which a tensor of strings cannot have")
        for tensor in self.tensors:
            if len({column.choose_datatype(self.feed) for column in tensor.columns}) > 1:
                raise ValueError(f"the columns of tensor {tensor.name!r} have several datatypes; give each the same")
        return self

    @cached_property
    def tensors(self) -> tuple[ColumnTensor, ...]:
        """The graph's inputs, in order."""
        found: dict[str, list[Column]] = {}
        for column in self.columns:
            name = (column.tensor or column.name) if self.feed == "columns" else (self.tensor or "inputs")
            found.setdefault(name, []).append(column)
        return tuple(
            ColumnTensor(name=name, datatype=columns[0].choose_datatype(self.feed), columns=tuple(columns))
            for name, columns in found.items()
        )

    @cached_property
    def row_dtype(self) -> "np.dtype[Any]":
        """The dtype of rows: a field for each tensor; see `service.model.columns`."""
        return np.dtype([(each.name, find_dtype(each.datatype), (len(each.columns),)) for each in self.tensors])

    @property
    def shape(self) -> tuple[int]:
        """How many columns there are."""
        return (len(self.columns),)


class ImageSpec(Part):
    """The image that the graph expects: its size in pixels, channels, polarity and fitting.

    `polarity` is "light-on-dark" (1 is ink, as in MNIST) or "dark-on-light"; images of the opposite polarity are
    inverted. "as-is" is for photos, which are never inverted. `fitting` is "stretch" (resize) or "mnist" (scale the ink
    to a 20×20 box and centre it by mass, as described at http://yann.lecun.com/exdb/mnist).
    """

    width: int = Field(ge=1, le=4096)
    height: int = Field(ge=1, le=4096)
    channels: Literal[1, 3] = 1
    polarity: Literal["light-on-dark", "dark-on-light", "as-is"] = "light-on-dark"
    fitting: Literal["stretch", "mnist"] = "stretch"

    @model_validator(mode="after")
    def _check_ink(self) -> Self:
        if self.fitting == "mnist" and self.polarity == "as-is":
            raise ValueError('fitting "mnist" looks for ink; give polarity "light-on-dark" or "dark-on-light"')
        return self

    @property
    def has_ink(self) -> bool:
        """Whether pictures are ink on paper and may be inverted. Colour inputs are not, unless fitted like MNIST."""
        return self.polarity != "as-is" and (self.channels == 1 or self.fitting == "mnist")


class TabularInput(Part):
    """Rows of numbers: float32 (N, number of features)."""

    kind: Literal["tabular"]
    shape: tuple[Annotated[int, Field(ge=1)]]
    dtype: Literal["float32"] = "float32"
    features: tuple[Feature, ...] = Field(min_length=1)
    tensor: str | None = Field(default=None, description="name of the graph's input; optional if it has only one")

    @model_validator(mode="after")
    def _check_features(self) -> Self:
        names = [feature.name for feature in self.features]
        if len(names) != self.shape[0]:
            raise ValueError(f"{len(names)} features for a shape of {list(self.shape)}")
        if len(set(names)) != len(names):
            raise ValueError("feature names repeat")
        return self


class ImageInput(Part):
    """Images as numbers in [0, 1]: float32 (N, *shape), where shape holds channels * height * width values."""

    kind: Literal["image"]
    shape: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1, max_length=3)
    dtype: Literal["float32"] = "float32"
    image: ImageSpec
    tensor: str | None = Field(default=None, description="name of the graph's input; optional if it has only one")

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        pixels = self.image.width * self.image.height * self.image.channels
        if math.prod(self.shape) != pixels:
            raise ValueError(f"shape {list(self.shape)} does not hold {pixels} pixels")
        return self


Input = Annotated[TabularInput | ImageInput | ColumnsInput, Field(discriminator="kind")]
