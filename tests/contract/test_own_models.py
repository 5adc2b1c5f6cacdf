"""Models that this project did not train: packaged by one command, and served with a typed schema of their own."""

import warnings
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from skl2onnx import to_onnx
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression

from tests import fakes
from tests.servers import ROOT, Server, clean_environment, run_service

NAMES = "sepal length,sepal width,petal length,petal width"
LABELS = "setosa,versicolor,virginica"


def export(model: object, inputs: np.ndarray[tuple[int, ...], np.dtype[np.float32]], file: Path) -> None:
    """Write a scikit-learn model as ONNX, classes as an array of probabilities and not as a list of maps."""
    options = {"zipmap": False} if hasattr(model, "predict_proba") else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of skl2onnx and what it is built on
        file.write_bytes(to_onnx(model, inputs[:1], options=options, target_opset=17).SerializeToString())


def test_scikit_learn_models_serve_with_schemas_of_their_own(tmp_path: Path) -> None:
    """Logistic regression, a forest and a linear regression, exported by skl2onnx, answer as scikit-learn does."""
    data = load_iris()
    inputs, root = data.data.astype(np.float32), tmp_path / "models"
    logistic = LogisticRegression(max_iter=1000).fit(inputs, data.target)
    forest = RandomForestClassifier(n_estimators=10, max_depth=4, random_state=0).fit(inputs[:100], data.target[:100])
    line = LinearRegression().fit(inputs[:, :3], inputs[:, 3])
    common = ["--models-dir", str(root)]
    classes = [*common, "--features", NAMES, "--output-tensor", "probabilities"]
    pair_flags = ["--task", "binary", "--labels", "setosa,versicolor", "--output-kind", "probabilities"]
    for name, model, flags in (
        ("iris", logistic, [*classes, "--task", "multiclass", "--labels", LABELS, "--title", "Three irises"]),
        ("iris-pair", forest, [*classes, *pair_flags]),
        ("petal-width", line, [*common, "--features", NAMES.rpartition(",")[0], "--task", "regression"]),
    ):
        export(model, inputs[:, :3] if name == "petal-width" else inputs, tmp_path / f"{name}.onnx")
        done = run_service("package", str(tmp_path / f"{name}.onnx"), "--name", name, *flags)
        assert done.returncode == 0, done.stderr
        said = f"packaged {root / name / '1'}; it is served as {name} version 1"
        assert done.stdout.splitlines()[0] == said
    with Server(root, "--workers", "1") as server:
        served = server.predict("iris", inputs.tolist()).json()["predictions"]
        expected = logistic.predict_proba(inputs)
        np.testing.assert_allclose([row["probabilities"] for row in served], expected, atol=1e-5, rtol=1e-4)
        assert [row["prediction"] for row in served] == logistic.predict(inputs).tolist()
        pair = server.predict("iris-pair", inputs[:100].tolist()).json()["predictions"]
        np.testing.assert_allclose(
            [row["probability"] for row in pair], forest.predict_proba(inputs[:100])[:, 1], atol=1e-5
        )
        widths = server.predict("petal-width", inputs[:, :3].tolist()).json()["predictions"]
        np.testing.assert_allclose([row["prediction"] for row in widths], line.predict(inputs[:, :3]), atol=1e-4)
        document = server.get("/openapi.json").json()
        schema = {"components": document["components"], "$ref": "#/components/schemas/IrisRequest"}
        body = {"instances": [dict(zip(NAMES.split(","), inputs[0].tolist(), strict=True))]}
        jsonschema.validate(body, schema)
        assert not jsonschema.Draft202012Validator(schema).is_valid({"instances": [{"petal": 1}]})
        assert server.post("/v1/models/iris:predict", json=body).json()["predictions"][0]["label"] == "setosa"


NO_TORCH = """
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec


def find_all_but_torch(name, path=None, target=None):
    return None if name.partition(".")[0] in ("torch", "torchvision") else find_spec(name, path, target)


PathFinder.find_spec = find_all_but_torch
"""


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which torch cannot be found, as in the default installation."""
    (tmp_path / "sitecustomize.py").write_text(NO_TORCH)
    return clean_environment({"PYTHONPATH": f"{tmp_path}:{ROOT}"})


def test_service_needs_no_torch(without_torch: dict[str, str], models_dir: Path, tmp_path: Path) -> None:
    """Without torch the ONNX artifacts serve, and commands that need torch say what to install."""
    with Server(models_dir, "--workers", "1", environment=without_torch) as server:
        assert server.predict("doubler", [[2]]).json()["predictions"] == [{"prediction": 5.0}]
        assert server.get("/v1/models/coin").json()["backend"] == "onnx"
        assert server.get("/health/ready").status_code == 200
    verified = run_service("verify", "--models-dir", str(models_dir), environment=without_torch)
    assert verified.returncode == 0, verified.stderr
    assert "skipped: install '.[torch]' to run it" in verified.stdout
    assert verified.stdout.splitlines()[-1] == "12 checks of 6 versions, 6 skipped, 0 failed"
    (tmp_path / "doubler.pt").write_bytes(fakes.doubler().contents["torchscript"])
    call = ["--name", "m", "--task", "regression", "--features", "x", "--models-dir", str(tmp_path / "own")]
    packaged = run_service("package", str(tmp_path / "doubler.pt"), *call, environment=without_torch)
    assert packaged.returncode == 1
    assert "install the torch extra: pip install '.[torch]'" in packaged.stderr


def test_backend_that_is_not_installed_ends_the_start(without_torch: dict[str, str], models_dir: Path) -> None:
    """`--backend torchscript` without torch is one line that says what to install, and serves nothing."""
    flags = ("--backend", "torchscript", "--models-dir", str(models_dir))
    line = "error: --backend torchscript needs torch, which is not installed: pip install '.[torch]'\n"
    for command in (("serve", "--port", "0"), ("predict", "doubler", "--input", __file__)):
        done = run_service(*command, *flags, environment=without_torch)
        assert (done.returncode, done.stderr) == (1, line)


def test_damaged_file_is_found_without_torch(without_torch: dict[str, str], empty_dir: Path) -> None:
    """`verify` checks the bytes of what it cannot run."""
    with (fakes.write_version(empty_dir, fakes.coin().only("torchscript")) / "model.pt").open("ab") as file:
        file.write(b"x")
    done = run_service("verify", "--models-dir", str(empty_dir), environment=without_torch)
    assert done.returncode == 1
    assert "FAILED: model.pt has " in done.stdout
    assert done.stdout.splitlines()[-1] == "1 checks of 1 versions, 0 skipped, 1 failed"


def test_torchscript_model_without_torch_is_refused_by_name(without_torch: dict[str, str], empty_dir: Path) -> None:
    """A model that only torch can run is not served, the service says why, and the others serve."""
    fakes.write_version(empty_dir, fakes.doubler())
    fakes.write_version(empty_dir, fakes.coin().only("torchscript"))
    with Server(empty_dir, "--workers", "1", environment=without_torch) as server:
        assert server.predict("doubler", [[2]]).status_code == 200
        refused = server.predict("coin", [[1, 2]])
        assert refused.status_code == 503
        assert "install the torch extra" in refused.json()["error"]
