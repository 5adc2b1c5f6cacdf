"""Graphs whose batch is fixed, or that have none, as exports leave them unless they are told not to."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from service.__main__ import main
from service.model.version_folder import load_any_manifest


def write_graph(path: Path, shape: list[Any], nodes: list[Any], output: list[Any]) -> None:
    """Write a graph from `x` of a shape to `y`, with a matrix `w` (4, 3) and a shape `s` of one row."""
    weights = [
        numpy_helper.from_array(np.ones((4, 3), np.float32), "w"),
        numpy_helper.from_array(np.array([1, 3]), "s"),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def package(path: Path) -> int:
    """Package a file beside its folder; return the exit status."""
    return main(["package", str(path), "--models-dir", str(path.parent / "models")])


@pytest.mark.parametrize("batch", [1, 5])
def test_fixed_batch_is_freed(tmp_path: Path, capsys: pytest.CaptureFixture[str], batch: int) -> None:
    """A graph that was exported for one size of batch takes any."""
    path = tmp_path / "fixed.onnx"
    write_graph(path, [batch, 4], [helper.make_node("MatMul", ["x", "w"], ["y"])], [batch, 3])
    assert package(path) == 0
    assert f"any size; the export had fixed it at {batch}" in capsys.readouterr().out
    manifest = load_any_manifest(tmp_path / "models/fixed/1")
    assert manifest.task == "regression"


@pytest.mark.parametrize(
    ("shape", "nodes", "shown"),
    [
        (
            [1, 4],
            [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Reshape", ["m", "s"], ["y"])],
            "[1, 4]",
        ),
        ([4], [helper.make_node("MatMul", ["x", "w"], ["y"])], "[4]"),
    ],
)
def test_batch_that_cannot_be_freed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shape: list[int], nodes: list[Any], shown: str
) -> None:
    """A graph that reshapes to one row, or knows no rows, is refused with what to export instead."""
    path = tmp_path / "fixed.onnx"
    write_graph(path, shape, nodes, [1, 3] if len(shape) > 1 else [3])
    assert package(path) == 1
    error = capsys.readouterr().err
    assert f"the graph takes {shown} and no batch of any size; export it with a dynamic first dimension" in error


def test_series_of_any_length_and_unlike_inputs_are_tensors(tmp_path: Path) -> None:
    """What is neither a table nor a picture is served by its tensors."""
    path = tmp_path / "series.onnx"
    write_graph(path, ["n", "t", 4], [helper.make_node("MatMul", ["x", "w"], ["y"])], ["n", "t", 3])
    assert package(path) == 0
    assert load_any_manifest(tmp_path / "models/series/1").task == "tensors"


@pytest.mark.parametrize("is_module", [True, False])
def test_what_torch_save_writes_is_no_graph(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], is_module: bool
) -> None:
    """Weights and pickled modules are refused with what to export instead."""
    module = torch.nn.Linear(2, 1)
    torch.save(module if is_module else module.state_dict(), tmp_path / "model.pt")
    assert package(tmp_path / "model.pt") == 1
    assert "as torch.save writes them, and no graph; export the module with torch.onnx" in capsys.readouterr().err
