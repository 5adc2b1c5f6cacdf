"""Understand an ONNX graph: its input and output, from its tensors, its metadata, samples and what it gives for them.

Only what no flag says is guessed, and each guess is a line that names the flag to correct it by.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from service.errors import InvalidRequestError
from service.model.backends.onnx_runtime import describe_failure, open_session
from service.model.columns import build_row, split_rows
from service.model.manifest import ColumnsInput
from service.packaging.graph import read_classes
from service.packaging.table import Table, build_rows, describe_column, read_table

Outputs = dict[str, NDArray[Any]]
MOST_ROWS = 1000
_FLOATS = ("tensor(float)", "tensor(double)")
_CHANNELS = (1, 3)
_SHOWN = 4  # values of a category
_TABLE, _MAPS, _PICTURE = 2, 3, 4  # ranks of inputs, with the batch
_DATATYPES = {"float32": "FP32", "float64": "FP64", "float16": "FP16", "object": "BYTES"}
_SUM_ERROR = 1e-3


@dataclass
class Understood:
    """What a graph is.

    Attributes:
        options: The command's flags, completed.
        lines: What was understood, how, and the flag that corrects it.
        columns: The manifest's input, where it is typed columns.
        output: The manifest's output, where flags cannot say it.
        rows: The samples as the graph takes them, where the input is columns.
        exact: The same with float64 for float32.
    """

    options: dict[str, Any]
    lines: list[tuple[str, str, str]] = field(default_factory=list)
    columns: ColumnsInput | None = None
    output: dict[str, Any] | None = None
    rows: NDArray[Any] | None = None
    exact: NDArray[Any] | None = None

    def guess(self, flag: str, value: Any, shown: str) -> None:  # noqa: ANN401 - of any flag
        """Take a value for a flag that was not given."""
        self.options[flag] = value
        self.lines.append((flag.replace("_", " "), shown, f"--{flag.replace('_', '-')}"))


def understand(content: bytes, options: dict[str, Any]) -> Understood:
    """Complete the flags of `package` from a graph.

    Raises:
        InvalidRequestError: The graph does not say enough; the message names the flag that does.
        ModelRefusedError: The graph does not load.
    """
    found = Understood(dict(options))
    if options["task"] == "tensors":
        return found
    session = open_session(content, "cpu", 1)
    if not _understand_input(session, found):
        if options["task"] is None:
            found.guess(
                "task", "tensors", "tensors: served by /v2 alone, since the inputs are neither a table nor a picture"
            )
        return found
    is_said = bool(options["task"] and options["labels"])
    if found.columns is None and is_said and (options["output_tensor"] or len(session.get_outputs()) == 1):
        return found
    _understand_output(content, session, found)
    return found


def _understand_input(session: ort.InferenceSession, found: Understood) -> bool:
    """Complete the input; return False for tensors that are neither a table nor a picture."""
    nodes, options = session.get_inputs(), found.options
    node, table = nodes[0], _read_samples(found)
    is_float = node.type == "tensor(float)"
    if len(nodes) == 1 and is_float and (options["image"] or len(node.shape) in (_MAPS, _PICTURE)):
        return bool(options["image"]) or _understand_picture(node, found)
    if any(len(each.shape) > _TABLE or (len(nodes) > 1 and each.shape[1:] not in ([], [1])) for each in nodes):
        return False
    known = options.get("column_types")
    if len(nodes) == 1 and is_float and not known and (table is None or table.is_plain):
        width = node.shape[-1]
        if not options["features"] and not options["samples"] and isinstance(width, int):
            names = [f"x{index}" for index in range(width)]
            found.guess("features", names, f"{width} numbers, {names[0]} to {names[-1]}")
        return True
    if len(nodes) == 1 and node.type not in ("tensor(string)", *_FLOATS) and table is None:
        return False  # such as the numbers of words
    found.columns = _describe_columns(nodes, found, table)
    found.exact = build_rows(found.columns, table, MOST_ROWS) if table else build_row(found.columns)
    found.rows = found.exact.astype(found.columns.row_dtype)
    found.options["features"] = None
    for column in found.columns.columns:
        kind = f"{column.type}{' or null' if column.nullable else ''}"
        values = [*map(str, column.values[:_SHOWN]), *(["…"] if len(column.values) > _SHOWN else [])]
        shown = f"{kind}: {', '.join(values)}" if values else kind
        if column.minimum is not None and column.maximum is not None:
            shown += f": {column.minimum:g} to {column.maximum:g}"
        found.lines.append((f"column {column.name}", shown, "--samples"))
    return True


def _read_samples(found: Understood) -> Table | None:
    """Return the table of samples, if there is one; pictures are none."""
    options = found.options
    if not options["samples"] or options["image"]:
        return None
    names = _split(options["features"])
    try:
        table = read_table(Path(options["samples"]), names)
    except InvalidRequestError:
        if options["features"] or options["task"]:
            return None  # as plain numbers, it is read and refused elsewhere
        raise
    return table.pick(names) if names and set(names) <= set(table.columns) else table


def _split(given: Any) -> list[str]:  # noqa: ANN401 - text or names
    return [part.strip() for part in given.split(",")] if isinstance(given, str) else list(given or [])


def _understand_picture(node: Any, found: Understood) -> bool:  # noqa: ANN401 - onnxruntime's NodeArg
    sizes = node.shape[1:]
    if found.options["features"]:
        return True
    if len(sizes) < _PICTURE - 1 and not all(isinstance(size, int) for size in sizes):
        return False  # such as a series of any length
    if not all(isinstance(size, int) for size in sizes):
        raise InvalidRequestError(
            f"the graph takes pictures of any size ({node.shape}); say which: --image WIDTHxHEIGHTxCHANNELS"
        )
    if len(sizes) == _PICTURE - 1 and sizes[0] in _CHANNELS:
        channels, height, width = sizes
    elif len(sizes) == _PICTURE - 1 and sizes[2] in _CHANNELS:
        height, width, channels = sizes
    else:
        return False
    found.guess("image", f"{width}x{height}x{channels}", f"{width}x{height}, {channels} channels, numbers in [0, 1]")
    if sizes[0] != channels:
        found.options["input_shape"] = ",".join(map(str, sizes))
    return True


def read_picture(options: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Return width, height and channels by `--image`, and the shape of a picture's tensor.

    Raises:
        InvalidRequestError: The flags say no size, or contradict each other.
    """
    if options["features"]:
        raise InvalidRequestError("give --features for a tabular model or --image for an image model, one of the two")
    size = _read_numbers(options["image"], "x", "--image")
    if len(size) not in (_TABLE, _MAPS):
        raise InvalidRequestError(f"--image {options['image']} is not WIDTHxHEIGHT or WIDTHxHEIGHTxCHANNELS")
    width, height, channels = [*size, 1][:3]
    shape = [channels, height, width]
    if options["input_shape"]:
        shape = _read_numbers(options["input_shape"], ",", "--input-shape")
    return [width, height, channels], shape


