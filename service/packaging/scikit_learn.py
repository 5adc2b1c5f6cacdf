"""Convert estimators and pipelines of scikit-learn to ONNX by skl2onnx (https://onnx.ai/sklearn-onnx)."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidRequestError
from service.packaging.converted import Converted, Predict, read_array
from service.packaging.table import find_type, read_table

_LOCALE = "C.UTF-8"  # the graph's default, en_US.UTF-8, is missing in most containers
_OPSETS = {"": 17, "ai.onnx.ml": 3}  # the newest of the second that each of skl2onnx's converters writes


def convert_estimator(model: Any, options: dict[str, Any], classes: list[str] | None) -> Converted:  # noqa: ANN401
    """Convert an estimator, or a pipeline of them.

    Args:
        model: It.
        options: The command's flags.
        classes: Its labels.

    Raises:
        InvalidRequestError: The service cannot answer with what it predicts, or it needs samples and there are none.
    """
    from skl2onnx import to_onnx  # noqa: PLC0415 - an extra
    from skl2onnx.common.data_types import FloatTensorType, StringTensorType  # noqa: PLC0415
    from sklearn.base import is_classifier, is_regressor  # noqa: PLC0415

    _check_classifier(model)
    _register_boosters()
    extra: dict[str, Any] = {"options": {"zipmap": False}} if hasattr(model, "predict_proba") else {}
    predict = getattr(model, "predict_proba", model.predict)
    steps = [step for _, step in getattr(model, "steps", [("", model)])]
    names = [str(name) for name in getattr(model, "feature_names_in_", [])]
    flags: dict[str, Any] = {"labels": classes if hasattr(model, "predict_proba") else None}
    types: dict[str, str | list[str]] = {}
    if not (is_classifier(model) or is_regressor(model)):
        flags["task"] = "outputs"  # such as clusters
    if hasattr(steps[0], "vocabulary_") or type(steps[0]).__name__.endswith("Vectorizer"):
        initial = [("text", StringTensorType([None, 1]))]
        flags["features"] = _first_column(options)
        types = {flags["features"][0]: "text"}
        shape: Predict = lambda rows: rows[rows.dtype.names[0]][:, 0]  # noqa: E731
    elif type(steps[0]).__name__ == "ColumnTransformer":
        texts, unused = _list_texts(steps[0])
        kinds = _read_types([name for name in names if name not in unused], options)
        graph, types = _convert_columns(model, kinds, extra)
        types |= dict.fromkeys(texts, "text")
        return Converted(graph, lambda rows: predict(_build_frame(rows, kinds)), flags, types=types)
    else:
        initial = [("inputs", FloatTensorType([None, model.n_features_in_]))]
        flags["features"] = None if options["samples"] and not names else names or None
        shape = lambda rows: _as_known(np.asarray(read_array(rows), np.float64), names)  # noqa: E731
    graph = _set_locale(to_onnx(model, initial_types=initial, target_opset=_OPSETS, **extra))
    return Converted(graph, lambda rows: predict(shape(rows)), flags, types=types)


def _check_classifier(model: Any) -> None:  # noqa: ANN401 - an estimator
    """Refuse a classifier that gives no probabilities, or several tables of them."""
    name, classes = type(getattr(model, "steps", [("", model)])[-1][1]).__name__, getattr(model, "classes_", None)
    if isinstance(classes, list) or isinstance(getattr(model, "n_classes_", None), list):
        raise InvalidRequestError(
            f"{name} gives a table of probabilities for each label; fit OneVsRestClassifier, which gives one table"
        )
    if classes is not None and not hasattr(model, "predict_proba"):
        raise InvalidRequestError(
            f"{name} gives no probabilities, and the service answers with them; fit CalibratedClassifierCV({name}())"
        )


def _register_boosters() -> None:
    """Let skl2onnx convert boosters within pipelines, as https://onnx.ai/sklearn-onnx/auto_tutorial shows."""
    from skl2onnx import update_registered_converter  # noqa: PLC0415 - an extra
    from skl2onnx.common import shape_calculator as shapes  # noqa: PLC0415

    classes: dict[str, Any] = {"nocl": [True, False], "zipmap": [True, False, "columns"]}
    of_classes = shapes.calculate_linear_classifier_output_shapes
    of_values = shapes.calculate_linear_regressor_output_shapes
    with contextlib.suppress(ImportError):
        import lightgbm  # noqa: PLC0415 - an extra
        from onnxmltools.convert.lightgbm.operator_converters import LightGbm as light  # noqa: N813, PLC0415

        update_registered_converter(
            lightgbm.LGBMClassifier, "LgbmClassifier", of_classes, light.convert_lightgbm, options=classes
        )
        update_registered_converter(lightgbm.LGBMRegressor, "LgbmRegressor", of_values, light.convert_lightgbm)
    with contextlib.suppress(ImportError):
        import xgboost  # noqa: PLC0415 - an extra
        from onnxmltools.convert.xgboost.operator_converters import XGBoost as extreme  # noqa: N813, PLC0415

        update_registered_converter(
            xgboost.XGBClassifier, "XgbClassifier", of_classes, extreme.convert_xgboost, options=classes
        )
        update_registered_converter(xgboost.XGBRegressor, "XgbRegressor", of_values, extreme.convert_xgboost)


