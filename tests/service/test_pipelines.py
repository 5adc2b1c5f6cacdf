"""A scikit-learn pipeline of a data frame, exported by skl2onnx, answers as its own `predict_proba` does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.api.headers import RequestHeaders
from service.api.v1.decode import decode
from service.model.predictor import load_predictor
from tests import fakes

skl2onnx = pytest.importorskip("skl2onnx", reason="it exports the pipeline")
pandas = pytest.importorskip("pandas", reason="the pipeline takes a data frame")
pytest.importorskip("sklearn", reason="it has the pipeline")
ROWS = 1000
CITIES = ["Oslo", "Paris", "Rome"]
COLUMNS: list[dict[str, Any]] = [
    {"name": "age", "type": "number", "nullable": True},
    {"name": "rooms", "type": "integer"},
    {"name": "member", "type": "boolean"},
    {"name": "city", "type": "category", "values": CITIES},
    {"name": "port", "type": "category", "values": ["C", "S"], "nullable": True},
]


def make_table() -> Any:
    """Return a data frame with numbers, missing ones among them, whole numbers, yes and no, and categories."""
    random = np.random.default_rng(0)
    table = pandas.DataFrame(
        {
            "age": np.where(random.random(ROWS) < 0.2, np.nan, random.normal(40, 10, ROWS).astype(np.float32)),
            "rooms": random.integers(1, 9, ROWS),
            "member": random.random(ROWS) < 0.5,
            "city": random.choice(CITIES, ROWS),
        }
    )
    table["port"] = random.choice(np.array(["S", "C", ""], dtype=object), ROWS)
    return table


def fit(table: Any) -> Any:
    """Return a pipeline fitted to a rule with noise."""
    from sklearn.compose import ColumnTransformer  # noqa: PLC0415 - may be absent
    from sklearn.impute import SimpleImputer  # noqa: PLC0415
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415
    from sklearn.pipeline import make_pipeline  # noqa: PLC0415
    from sklearn.preprocessing import OneHotEncoder, StandardScaler  # noqa: PLC0415

    score = table.age.fillna(40) + 5 * table.rooms + 10 * table.member + 7 * (table.city == "Rome")
    target = (score + np.random.default_rng(1).normal(0, 5, ROWS) > 75).astype(int)
    numbers = make_pipeline(SimpleImputer(), StandardScaler())
    columns = [
        ("numbers", numbers, ["age", "rooms"]),
        ("flags", "passthrough", ["member"]),
        ("categories", OneHotEncoder(handle_unknown="ignore"), ["city", "port"]),
    ]
    return make_pipeline(ColumnTransformer(columns), LogisticRegression(max_iter=500)).fit(table, target)


@pytest.mark.filterwarnings("ignore")
def test_pipeline_of_a_data_frame_agrees_with_scikit_learn(tmp_path: Path) -> None:
    """A thousand rows, sent as JSON objects with nulls, get the library's own probabilities."""
    from skl2onnx.common import data_types  # noqa: PLC0415

    table = make_table()
    pipeline = fit(table)
    kinds = ("FloatTensorType", "Int64TensorType", "BooleanTensorType", "StringTensorType", "StringTensorType")
    types = [
        (column["name"], getattr(data_types, kind)([None, 1])) for column, kind in zip(COLUMNS, kinds, strict=True)
    ]
    graph = skl2onnx.to_onnx(pipeline, initial_types=types, options={"zipmap": False}).SerializeToString()
    output = {"kind": "probabilities", "labels": ["no", "yes"], "tensor": "probabilities"}
    fake = fakes.FakeModel("member", "binary", {"kind": "columns", "columns": COLUMNS}, output, {"onnx": graph})
    predictor = load_predictor(fakes.write_version(tmp_path, fake))
    rows = json.loads(table.replace({"port": {"": None}}).to_json(orient="records", double_precision=15))
    body = json.dumps({"instances": rows}).encode()
    outputs = predictor.predict(decode(body, predictor.manifest, RequestHeaders(b"")).inputs)
    assert np.abs(outputs - pipeline.predict_proba(table)).max() < 1e-5
