"""Nets on columns: float32 (N, columns) with NaN where a value is missing -> logits or values (N, K).

What a column needs before it can be multiplied is part of the net, and so of the exported graph.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor, nn

from service.model.manifest import Column
from training.data import Split

PERIODS = (7.0, 365.2425)  # days; a day itself is added where a column has times
_FEW_VALUES = 10  # of a category that trees get as one column for each value
_WIDEST_EMBEDDING = 16
_FARTHEST = 8.0  # standard deviations; an outlier counts as no more


class Encode(nn.Module):
    """Turn columns into numbers (N, width).

    For `linear` and `mlp` numbers are standardized, gaps are filled with the median and flagged, dates also give sine
    and cosine of week and year. Categories are one-hot, or embedded (`mlp`). Trees (`boosted`) take numbers and gaps as
    they are, dates with the days since the week and the year began, and categories by the mean of their targets.
    """

    median: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, columns: Sequence[Column], train: Split, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.numeric = [index for index, column in enumerate(columns) if column.type != "category"]
        self.gaps = [index for index in self.numeric if columns[index].nullable and kind != "boosted"]
        self.periods = [
            (index, period)
            for index in self.numeric
            if columns[index].type == "datetime"
            for period in (*PERIODS, *((1.0,) if (train.inputs[:, index].nan_to_num() % 1).any() else ()))
        ]
        self.sizes = {index: len(column.values) for index, column in enumerate(columns) if column.type == "category"}
        numbers = train.inputs[:, self.numeric]
        median = numbers.nanmedian(dim=0).values.nan_to_num()
        filled = torch.where(numbers.isnan(), median, numbers)
        self.register_buffer("median", median)
        self.register_buffer("mean", filled.mean(dim=0))
        self.register_buffer("deviation", filled.std(dim=0).clamp(min=1e-6))
        self.tables = nn.ParameterDict(
            {str(index): self._build_table(train, index, size) for index, size in self.sizes.items()}
        )
        with torch.no_grad():
            self.width = self(train.inputs[:1]).shape[1]

    def _build_table(self, train: Split, index: int, size: int) -> nn.Parameter:
        """Return the rows (size + 1, width) that stand for a category's values and, last, for a gap."""
        if self.kind == "mlp":
            return nn.Parameter(0.1 * torch.randn(size + 1, min(_WIDEST_EMBEDDING, size // 2 + 1)))
        rows = torch.eye(size + 1)
        if self.kind == "boosted":
            order = _rank_values(train, index, size)[:, None]
            rows = torch.cat((order, rows), dim=1) if size <= _FEW_VALUES else order
        return nn.Parameter(rows, requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return float32 (N, width)."""
        parts = []
        if self.numeric:
            numbers = inputs[:, self.numeric]
            if self.kind != "boosted":
                numbers = (torch.where(numbers.isnan(), self.median, numbers) - self.mean) / self.deviation
                numbers = numbers.clamp(-_FARTHEST, _FARTHEST)
            parts.append(numbers)
        if self.gaps:
            parts.append(inputs[:, self.gaps].isnan().float())
        for index, period in self.periods:
            days = inputs[:, index : index + 1]
            days = days - period * (days / period).floor()
            waves = torch.cat((torch.sin(2 * math.pi / period * days), torch.cos(2 * math.pi / period * days)), dim=1)
            # Sines differ in the last bit from library to library, on either side of a tree's threshold.
            parts.append(days if self.kind == "boosted" else torch.where(waves.isnan(), 0.0, waves))
        for index, size in self.sizes.items():
            codes = torch.where(inputs[:, index].isnan(), float(size), inputs[:, index])
            parts.append(F.embedding(codes.clamp(0, size).long(), self.tables[str(index)]))
        return torch.cat(parts, dim=1)


def _rank_values(train: Split, index: int, size: int) -> Tensor:
    """Return the rank of each value by the mean of its targets in training (size + 1,); NaN for a gap."""
    codes, targets = train.inputs[:, index], train.targets.reshape(-1).float()
    overall = targets.mean()
    means = torch.stack(
        [(targets[codes == value].sum() + overall) / ((codes == value).sum() + 1) for value in range(size)]
    )
    return torch.cat((means.argsort().argsort().float(), torch.tensor([math.nan])))


class Mlp(nn.Sequential):
    """Encoded columns, two hidden layers, and K outputs."""

    def __init__(self, encode: Encode, outputs: int) -> None:
        super().__init__(
            encode,
            nn.Linear(encode.width, 128),
            nn.ReLU(),
            nn.Dropout(0.15),
            nn.Linear(128, 64),
            nn.ReLU(),
            nn.Dropout(0.15),
            nn.Linear(64, outputs),
        )


class Trees(nn.Module):
    """A fitted `HistGradientBoosting…` of scikit-learn: features (N, width) -> raw scores (N, K).

    scikit-learn computes them here; the exported graph has one TreeEnsembleRegressor, from skl2onnx's conversion.
    """

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - a HistGradientBoostingClassifier or -Regressor
        super().__init__()
        self.model, self.attributes = model, read_trees(model)
        self.outputs: int = self.attributes["n_targets"]

    def forward(self, inputs: Tensor) -> Tensor:
        """Return float32 (N, K)."""
        if torch.compiler.is_exporting():
            scores: Tensor = torch.onnx.ops.symbolic(
                "ai.onnx.ml::TreeEnsembleRegressor",
                (inputs,),
                self.attributes,
                dtype=torch.float32,
                shape=(inputs.shape[0], self.outputs),
                version=3,
            )
            return scores
        score = getattr(self.model, "decision_function", self.model.predict)
        return torch.from_numpy(np.asarray(score(inputs.numpy()), np.float32).reshape(len(inputs), self.outputs))


def read_trees(model: Any) -> dict[str, Any]:  # noqa: ANN401 - see `Trees`
    """Return a model's trees as the attributes of ONNX's TreeEnsembleRegressor."""
    from onnx.helper import get_attribute_value  # noqa: PLC0415 - only to export trees
    from skl2onnx import to_onnx  # noqa: PLC0415

    options = {"zipmap": False, "raw_scores": True} if hasattr(model, "classes_") else None
    sample = np.zeros((1, model.n_features_in_), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the converter uses what numpy and onnx have deprecated
        graph = to_onnx(model, sample, options=options).graph
    node = next(each for each in graph.node if each.op_type.startswith("TreeEnsemble"))
    given = {each.name: get_attribute_value(each) for each in node.attribute}
    parts = {name.replace("class_", "target_"): list(value) for name, value in given.items() if isinstance(value, list)}
    kept = {name: value for name, value in parts.items() if name.startswith(("nodes_", "target_"))}
    base = list(given["base_values"])
    kept["nodes_modes"] = [mode.decode() for mode in kept["nodes_modes"]]
    if len(base) == 1:
        kept["target_ids"] = [0] * len(kept["target_ids"])  # of two classes, only the second has scores
    return kept | {"base_values": base, "n_targets": len(base), "post_transform": "NONE"}


def build_boosted(encode: Encode, model: Any) -> nn.Sequential:  # noqa: ANN401 - see `Trees`
    """Return encoder, trees, and a linear layer that changes nothing until the logits are calibrated."""
    trees = Trees(model)
    last = nn.Linear(trees.outputs, trees.outputs)
    with torch.no_grad():
        last.weight.copy_(torch.eye(trees.outputs))
        last.bias.zero_()
    return nn.Sequential(encode, trees, last)