def _first_column(options: dict[str, Any]) -> list[str]:
    if not options["samples"]:
        return ["text"]
    table = read_table(Path(options["samples"]), [])
    return [next((name for name, cells in table.columns.items() if find_type(cells) == "text"), "text")]


def _list_texts(transformer: Any) -> tuple[set[str], set[str]]:  # noqa: ANN401 - a ColumnTransformer
    """Return the columns that a transformer takes one by one, as vectorizers of text do, and those that it drops."""
    texts, unused = set(), set()
    for _, step, columns in transformer.transformers_:
        if isinstance(columns, str):
            texts.add(columns)
        elif step == "drop":
            unused |= {each if isinstance(each, str) else str(transformer.feature_names_in_[each]) for each in columns}
    return texts, unused


def _read_types(names: list[str], options: dict[str, Any]) -> dict[str, str]:
    """Return the type of each column, as the samples have it; a column with nulls is no integer."""
    if not options["samples"]:
        raise InvalidRequestError("give --samples, rows of the training data: they say the type of each column")
    table = read_table(Path(options["samples"]), names).pick(names)
    kinds = {}
    for name, cells in table.columns.items():
        kind, has_nulls = find_type(cells), "" in cells
        if has_nulls and kind == "boolean":
            raise InvalidRequestError(f"column {name} is boolean with nulls; make it numbers, 0 and 1, and train anew")
        kinds[name] = "number" if has_nulls and kind == "integer" else kind
    return kinds


def _convert_columns(
    model: Any,  # noqa: ANN401 - a pipeline
    kinds: dict[str, str],
    extra: dict[str, Any],
) -> tuple[bytes, dict[str, str | list[str]]]:
    """Return the graph of a pipeline of columns, and the types of those that it takes as floats though no numbers.

    Graphs do not mix types as data frames do: skl2onnx refuses an integer beside a number in one imputer, and booleans
    in an encoder. So what it refuses is tried again with these columns as floats, which the parity check then judges.
    """
    from skl2onnx import to_onnx  # noqa: PLC0415 - an extra
    from skl2onnx.common import data_types  # noqa: PLC0415

    from service.model.backends.onnx_runtime import open_session  # noqa: PLC0415 - each backend is optional

    tensors = {
        "number": data_types.FloatTensorType, "integer": data_types.Int64TensorType,
        "boolean": data_types.BooleanTensorType, "text": data_types.StringTensorType,
    }  # fmt: skip
    attempts: tuple[tuple[str, ...], ...] = ((), ("integer",), ("boolean",), ("integer", "boolean"))
    failure: Exception | None = None
    for widened in attempts:
        types: dict[str, str | list[str]] = {name: kind for name, kind in kinds.items() if kind in widened}
        initial = [(name, tensors["number" if name in types else kind]([None, 1])) for name, kind in kinds.items()]
        try:
            graph = _set_locale(to_onnx(model, initial_types=initial, target_opset=_OPSETS, **extra))
            open_session(graph, "cpu", 1)
            return graph, types
        except Exception as error:  # it raises whatever its converters do
            failure = failure or error
    assert failure is not None
    raise failure


def _build_frame(rows: NDArray[Any], kinds: dict[str, str]) -> Any:  # noqa: ANN401 - a pandas.DataFrame
    """Return rows as the data frame that the model was fitted on, where integers and booleans are such."""
    import pandas  # noqa: PLC0415 - scikit-learn models with columns were fitted on one

    frame = pandas.DataFrame({name: rows[name][:, 0] for name in rows.dtype.names or ()})
    dtypes = {"integer": "int64", "boolean": "bool"}
    return frame.astype({name: dtypes[kind] for name, kind in kinds.items() if kind in dtypes})


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
