"""Estimators of scikit-learn as people have them are packaged, with types, and answer as `predict_proba` does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.__main__ import main
from service.api.headers import RequestHeaders
from service.api.limits import NO_LIMITS
from service.api.v1.decode import decode
from service.errors import ModelRefusedError
from service.model.manifest import Manifest
from service.model.version_folder import load_manifest

pytest.importorskip("skl2onnx", reason="it converts")
pytest.importorskip("onnxmltools", reason="it converts")
joblib = pytest.importorskip("joblib", reason="it writes models")
pandas = pytest.importorskip("pandas", reason="pipelines take data frames")
lightgbm = pytest.importorskip("lightgbm", reason="it has an estimator")
xgboost = pytest.importorskip("xgboost", reason="it has an estimator")

from sklearn.cluster import KMeans  # noqa: E402 - may be absent
from sklearn.compose import ColumnTransformer  # noqa: E402
from sklearn.ensemble import HistGradientBoostingClassifier, IsolationForest  # noqa: E402
from sklearn.feature_extraction.text import TfidfVectorizer  # noqa: E402
from sklearn.impute import SimpleImputer  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.multiclass import OneVsRestClassifier  # noqa: E402
from sklearn.multioutput import MultiOutputClassifier  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import OneHotEncoder, StandardScaler  # noqa: E402
from sklearn.svm import LinearSVC  # noqa: E402

ROWS = 300
NUMBERS = ["age", "income"]
Package = Callable[..., Manifest]


def make_frame() -> Any:
    """Return a data frame with whole numbers, numbers with gaps, text and booleans."""
    random = np.random.default_rng(0)
    frame = pandas.DataFrame(
        {
            "age": random.integers(18, 80, ROWS),
            "income": random.normal(3e4, 9e3, ROWS),
            "city": random.choice(["Oslo", "Paris", "Rome"], ROWS),
            "member": random.random(ROWS) < 0.5,
        }
    )
    frame.loc[random.random(ROWS) < 0.1, "income"] = np.nan
    return frame


FRAME = make_frame()
CLASS = np.where((FRAME.age > 50) ^ (FRAME.city == "Rome"), "stays", "leaves")
LABELS = (FRAME[["age", "member"]].to_numpy() > [[50, 0]]).astype(int)


@pytest.fixture
def package(tmp_path: Path) -> Package:
    """Return a function that packages a fitted estimator with samples, and returns the manifest."""

    def run(model: Any, samples: Any) -> Manifest:
        joblib.dump(model, tmp_path / "model.joblib")
        samples.to_csv(tmp_path / "samples.csv", index=False)
        files = [str(tmp_path / "model.joblib"), "--samples", str(tmp_path / "samples.csv")]
        main(["package", *files, "--trust-pickle", "--models-dir", str(tmp_path / "models")])
        manifest = load_manifest(tmp_path / "models/model/1")
        assert isinstance(manifest, Manifest)
        return manifest

    return run


def list_columns(manifest: Manifest) -> list[tuple[str, str, bool]]:
    """Return name, type and whether null is taken, of each column."""
    assert manifest.input.kind == "columns"
    return [(column.name, column.type, column.nullable) for column in manifest.input.columns]


def build_pipeline(last: Any, *more: Any) -> Any:
    """Return a pipeline with an imputer for an integer beside a number, and an encoder of a text and a boolean."""
    numbers = make_pipeline(SimpleImputer(), StandardScaler())
    encoder = OneHotEncoder(handle_unknown="ignore")
    columns = [("numbers", numbers, NUMBERS), ("encoder", encoder, ["city", "member"])]
    return make_pipeline(ColumnTransformer([*columns, *more]), last)


@pytest.mark.parametrize(
    "last", [LogisticRegression(), lightgbm.LGBMClassifier(n_estimators=5, verbose=-1), xgboost.XGBClassifier()]
)
def test_pipeline_keeps_the_types_that_a_graph_does_not_mix(package: Package, last: Any) -> None:
    """An integer beside a number in one imputer, and a boolean in an encoder, go in as floats, and stay themselves."""
    target = CLASS if isinstance(last, LogisticRegression) else (CLASS == "stays").astype(int)
    manifest = package(build_pipeline(last).fit(FRAME, target), FRAME)
    types = [("age", "integer", False), ("income", "number", True)]
    assert list_columns(manifest) == [*types, ("city", "category", False), ("member", "boolean", False)]
    assert manifest.task == "binary"


def test_text_stands_beside_other_columns(package: Package) -> None:
    """A column with a vectorizer is text, however few texts the samples have; columns that are dropped are none."""
    notes = np.random.default_rng(1).choice(["very good", "very bad", "fine"], ROWS)
    frame = FRAME.assign(note=notes)
    manifest = package(
        build_pipeline(LogisticRegression(), ("text", TfidfVectorizer(), "note")).fit(frame, CLASS), frame
    )
    assert len(list_columns(manifest)) == len(frame.columns)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # skl2onnx gives onnx arrays of one number
def test_trees_are_compared_by_exact_numbers(package: Package) -> None:
    """A tree splits between a number of the samples and its float32; the library is asked for the number itself."""
    model = HistGradientBoostingClassifier(max_iter=5).fit(FRAME[NUMBERS], CLASS)
    assert list_columns(package(model, FRAME[NUMBERS])) == [("age", "number", False), ("income", "number", True)]
    filled = FRAME[NUMBERS].fillna(0)
    assert package(model.fit(filled, CLASS), filled).version == 1


def test_categories_of_lightgbm_are_categories(package: Package) -> None:
    """A data frame's categories, which LightGBM splits by itself, are taken by name; booleans among numbers, too."""
    frame = FRAME.assign(city=FRAME.city.astype("category"))
    model = lightgbm.LGBMClassifier(n_estimators=5, verbose=-1).fit(frame, CLASS)
    manifest = package(model, frame)
    columns = [("age", "number", False), ("income", "number", True), ("city", "category", True)]
    assert list_columns(manifest) == [*columns, ("member", "boolean", False)]
    assert manifest.input.columns[2].values == ("Oslo", "Paris", "Rome")  # type: ignore[union-attr]


