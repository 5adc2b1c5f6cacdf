"""Convert models of other libraries to ONNX, and prove that the graph answers as the library itself does.

Only `package` does this, on the machine of whoever has the model; the service never unpickles anything.
"""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidRequestError, ModelRefusedError
from service.model.backends import open_backend
from service.model.manifest import BackendName, Manifest
from service.packaging.table import find_type, read_table

Predict = Callable[[Any], NDArray[Any]]
TOLERANCE = 1e-4
_SUFFIXES = (".pkl", ".pickle", ".joblib", ".json", ".ubj", ".txt", ".pt2")
_PICKLES = (".pkl", ".pickle", ".joblib")
_ROWS = 1000
_LOCALE = "C.UTF-8"  # the graph's default, en_US.UTF-8, is missing in most containers
_HINT = "pip install 'model-service[convert]'"


@dataclass(frozen=True)
class Converted:
    """An ONNX graph, what the library knows of it as flags, and the library's own answers, (N, K) for N inputs.

    `beside` is the model itself, where it can be served beside the graph.
    """

    content: bytes
    predict: Predict
    flags: dict[str, Any] = field(default_factory=dict)
    beside: dict[BackendName, bytes] = field(default_factory=dict)


def is_convertible(path: Path) -> bool:
    """Return whether a file is, by its name, a model of another library."""
    return path.suffix in _SUFFIXES


def check_file(path: Path) -> None:
    """Check that there is a file with something in it.

    Raises:
        InvalidRequestError: There is none, it is a folder, or it is empty.
    """
    if not path.exists():
        raise InvalidRequestError(f"{path} does not exist; give the path of a model's file")
    if not path.is_file():
        raise InvalidRequestError(f"{path} is a folder, not a file; give the model's file")
    if not path.stat().st_size:
        raise InvalidRequestError(f"{path} is empty; write the model's file again")


def convert(path: Path, options: dict[str, Any]) -> Converted:
    """Convert a model to an ONNX graph.

    Raises:
        InvalidRequestError: It cannot be read or converted, a library is missing, or it is a pickle and nobody has said
            that it is trusted.
    """
    check_file(path)
    if path.suffix in _PICKLES and not options["trust_pickle"]:
        raise InvalidRequestError(
            f"reading {path} can run whatever code is in it, as with every pickle; if you trust it, say --trust-pickle"
        )
    try:
        if path.suffix == ".pt2":
            return _convert_program(path, options)
        if path.suffix in (".json", ".ubj"):
            return _convert_xgboost_file(path)
        if path.suffix == ".txt":
            return _convert_lightgbm_file(path)
        return _convert_object(_unpickle(path), options)
    except ImportError as error:
        raise InvalidRequestError(
            f"converting {path.name} needs {error.name}, which is not installed: {_HINT}"
        ) from error
    except InvalidRequestError:
        raise
    except ModelRefusedError as error:
        raise InvalidRequestError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # each library raises its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InvalidRequestError(f"{path} cannot be converted to ONNX: {reason}") from error


def check_parity(manifest: Manifest, content: bytes, converted: Converted, rows: NDArray[Any] | None) -> None:
    """Check that the graph answers as the library does: numbers within 1e-4, and equal labels.

    Raises:
        InvalidRequestError: It does not.
    """
    if rows is None or manifest.golden_rows is None:
        golden = manifest.golden_rows
        assert golden is not None
        rows = golden.inputs
        if manifest.input.kind == "tabular":
            noise = np.random.default_rng(0).standard_normal((_ROWS, *rows.shape[1:])).astype(np.float32)
            rows = np.concatenate([rows, noise * np.abs(rows).max(axis=0)])
    actual = open_backend("onnx", content, manifest, "cpu", 1).run(rows)
    if actual.dtype.names:
        return
    expected = np.asarray(converted.predict(rows), np.float64)
    expected = expected.reshape(len(rows), -1)
    if expected.shape[1] == 1 and actual.shape[1] == 2:  # noqa: PLR2004 - a probability of the second label
        expected = np.concatenate([1 - expected, expected], axis=1)
    if expected.shape != actual.shape:
        raise InvalidRequestError(f"the library answers {list(expected.shape)}, the graph {list(actual.shape)}")
    limit = TOLERANCE * np.maximum(1, np.abs(expected))
    difference = np.abs(actual - expected)
    if not (difference <= limit).all():
        row = int(np.argmax(difference.max(axis=1)))
        raise InvalidRequestError(
            f"the graph differs from the library by {difference.max():.2g} in row {row + 1}; nothing was written"
        )
    if manifest.task in ("binary", "multiclass") and actual.shape[1] > 1:
        best = np.sort(expected, axis=1)
        is_clear = best[:, -1] - best[:, -2] > 2 * TOLERANCE
        if (actual.argmax(axis=1) != expected.argmax(axis=1))[is_clear].any():
            raise InvalidRequestError("the graph and the library give different labels; nothing was written")


