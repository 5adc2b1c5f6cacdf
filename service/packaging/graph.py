"""Read and change the ONNX graph itself, which needs the package onnx: class names, ZipMap, normalisation."""

import ast
from importlib.util import find_spec
from typing import Any

import numpy as np

from service.errors import InvalidRequestError

_CLASSES = ("classlabels_strings", "classlabels_int64s", "classlabels_ints")


def strip_zipmap(content: bytes) -> bytes:
    """Return a graph without the ZipMap node that skl2onnx adds; its output is then the table of probabilities.

    Raises:
        InvalidRequestError: There is such a node, and the package onnx is not installed.
    """
    if b"ZipMap" not in content:
        return content
    model = _parse(content, 'the graph ends in a ZipMap; export it with to_onnx(…, options={"zipmap": False}), or')
    graph = model.graph
    for node in [each for each in graph.node if each.op_type == "ZipMap"]:
        for output in graph.output:
            if output.name == node.output[0]:
                output.name = node.input[0]
                output.type.Clear()
                output.type.tensor_type.elem_type = 1
                output.type.tensor_type.shape.dim.add()
                output.type.tensor_type.shape.dim.add()
        graph.node.remove(node)
    result: bytes = model.SerializeToString()
    return result


def normalize(content: bytes, mean: list[float], std: list[float]) -> bytes:
    """Return a graph that first subtracts `mean` and divides by `std`, one number for each channel of (N, C, H, W).

    Raises:
        InvalidRequestError: The package onnx is not installed.
    """
    model = _parse(content, "--mean and --std are written into the graph:")
    from onnx import helper, numpy_helper  # noqa: PLC0415 - an extra

    graph = model.graph
    name = graph.input[0].name
    for node in graph.node:
        for index, each in enumerate(node.input):
            if each == name:
                node.input[index] = "normalized_input"
    for key, values in (("input_mean", mean), ("input_std", std)):
        graph.initializer.append(numpy_helper.from_array(np.array(values, np.float32).reshape(1, -1, 1, 1), key))
    graph.node.insert(0, helper.make_node("Sub", [name, "input_mean"], ["centred_input"]))
    graph.node.insert(1, helper.make_node("Div", ["centred_input", "input_std"], ["normalized_input"]))
    result: bytes = model.SerializeToString()
    return result


def read_classes(content: bytes, metadata: dict[str, str], width: int) -> list[str]:
    """Return the class names that a graph knows, [] if it has not `width` of them."""
    for key in ("classes", "labels", "names", "class_names"):
        if found := _read_names(metadata.get(key, "")):
            return found if len(found) == width else []
    if b"classlabels" not in content or find_spec("onnx") is None:
        return []
    from onnx import helper  # noqa: PLC0415 - an extra

    for node in _parse(content, "").graph.node:
        for attribute in node.attribute:
            if attribute.name in _CLASSES and len(values := helper.get_attribute_value(attribute)) == width:
                return [value.decode() if isinstance(value, bytes) else str(value) for value in values]
    return []


def _read_names(text: str) -> list[str]:
    """Return names written as a list, as a dict from index to name, or separated by commas."""
    if not text:
        return []
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return [part.strip() for part in text.split(",")]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
    return [str(each) for each in values]


def _parse(content: bytes, reason: str) -> Any:  # noqa: ANN401 - an onnx.ModelProto
    if find_spec("onnx") is None:
        raise InvalidRequestError(f"{reason} install onnx: pip install onnx".strip())
    import onnx  # noqa: PLC0415 - an extra

    return onnx.load_from_string(content)