def test_several_labels_that_each_apply_or_not(package: Package) -> None:
    """A table of yes and no beside one of probabilities is a multilabel model."""
    filled = FRAME[NUMBERS].fillna(0)
    manifest = package(OneVsRestClassifier(LogisticRegression()).fit(filled, LABELS), filled)
    assert (manifest.task, manifest.output.labels) == ("multilabel", ("0", "1"))


@pytest.mark.parametrize("model", [KMeans(3, n_init=1), IsolationForest(n_estimators=5)])
def test_other_estimators_give_their_outputs(package: Package, model: Any) -> None:
    """Clusters and outliers are neither classes nor values: the graph's outputs have names."""
    filled = FRAME[NUMBERS].fillna(0)
    manifest = package(model.fit(filled), filled)
    assert (manifest.task, [output.name for output in manifest.output.outputs]) == ("outputs", ["label", "scores"])


@pytest.mark.parametrize(
    ("model", "target", "sentence"),
    [
        (LinearSVC(), CLASS, "LinearSVC gives no probabilities, and the service answers with them; fit Calibrated"),
        (MultiOutputClassifier(LogisticRegression()), LABELS, "a table of probabilities for each label; fit OneVsRest"),
    ],
)
def test_what_has_no_table_of_probabilities(
    package: Package, capsys: pytest.CaptureFixture[str], model: Any, target: Any, sentence: str
) -> None:
    """A classifier that the service cannot answer with is refused, with what to fit instead."""
    filled = FRAME[NUMBERS].fillna(0)
    with pytest.raises(ModelRefusedError):
        package(model.fit(filled, target), filled)
    assert sentence in capsys.readouterr().err


def test_text_alone_is_sent_as_it_is(package: Package) -> None:
    """A model of one column takes its values alone."""
    texts = pandas.DataFrame({"text": ["good film", "bad film", "great", "awful"] * 20})
    manifest = package(make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(texts.text, [1, 0, 1, 0] * 20), texts)
    assert list_columns(manifest) == [("text", "text", False)]
    alone = decode(b'{"instances": ["good film", "bad"]}', manifest, RequestHeaders(b""), NO_LIMITS).inputs
    as_objects = b'{"instances": [{"text": "good film"}, {"text": "bad"}]}'
    assert (alone == decode(as_objects, manifest, RequestHeaders(b""), NO_LIMITS).inputs).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # skl2onnx gives onnx arrays of one number
def test_trees_behind_a_scaler_are_refused_with_the_cure(package: Package, capsys: pytest.CaptureFixture[str]) -> None:
    """Where many numbers are splits, and float32 scales them to the other side, the refusal says what to leave out."""
    frame = pandas.DataFrame(np.random.default_rng(0).normal(size=(1500, 8)), columns=list("abcdefgh"))
    model = make_pipeline(StandardScaler(), HistGradientBoostingClassifier(max_iter=30))
    with pytest.raises(ModelRefusedError):
        package(model.fit(frame, frame.a * frame.b + frame.c > 0), frame)
    assert "of 1000 rows; nothing was written; fit trees on numbers that are not scaled" in capsys.readouterr().err