def _read_numbers(text: str, separator: str, flag: str) -> list[int]:
    parts = [part.strip() for part in text.lower().split(separator)]
    if not all(part.isascii() and part.isdecimal() and int(part) > 0 for part in parts):
        raise InvalidRequestError(f"{flag} {text} is not whole numbers separated by {separator}")
    return [int(part) for part in parts]


def _describe_columns(nodes: list[Any], found: Understood, table: Table | None) -> ColumnsInput:
    known = found.options.get("column_types", {})
    if len(nodes) > 1:
        if table is not None:
            table = table.pick([node.name for node in nodes])
        cells = {} if table is None else table.columns
        columns = [
            describe_column(node.name, node.type, cells.get(node.name, []), known.get(node.name, "")) for node in nodes
        ]
        return ColumnsInput.model_validate({"kind": "columns", "columns": columns})
    node = nodes[0]
    width = node.shape[-1] if len(node.shape) == _TABLE and isinstance(node.shape[-1], int) else 1
    names = _split(found.options["features"]) or ([*table.columns] if table else [])
    names = names or ([node.name] if width == 1 else [f"x{index}" for index in range(width)])
    cells = {} if table is None else table.columns
    columns = [describe_column(name, node.type, cells.get(name, []), known.get(name, "")) for name in names]
    feed = {"tensor(string)": "strings", "tensor(float)": "floats"}.get(node.type, "columns")
    if feed == "columns":
        columns = [column | {"tensor": node.name} for column in columns]
    tensor = {} if feed == "columns" else {"tensor": node.name}
    return ColumnsInput.model_validate({"kind": "columns", "columns": columns, "feed": feed} | tensor)


def _understand_output(content: bytes, session: ort.InferenceSession, found: Understood) -> None:
    options, outputs = found.options, _try(session, found)
    is_pair = len(outputs) == 2 and not options["output_tensor"] and options["task"] != "outputs"  # noqa: PLR2004 - scikit-learn's label and table
    floats = [name for name, output in outputs.items() if output.dtype.kind == "f"]
    labels = [name for name, output in outputs.items() if output.dtype.kind in "iOU" and output.ndim == 1]
    tables = [name for name, output in outputs.items() if output.dtype.kind == "i" and output.ndim == _TABLE]
    if is_pair and len(floats) == len(tables) == 1 and outputs[floats[0]].shape == outputs[tables[0]].shape:
        _describe_labels(outputs[floats[0]].shape[1], floats[0], found)
        return
    if is_pair and len(floats) == len(labels) == 1:
        found.guess("output_tensor", floats[0], f"{floats[0]}, beside the class in {labels[0]}")
    elif not options["output_tensor"] and (len(outputs) > 1 or next(iter(outputs.values())).ndim > _TABLE):
        _describe_outputs(outputs, found)
        return
    name = options["output_tensor"] or next(iter(outputs))
    if name not in outputs:
        return  # said where the graph is opened
    table = np.asarray(outputs[name], np.float32).reshape(len(outputs[name]), -1)
    classes = (
        [] if options["labels"] else read_classes(content, session.get_modelmeta().custom_metadata_map, table.shape[1])
    )
    _understand_table(table, classes, bool(labels), found)