def _unpickle(path: Path) -> Any:  # noqa: ANN401 - whatever it is
    try:
        import joblib  # noqa: PLC0415 - an extra; it reads plain pickles too
    except ImportError:
        return pickle.loads(path.read_bytes())
    return joblib.load(path)


def _convert_object(model: Any, options: dict[str, Any]) -> Converted:  # noqa: ANN401 - an estimator of some library
    classes = [str(each) for each in getattr(model, "classes_", [])] or None
    if hasattr(model, "get_booster"):
        return _convert_booster(model.get_booster(), classes)
    if hasattr(model, "booster_"):
        return _convert_lightgbm(model.booster_, classes)
    if type(model).__name__ == "Booster" and hasattr(model, "num_model_per_iteration"):
        return _convert_lightgbm(model, classes)
    return _convert_sklearn(model, options, classes)


def _convert_sklearn(model: Any, options: dict[str, Any], classes: list[str] | None) -> Converted:  # noqa: ANN401
    from skl2onnx import to_onnx  # noqa: PLC0415 - an extra
    from skl2onnx.common import data_types as types  # noqa: PLC0415

    steps = [step for _, step in getattr(model, "steps", [("", model)])]
    names = [str(name) for name in getattr(model, "feature_names_in_", [])]
    flags: dict[str, Any] = {"labels": classes if hasattr(model, "predict_proba") else None}
    if hasattr(steps[0], "vocabulary_") or type(steps[0]).__name__.endswith("Vectorizer"):
        initial = [("text", types.StringTensorType([None, 1]))]
        flags["features"] = _first_column(options)
        shape: Predict = lambda rows: rows[rows.dtype.names[0]][:, 0]  # noqa: E731
    elif type(steps[0]).__name__ == "ColumnTransformer":
        initial = _read_types(names, options, types)
        shape = _build_frame
    else:
        initial = [("inputs", types.FloatTensorType([None, model.n_features_in_]))]
        flags["features"] = None if options["samples"] and not names else names or None
        shape = lambda rows: _as_known(_as_array(rows), names)  # noqa: E731
    predict = getattr(model, "predict_proba", model.predict)
    extra = {"options": {"zipmap": False}} if hasattr(model, "predict_proba") else {}
    graph = to_onnx(model, initial_types=initial, **extra)
    return Converted(_set_locale(graph), lambda rows: predict(shape(rows)), flags)


def _first_column(options: dict[str, Any]) -> list[str]:
    if not options["samples"]:
        return ["text"]
    table = read_table(Path(options["samples"]), [])
    return [next((name for name, cells in table.columns.items() if find_type(cells) == "text"), "text")]


def _read_types(names: list[str], options: dict[str, Any], types: Any) -> list[tuple[str, Any]]:  # noqa: ANN401
    if not options["samples"]:
        raise InvalidRequestError("give --samples, rows of the training data: they say the type of each column")
    table = read_table(Path(options["samples"]), names).pick(names)
    kinds = {
        "number": types.FloatTensorType, "integer": types.Int64TensorType, "boolean": types.BooleanTensorType,
        "text": types.StringTensorType,
    }  # fmt: skip
    found = []
    for name, cells in table.columns.items():
        kind = find_type(cells)
        if "" in cells and kind == "boolean":
            raise InvalidRequestError(f"column {name} is boolean with nulls; make it numbers, 0 and 1, and train anew")
        found.append((name, kinds["number" if kind == "integer" and "" in cells else kind]([None, 1])))
    return found


