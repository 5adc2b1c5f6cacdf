"""Convert models of other libraries to ONNX.

Only `package` does this, on the machine of whoever has the model; the service never unpickles anything.
"""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from service.errors import InvalidRequestError, ModelRefusedError
from service.packaging.converted import Converted, Predict, read_array
from service.packaging.scikit_learn import convert_estimator

_SUFFIXES = (".pkl", ".pickle", ".joblib", ".json", ".ubj", ".txt", ".pt2")
_PICKLES = (".pkl", ".pickle", ".joblib")
_HINT = "pip install 'model-service[convert]'"


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
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].partition(" You may raise an issue")[0]
        raise InvalidRequestError(f"{path} cannot be converted to ONNX: {reason}") from error


def _unpickle(path: Path) -> Any:  # noqa: ANN401 - whatever it is
    try:
        import joblib  # noqa: PLC0415 - an extra; it reads plain pickles too
    except ImportError:
        return pickle.loads(path.read_bytes())
    try:
        return joblib.load(path)
    except ImportError:
        raise
    except Exception as error:  # bytes that are no pickle raise about anything
        raise InvalidRequestError(f"{path} is not a pickle that joblib can read; write it again") from error


def _convert_object(model: Any, options: dict[str, Any]) -> Converted:  # noqa: ANN401 - an estimator of some library
    classes = [str(each) for each in getattr(model, "classes_", [])] or None
    if hasattr(model, "get_booster"):
        return _convert_booster(model.get_booster(), classes)
    if hasattr(model, "booster_"):
        return _convert_lightgbm(model.booster_, classes)
    if type(model).__name__ == "Booster" and hasattr(model, "num_model_per_iteration"):
        return _convert_lightgbm(model, classes)
    return convert_estimator(model, options, classes)


def _convert_xgboost_file(path: Path) -> Converted:
    import xgboost  # noqa: PLC0415 - an extra

    try:
        booster = xgboost.Booster(model_file=str(path))
    except xgboost.core.XGBoostError as error:
        raise InvalidRequestError(f"{path} is not a model of XGBoost; write one with model.save_model") from error
    return _convert_booster(booster, None)


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
    return Converted(graph.SerializeToString(), lambda rows: booster.inplace_predict(read_array(rows)), flags)


def _convert_lightgbm_file(path: Path) -> Converted:
    import lightgbm  # noqa: PLC0415 - an extra

    with path.open("rb") as file:
        if file.readline().strip() != b"tree":
            raise InvalidRequestError(f"{path} is not a model of LightGBM; write one with booster_.save_model")
    return _convert_lightgbm(lightgbm.Booster(model_file=str(path)), None)


def _convert_lightgbm(booster: Any, classes: list[str] | None) -> Converted:  # noqa: ANN401 - lightgbm.Booster
    from onnxmltools import convert_lightgbm  # noqa: PLC0415 - an extra
    from onnxmltools.convert.common.data_types import FloatTensorType  # noqa: PLC0415

    initial = [("inputs", FloatTensorType([None, booster.num_feature()]))]
    objective = str(booster.dump_model(num_iteration=1).get("objective", ""))
    is_class = objective.startswith(("binary", "multiclass"))
    graph = convert_lightgbm(booster, initial_types=initial, **({"zipmap": False} if is_class else {}))
    flags = {"features": list(booster.feature_name()), "labels": classes if is_class else None}
    predict: Predict = lambda rows: booster.predict(read_array(rows))  # noqa: E731
    return Converted(graph.SerializeToString(), predict, flags, types=_read_categories(booster))


def _read_categories(booster: Any) -> dict[str, str | list[str]]:  # noqa: ANN401 - lightgbm.Booster
    """Return the values of each category column of the data frame that LightGBM was trained on.

    The graph has their indices. Only categories have a list of values in the model's `feature_infos`.
    """
    infos = booster.dump_model(num_iteration=1)["feature_infos"]
    names = [name for name in booster.feature_name() if infos.get(name, {}).get("values")]
    categories = booster.pandas_categorical or []
    if not names:
        return {}
    if len(names) != len(categories) or not all(isinstance(value, str) for values in categories for value in values):
        raise InvalidRequestError(f"the categories of {names[0]} are not text; train on a data frame where they are")
    return dict(zip(names, categories, strict=True))


def _convert_program(path: Path, options: dict[str, Any]) -> Converted:
    """Convert a program of torch.export with a dynamic batch; it is served itself, too, if it has one output."""
    from service.model.backends.exported_program import convert_program  # noqa: PLC0415 - torch is optional

    if options["mean"] is not None or options["std"] is not None:
        raise InvalidRequestError("--mean and --std are for ONNX graphs; put them into the module before torch.export")
    content = path.read_bytes()
    graph, run = convert_program(content)
    if run is None:
        return Converted(graph, None)  # several outputs
    return Converted(graph, lambda rows: run(read_array(rows).astype(np.float32)), beside={"torch-export": content})
