"""What the graph's outputs mean, by task."""

from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from service.model.manifest.parts import Datatype, Part, find_dtype

Task = Literal["regression", "binary", "multiclass", "multilabel", "embedding", "outputs"]
_INTERVAL_WIDTH = 3
_KINDS: dict[str, tuple[str, ...]] = {
    "regression": ("value", "values", "interval"),
    "binary": ("probability", "probabilities", "logits"),
    "multiclass": ("probabilities", "logits"),
    "multilabel": ("probabilities", "logits"),
    "embedding": ("vector",),
    "outputs": ("tensors",),
}


class OutputValue(Part):
    """One of several values that a regression predicts."""

    name: str = Field(min_length=1, max_length=100)
    unit: str | None = None
    description: str | None = None


class NamedOutput(OutputValue):
    """One of several outputs of a graph: its datatype, and its shape for one instance."""

    tensor: str | None = Field(default=None, description="the graph's output; by default, of the same name")
    datatype: Datatype = "FP32"
    shape: tuple[Annotated[int, Field(ge=1)], ...] = ()


class Output(Part):
    """The meaning of the graph's output, float32 (N, K).

    kind "value": K = 1, a number with a unit. "values": K numbers, named in `values`. "interval": K = 3, a number and
    the lower and upper end of an interval around it. "probability": K = 1, the probability of the second label.
    "probabilities": K = number of labels; rows sum to 1, but for a multilabel model. "logits": K = 1 (binary) or number
    of labels; the service applies the sigmoid (binary, multilabel) or softmax. "vector": K = `width`. "tensors": the
    graph's outputs that are named in `outputs`, of any datatype and shape.
    """

    kind: Literal["value", "values", "interval", "probability", "probabilities", "logits", "vector", "tensors"]
    name: str = "prediction"
    unit: str | None = None
    labels: tuple[str, ...] = ()
    threshold: float | None = Field(default=None, ge=0, le=1)
    thresholds: tuple[Annotated[float, Field(ge=0, le=1)], ...] = ()
    values: tuple[OutputValue, ...] = ()
    outputs: tuple[NamedOutput, ...] = ()
    width: int | None = Field(default=None, ge=1, description="numbers in a vector")
    level: float | None = Field(default=None, gt=0, lt=1, description="share of the true values within an interval")
    tensor: str | None = Field(default=None, description="name of the graph's output; optional if it has only one")
    tensors: tuple[str, ...] = Field(default=(), description="several outputs of the graph, put side by side")

    @property
    def row_dtype(self) -> "np.dtype[Any]":
        """The dtype of rows of named outputs: a field for each; see `service.model.columns`."""
        return np.dtype([(each.name, find_dtype(each.datatype), each.shape) for each in self.outputs])

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        for field, kind in (("values", "values"), ("outputs", "tensors"), ("width", "vector")):
            if bool(getattr(self, field)) != (self.kind == kind):
                raise ValueError(f"an output of kind {kind!r} has {field}, and no other has")
        if self.level is not None and self.kind != "interval":
            raise ValueError("only an output of kind 'interval' has a level")
        for named in (self.values, self.outputs):
            if len({each.name for each in named}) != len(named):
                raise ValueError("names of values or outputs repeat")
        return self

    def check_task(self, task: Task) -> None:
        """Check that the kind, the labels and the thresholds are those of a task.

        Raises:
            ValueError: They are not.
        """
        article = "an" if task[0] in "eo" else "a"
        if self.kind not in _KINDS[task]:
            raise ValueError(f"{article} {task} model has output kind {' or '.join(_KINDS[task])}, not {self.kind}")
        labels = self.labels
        if task in ("regression", "embedding", "outputs") and (labels or self.threshold is not None):
            raise ValueError(f"{article} {task} model has neither labels nor a threshold")
        if task == "binary" and len(labels) != 2:  # noqa: PLR2004
            raise ValueError(f"a binary model has two labels, not {len(labels)}")
        if task == "multiclass" and (len(labels) < 2 or self.threshold is not None):  # noqa: PLR2004
            raise ValueError("a multiclass model has at least two labels and no threshold")
        if task == "multilabel" and (not labels or self.threshold is not None):
            raise ValueError("a multilabel model has labels, and thresholds rather than a threshold")
        if self.thresholds and (task != "multilabel" or len(self.thresholds) != len(labels)):
            raise ValueError("only a multilabel model has thresholds, one for each label")
        if len(set(labels)) != len(labels):
            raise ValueError("labels repeat")

    def count_columns(self, task: Task) -> int:
        """Return K, the number of columns of the graph's output; 0 for named outputs."""
        if task in ("multiclass", "multilabel") or self.kind == "probabilities":
            return len(self.labels)
        return {"values": len(self.values), "interval": _INTERVAL_WIDTH, "vector": self.width or 0, "tensors": 0}.get(
            self.kind, 1
        )
