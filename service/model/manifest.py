"""Manifests: the schema of `models/<name>/<version>/manifest.json`.

The manifest is written last when a version is published, so a folder without one is not published yet. Every part is
frozen and rejects unknown fields. This module does no file access and runs no graph; `version_folder` reads manifests.
"""

import hashlib
import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,63}$"

Task = Literal["regression", "binary", "multiclass"]
BackendName = Literal["onnx", "torchscript", "onnx-int8"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Feature(_Part):
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


class ImageSpec(_Part):
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


class TabularInput(_Part):
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


class ImageInput(_Part):
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


Input = Annotated[TabularInput | ImageInput, Field(discriminator="kind")]


class Output(_Part):
    """The meaning of the graph's output, float32 (N, K).

    kind "value": K = 1, a number with a unit. "probability": K = 1, the probability of the second label.
    "probabilities": K = number of labels, rows sum to 1. "logits": K = 1 (binary) or number of labels; the service
    applies the sigmoid or softmax.
    """

    kind: Literal["value", "probability", "probabilities", "logits"]
    name: str = "prediction"
    unit: str | None = None
    labels: tuple[str, ...] = ()
    threshold: float | None = Field(default=None, ge=0, le=1)
    tensor: str | None = Field(default=None, description="name of the graph's output; optional if it has only one")


class Artifact(_Part):
    """A graph file with its SHA-256 digest (hex) and its size in bytes.

    `tolerance` is added to the usual tolerance for golden outputs, for graphs with rounded weights.
    """

    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=1)
    tolerance: float | None = Field(default=None, gt=0, le=1)


class Golden(_Part):
    """A few flattened inputs and their expected outputs, checked on every load, on any backend and device."""

    inputs: tuple[tuple[float, ...], ...] = Field(min_length=1)
    outputs: tuple[tuple[float, ...], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_rows(self) -> Self:
        if len(self.inputs) != len(self.outputs):
            raise ValueError(f"{len(self.inputs)} golden inputs, {len(self.outputs)} golden outputs")
        return self


class Training(_Part):
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


class Manifest(_Part):
    """The manifest of one version of a model with a task.

    Raises:
        pydantic.ValidationError: A field is missing, unknown, out of range, or contradicts another.
    """

    schema_version: Literal[1] = 1
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

    @model_validator(mode="after")
    def _check_task(self) -> Self:
        kinds = {
            "regression": ("value",),
            "binary": ("probability", "probabilities", "logits"),
            "multiclass": ("probabilities", "logits"),
        }[self.task]
        if self.output.kind not in kinds:
            raise ValueError(f"a {self.task} model has output kind {' or '.join(kinds)}, not {self.output.kind}")
        labels, threshold = self.output.labels, self.output.threshold
        if self.task == "regression" and (labels or threshold is not None):
            raise ValueError("a regression model has neither labels nor a threshold")
        if self.task == "binary" and len(labels) != 2:  # noqa: PLR2004
            raise ValueError(f"a binary model has two labels, not {len(labels)}")
        if self.task == "multiclass" and (len(labels) < 2 or threshold is not None):  # noqa: PLR2004
            raise ValueError("a multiclass model has at least two labels and no threshold")
        if len(set(labels)) != len(labels):
            raise ValueError("labels repeat")
        self._check_golden()
        return self

    def _check_golden(self) -> None:
        if self.golden is None:
            return
        wide = math.prod(self.input.shape)
        for i, row in enumerate(self.golden.inputs):
            if len(row) != wide:
                raise ValueError(f"golden.inputs[{i}] has {len(row)} values, expected {wide}")
        for i, row in enumerate(self.golden.outputs):
            if len(row) != self.output_width:
                raise ValueError(f"golden.outputs[{i}] has {len(row)} values, expected {self.output_width}")

    @property
    def output_width(self) -> int:
        """K, the number of columns in the graph's output."""
        if self.task == "multiclass" or self.output.kind == "probabilities":
            return len(self.output.labels)
        return 1


class TensorSpec(_Part):
    """A named tensor: its Open Inference Protocol datatype and its shape, where -1 means any size."""

    name: str = Field(min_length=1, max_length=200)
    datatype: Literal[
        "BOOL",
        "UINT8",
        "UINT16",
        "UINT32",
        "UINT64",
        "INT8",
        "INT16",
        "INT32",
        "INT64",
        "FP16",
        "FP32",
        "FP64",
        "BYTES",
    ]
    shape: tuple[Annotated[int, Field(ge=-1)], ...]


class TensorManifest(_Part):
    """The manifest of one version of a model without a task: only named input and output tensors."""

    schema_version: Literal[1] = 1
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
