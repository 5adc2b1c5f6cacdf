"""Models that are valid and end, stall or fill the process that runs them."""

from pathlib import Path

import numpy as np
import requests
from onnx import TensorProto, helper

from tests import fakes
from tests.fakes import FakeModel
from tests.servers import Server
from tests.wire import napper


def killer(name: str = "killer") -> FakeModel:
    """Regression that ends its process at any input: it divides the smallest int32 by -1 (SIGFPE on x86)."""
    nodes = [
        helper.make_node("Cast", ["inputs"], ["whole"], to=TensorProto.INT32),
        helper.make_node("Mul", ["whole", "zero"], ["zeros"]),
        helper.make_node("Add", ["zeros", "smallest"], ["dividend"]),
        helper.make_node("Div", ["dividend", "minus"], ["quotient"]),
        helper.make_node("Cast", ["quotient"], ["outputs"], to=TensorProto.FLOAT),
    ]
    weights = {
        "zero": np.array(0, np.int32),
        "smallest": np.array(-(2**31), np.int32),
        "minus": np.array(-1, np.int32),
    }
    content = fakes.build_onnx(*nodes, weights=weights, wide=1, out=1)  # type: ignore[arg-type]
    return FakeModel(name, "regression", fakes.tabular("x"), {"kind": "value"}, {"onnx": content})


def glutton() -> FakeModel:
    """Regression whose graph asks for 400 GB."""
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["large"]),
        helper.make_node("ReduceSum", ["large"], ["sum"], keepdims=0),
        helper.make_node("Add", ["inputs", "sum"], ["outputs"]),
    ]
    weights = {"shape": np.array([100_000_000_000], np.int64)}
    content = fakes.build_onnx(*nodes, weights=weights, wide=1, out=1)  # type: ignore[arg-type]
    return FakeModel("glutton", "regression", fakes.tabular("x"), {"kind": "value"}, {"onnx": content})


def endless(name: str = "endless") -> FakeModel:
    """Regression whose graph loops for ever."""
    return napper(name, 10**12)


def write_divider(root: Path) -> None:
    """Write a model without a task, `divider`, that crashes at -2**31 divided by -1."""
    one = ("INT32", [1])
    node = helper.make_node("Div", ["dividend", "divisor"], ["quotient"])
    fakes.write_signature(root, "divider", {"dividend": one, "divisor": one}, {"quotient": one}, node)


def divide(server: Server, dividend: int, divisor: int) -> requests.Response:
    """Ask the divider for a quotient."""
    tensors = {"dividend": dividend, "divisor": divisor}
    inputs = [{"name": key, "datatype": "INT32", "shape": [1], "data": [value]} for key, value in tensors.items()]
    return server.post("/v2/models/divider/infer", {"inputs": inputs})
