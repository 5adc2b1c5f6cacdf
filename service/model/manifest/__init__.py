"""Manifests: the schema of `models/<name>/<version>/manifest.json`.

The manifest is written last when a version is published, so a folder without one is not published yet. Every part is
frozen and rejects unknown fields. This package does no file access and runs no graph; `version_folder` reads manifests.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr, model_validator

from service.model.manifest.inputs import (
    Column,
    ColumnsInput,
    Feature,
    ImageInput,
    ImageSpec,
    Input,
    TabularInput,
)
from service.model.manifest.outputs import NamedOutput, Output, OutputValue, Task
from service.model.manifest.parts import Artifact, BackendName, Datatype, Golden, Part, Training, drop_empty

__all__ = [
    "NAME_PATTERN", "AnyManifest", "Artifact", "BackendName", "Column", "ColumnsInput", "Datatype", "Feature", "Golden",
    "GoldenRows", "ImageInput", "ImageSpec", "Input", "Manifest", "NamedOutput", "Output", "OutputValue",
    "TabularInput", "Task", "TensorManifest", "TensorSpec", "Training", "digest", "drop_empty",
]  # fmt: skip

NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,63}$"
SchemaVersion = Literal[1, 2]


@dataclass(frozen=True, eq=False)
class GoldenRows:
    """Golden samples as the graph takes and gives them; see `service.model.columns` for what rows are.

    `inputs` is float32 (N, *shape) or rows of columns, `outputs` float32 (N, K) or rows of named outputs.
    """

    inputs: NDArray[Any]
    outputs: NDArray[Any]


class Manifest(Part):
    """The manifest of one version of a model with a task.

    Raises:
        pydantic.ValidationError: A field is missing, unknown, out of range, or contradicts another.
    """

    schema_version: SchemaVersion = 2
    name: str = Field(pattern=NAME_PATTERN)
    version: int = Field(ge=1, le=2**31 - 1)
    title: str = ""
    description: str = ""
    task: Task
    input: Input
    output: Output
    artifacts: dict[BackendName, Artifact] = Field(min_length=1)
    golden: Golden | None = None
    metrics: dict[str, float] = Field(default_factory=dict, description="metrics on the test split")
    training: Training | None = None
    _golden_rows: GoldenRows | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _check_task(self) -> Self:
        self.output.check_task(self.task)
        if self.has_rows and not set(self.artifacts) <= {"onnx", "onnx-int8"}:
            raise ValueError("columns and several outputs need an ONNX graph: PyTorch's files do not name tensors")
        if self.golden is not None and self.golden.file is None:
            self._check_golden(self.golden)
        return self

    def _check_golden(self, golden: Golden) -> None:
        if self.input.kind == "columns" or self.output.kind == "tensors":
            raise ValueError("golden samples of columns or named outputs are arrays in a file; give golden.file")
        wide = math.prod(self.input.shape)
        for i, row in enumerate(golden.inputs):
            if len(row) != wide:
                raise ValueError(f"golden.inputs[{i}] has {len(row)} values, expected {wide}")
        for i, row in enumerate(golden.outputs):
            if len(row) != self.output_width:
                raise ValueError(f"golden.outputs[{i}] has {len(row)} values, expected {self.output_width}")

    @property
    def output_width(self) -> int:
        """K, the number of columns in the graph's output; 0 for named outputs."""
        return self.output.count_columns(self.task)

    @property
    def has_rows(self) -> bool:
        """Whether the graph has several inputs or outputs, which only ONNX names."""
        return self.input.kind == "columns" or self.output.kind == "tensors" or len(self.output.tensors) > 0

    @property
    def golden_rows(self) -> GoldenRows | None:
        """The golden samples as arrays, if there are any and they have been read; see `with_golden_rows`."""
        golden = self.golden
        if self._golden_rows is None and golden is not None and golden.inputs:
            inputs = np.array(golden.inputs, np.float32).reshape(-1, *self.input.shape)
            self._golden_rows = GoldenRows(inputs, np.array(golden.outputs, np.float32))
        return self._golden_rows

    def with_golden_rows(self, golden: Golden | None, rows: GoldenRows) -> "Manifest":
        """Return this manifest with golden samples; `golden` says where they are, once they are in a file."""
        manifest = self.model_copy(update={"golden": golden})
        manifest._golden_rows = rows
        return manifest


class TensorSpec(Part):
    """A named tensor: its Open Inference Protocol datatype and its shape, where -1 means any size."""

    name: str = Field(min_length=1, max_length=200)
    datatype: Datatype
    shape: tuple[Annotated[int, Field(ge=-1)], ...]


class TensorManifest(Part):
    """The manifest of one version of a model without a task: only named input and output tensors."""

    schema_version: SchemaVersion = 2
    name: str = Field(pattern=NAME_PATTERN)
    version: int = Field(ge=1, le=2**31 - 1)
    title: str = ""
    description: str = ""
    task: Literal["tensors"]
    inputs: tuple[TensorSpec, ...] = Field(min_length=1)
    outputs: tuple[TensorSpec, ...] = Field(min_length=1)
    artifacts: dict[BackendName, Artifact] = Field(min_length=1)
    metrics: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_artifacts(self) -> Self:
        if list(self.artifacts) != ["onnx"]:
            raise ValueError(
                "a model without a task has one artifact, onnx: a TorchScript file does not name its tensors"
            )
        return self


AnyManifest = Manifest | TensorManifest


def digest(content: bytes) -> str:
    """Return the SHA-256 digest of `content` as 64 hex digits."""
    return hashlib.sha256(content).hexdigest()
