"""Parts of a manifest that do not depend on its task: artifacts, golden samples, training."""

from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

BackendName = Literal["onnx", "torchscript", "torch-export", "onnx-int8"]
Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BYTES",
]  # fmt: skip
_DTYPES: dict[str, "np.dtype[Any]"] = {
    "BOOL": np.dtype(np.bool_),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}
_FILE = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
_SHA256 = r"^[0-9a-f]{64}$"


def drop_empty(fields: Any) -> Any:  # noqa: ANN401 - what `model_dump` gives
    """Return dumped fields without those that are None or an empty list, which is what they are when absent."""
    if isinstance(fields, dict):
        return {name: drop_empty(value) for name, value in fields.items() if value is not None and value != []}
    return [drop_empty(value) for value in fields] if isinstance(fields, list) else fields


def find_dtype(datatype: Datatype) -> "np.dtype[Any]":
    """Return numpy's dtype of a datatype; text is objects."""
    return _DTYPES.get(datatype) or np.dtype(datatype.lower())


class Part(BaseModel):
    """A part of a manifest: frozen, without unknown fields, and without NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Artifact(Part):
    """A graph file with its SHA-256 digest (hex) and its size in bytes.

    `tolerance` is added to the usual tolerance for golden outputs, for graphs with rounded weights.
    """

    file: str = Field(pattern=_FILE)
    sha256: str = Field(pattern=_SHA256)
    bytes: int = Field(ge=1)
    tolerance: float | None = Field(default=None, gt=0, le=1)


class Golden(Part):
    """A few inputs and their expected outputs, checked on every load, on any backend and device.

    Since schema version 2, they are arrays in an .npz file beside the artifacts; see `service.model.golden`. In schema
    version 1, they are rows of numbers in the manifest, flattened.
    """

    file: str | None = Field(default=None, pattern=_FILE)
    sha256: str | None = Field(default=None, pattern=_SHA256)
    bytes: int | None = Field(default=None, ge=1)
    inputs: tuple[tuple[float, ...], ...] = ()
    outputs: tuple[tuple[float, ...], ...] = ()

    @model_validator(mode="after")
    def _check_rows(self) -> Self:
        if len(self.inputs) != len(self.outputs):
            raise ValueError(f"{len(self.inputs)} golden inputs, {len(self.outputs)} golden outputs")
        named = [each is not None for each in (self.file, self.sha256, self.bytes)]
        if any(named) != all(named) or all(named) == bool(self.inputs):
            raise ValueError("golden has file, sha256 and bytes, or else inputs and outputs")
        return self


class Training(Part):
    """How the artifacts were trained, in enough detail to reproduce them.

    `parity_difference` is max |backend - eager net| for each backend.
    """

    recipe: str
    seed: int
    epochs: int
    data: dict[str, str] = Field(description="SHA-256 digest of each split's arrays, by split name")
    libraries: dict[str, str]
    git_commit: str | None = None
    seconds: float = Field(ge=0)
    parity_difference: dict[BackendName, float]
    finished_at: str | None = None