def _build_frame(rows: NDArray[Any]) -> Any:  # noqa: ANN401 - a pandas.DataFrame
    import pandas  # noqa: PLC0415 - scikit-learn models with columns were fitted on one

    return pandas.DataFrame({name: rows[name][:, 0] for name in rows.dtype.names or ()})


def _as_array(rows: NDArray[Any]) -> NDArray[Any]:
    return rows[rows.dtype.names[0]] if rows.dtype.names else rows


def _as_known(rows: NDArray[Any], names: list[str]) -> Any:  # noqa: ANN401 - an array or a pandas.DataFrame
    if not names:
        return rows
    import pandas  # noqa: PLC0415 - the model was fitted on its frame

    return pandas.DataFrame(rows, columns=names)


def _set_locale(graph: Any) -> bytes:  # noqa: ANN401 - an onnx.ModelProto
    from onnx import helper  # noqa: PLC0415 - comes with the converters

    for node in graph.graph.node:
        if node.op_type == "StringNormalizer" and not any(each.name == "locale" for each in node.attribute):
            node.attribute.append(helper.make_attribute("locale", _LOCALE))
    content: bytes = graph.SerializeToString()
    return content


def _convert_xgboost_file(path: Path) -> Converted:
    import xgboost  # noqa: PLC0415 - an extra

    return _convert_booster(xgboost.Booster(model_file=str(path)), None)


def _convert_booster(booster: Any, classes: list[str] | None) -> Converted:  # noqa: ANN401 - xgboost.Booster
    from onnxmltools import convert_xgboost  # noqa: PLC0415 - an extra
    from onnxmltools.convert.common.data_types import FloatTensorType  # noqa: PLC0415

    names = list(booster.feature_names or [])
    if any(kind == "c" for kind in booster.feature_types or []):
        raise InvalidRequestError("the booster has categories of its own, which ONNX has not; train it on 0/1 columns")
    booster.feature_names = None  # the converter wants f0, f1, …
    width = booster.num_features()
    graph = convert_xgboost(booster, initial_types=[("inputs", FloatTensorType([None, width]))])
    objective = json.loads(booster.save_config())["learner"]["objective"]["name"]
    is_class = objective.startswith(("binary", "multi"))
    flags = {"features": names or None, "labels": classes if is_class else None}
    return Converted(graph.SerializeToString(), lambda rows: booster.inplace_predict(_as_array(rows)), flags)


def _convert_lightgbm_file(path: Path) -> Converted:
    import lightgbm  # noqa: PLC0415 - an extra

    return _convert_lightgbm(lightgbm.Booster(model_file=str(path)), None)


def _convert_lightgbm(booster: Any, classes: list[str] | None) -> Converted:  # noqa: ANN401 - lightgbm.Booster
    from onnxmltools import convert_lightgbm  # noqa: PLC0415 - an extra
    from onnxmltools.convert.common.data_types import FloatTensorType  # noqa: PLC0415

    initial = [("inputs", FloatTensorType([None, booster.num_feature()]))]
    objective = str(booster.dump_model(num_iteration=1).get("objective", ""))
    is_class = objective.startswith(("binary", "multiclass"))
    graph = convert_lightgbm(booster, initial_types=initial, **({"zipmap": False} if is_class else {}))
    flags = {"features": list(booster.feature_name()), "labels": classes if is_class else None}
    return Converted(graph.SerializeToString(), lambda rows: booster.predict(_as_array(rows)), flags)


def _convert_program(path: Path, options: dict[str, Any]) -> Converted:
    """Convert a program of torch.export with a dynamic batch; it is served itself, too, if it has one output."""
    from service.model.backends.exported_program import convert_program  # noqa: PLC0415 - torch is optional

    if options["mean"] is not None or options["std"] is not None:
        raise InvalidRequestError("--mean and --std are for ONNX graphs; put them into the module before torch.export")
    content = path.read_bytes()
    graph, run = convert_program(content)
    if run is None:
        return Converted(graph, lambda rows: rows)  # several outputs, which are not compared
    return Converted(graph, lambda rows: run(_as_array(rows)), beside={"torch-export": content})
