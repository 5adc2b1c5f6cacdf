"""Read and change the ONNX graph itself, which needs the package onnx: class names, ZipMap, normalisation."""

import ast
from importlib.util import find_spec
from typing import Any

import numpy as np

from service.errors import InvalidRequestError
from service.model.manifest.parts import find_dtype

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


def free_batch(content: bytes) -> tuple[bytes, int]:
    """Return a graph that takes any number of rows, and how many it took if that was fixed.

    Exports fix the batch at the size of their example unless they are told not to. The graph stays as it is, and the
    number is 0, if no batch is fixed, or if the graph does not run with another.
    """
    if find_spec("onnx") is None:
        return content, 0
    from google.protobuf.message import DecodeError  # noqa: PLC0415 - comes with onnx

    try:
        model = _parse(content, "")
    except DecodeError:  # onnxruntime says so, too
        return content, 0
    weights = {each.name for each in model.graph.initializer}
    nodes = [each for each in model.graph.input if each.name not in weights]
    sizes = {tuple(dim.dim_value for dim in each.type.tensor_type.shape.dim) for each in nodes}
    fixed = {size[0] for size in sizes if len(size) > 1 and all(size)}
    if len(fixed) != 1 or any(len(size) < 2 or not all(size) for size in sizes):  # noqa: PLR2004 - rows and a batch
        return content, 0
    batch = fixed.pop()
    for each in [*nodes, *model.graph.output]:
        dims = each.type.tensor_type.shape.dim
        if dims and dims[0].dim_value == batch:
            dims[0].dim_param = "batch"
    del model.graph.value_info[:]
    freed: bytes = model.SerializeToString()
    return (freed, batch) if _takes_batch(freed, 2 * batch) else (content, 0)


def _takes_batch(content: bytes, batch: int) -> bool:
    """Tell whether a graph, all of whose other sizes are fixed, gives an output for each of so many rows."""
    from service.model.backends.onnx_runtime import open_session  # noqa: PLC0415 - each backend is optional
    from service.model.tensor_model import read_tensor_specs  # noqa: PLC0415

    try:
        session = open_session(content, "cpu", 1)
        inputs, _ = read_tensor_specs(session)
        rows = {spec.name: np.zeros((batch, *spec.shape[1:]), find_dtype(spec.datatype)) for spec in inputs}
        outputs = session.run(None, rows)
    except Exception:  # onnxruntime raises about a dozen exception types
        return False
    return all(len(np.shape(output)) > 0 and len(output) == batch for output in outputs)


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