def _try(session: ort.InferenceSession, found: Understood) -> Outputs:
    """Return what the graph gives for a few rows."""
    node = session.get_inputs()[0]
    if found.rows is not None and found.columns is not None:
        ranks = {each.name: len(each.shape) for each in session.get_inputs()}
        rows = split_rows(found.rows[:64])
        fed = {name: tensor.reshape(-1) if ranks.get(name) == 1 else tensor for name, tensor in rows.items()}
    elif found.options["image"]:
        _, shape = read_picture(found.options)
        fed = {node.name: np.random.default_rng(0).random((2, *shape), dtype=np.float32)}
    else:
        width = node.shape[-1] if isinstance(node.shape[-1], int) else len(_split(found.options["features"])) or 1
        fed = {node.name: np.random.default_rng(0).standard_normal((8, width)).astype(np.float32)}
    names = [each.name for each in session.get_outputs()]
    try:
        outputs = session.run(names, fed)
    except Exception as error:  # onnxruntime raises about a dozen exception types
        shape = node.shape
        if len(shape) < _TABLE or isinstance(shape[0], int):
            raise InvalidRequestError(
                f"the graph takes {shape} and no batch of any size; export it with a dynamic first dimension"
            ) from error
        raise InvalidRequestError(f"the graph does not run on a few rows: {describe_failure(error, 'cpu')}") from error
    return {name: np.asarray(output) for name, output in zip(names, outputs, strict=True)}


def _describe_outputs(outputs: Outputs, found: Understood) -> None:
    named = []
    for name, output in outputs.items():
        datatype = _DATATYPES.get(output.dtype.name) or output.dtype.name.upper()
        shape = list(output.shape[1:])
        named.append({"name": name, "datatype": datatype, "shape": shape})
        if found.options["task"] in (None, "outputs"):
            found.lines.append((f"output {name}", f"{named[-1]['datatype']} {shape}", "--output-tensor, for one alone"))
    if found.options["task"] is None:
        found.options["task"] = "outputs"
    if found.options["task"] == "outputs":
        found.output = {"kind": "tensors", "outputs": named}


def _describe_labels(width: int, name: str, found: Understood) -> None:
    """Take a table of probabilities beside one of yes and no as several labels that each apply or not."""
    if found.options["task"] is None:
        found.guess("task", "multilabel", f"multilabel, with {width} labels that each apply or not")
    if not found.options["labels"]:
        found.guess("labels", [str(index) for index in range(width)], f"0 to {width - 1}; @FILE has one a line")
    if found.options["task"] == "multilabel":
        found.output = {"kind": "probabilities", "labels": _split(found.options["labels"]), "tensor": name}


def _understand_table(table: NDArray[np.float32], classes: list[str], has_labels: bool, found: Understood) -> None:
    """Choose task, kind and labels for an output (N, K)."""
    options, width = found.options, table.shape[1]
    is_share = bool((table >= -_SUM_ERROR).all() and (table <= 1 + _SUM_ERROR).all())
    is_sum = is_share and width > 1 and bool(np.allclose(table.sum(axis=1), 1, atol=_SUM_ERROR))
    if not options["labels"] and classes:
        found.guess("labels", classes, f"{len(classes)} of the graph: {', '.join(classes[:4])}{', …' * (width > 4)}")  # noqa: PLR2004
    is_classes = bool(options["labels"]) or is_sum or has_labels or (bool(options["image"]) and width > 1)
    if options["task"] is None and is_classes:
        is_two = width == 1 or (width == 2 and is_sum)  # noqa: PLR2004 - two labels
        found.guess(
            "task",
            "binary" if is_two else "multiclass",
            f"{'binary' if is_two else 'multiclass'}, from {width} outputs",
        )
    elif options["task"] is None:
        found.guess("task", "regression", f"regression of {width} value{'s' * (width > 1)}; with --labels, classes")
    if options["task"] in ("binary", "multiclass") and not options["labels"] and width > 1:
        names = [str(index) for index in range(width)]
        found.guess("labels", names, f"{names[0]} to {names[-1]}; @FILE has one a line")
    if options["task"] in ("binary", "multiclass") and options["output_kind"] is None and width > 1:
        kind = "probabilities" if is_sum else "logits"
        found.guess("output_kind", kind, f"{kind}: {'rows sum to 1' if is_sum else 'rows do not sum to 1'}")
    if options["task"] == "binary" and options["output_kind"] is None and width == 1 and not is_share:
        found.guess("output_kind", "logits", "logits: beyond 0 and 1")
    if options["task"] == "regression" and width > 1:
        if not options["values"]:
            found.guess("values", [f"y{index}" for index in range(width)], f"{width} numbers, y0 to y{width - 1}")
        found.output = {"kind": "values", "values": [{"name": name} for name in _split(options["values"])]}
