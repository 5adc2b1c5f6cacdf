"""The command line: what it prints, how it exits, and what it leaves behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from service.model.backends import Array
from service.model.backends.onnx_runtime import OnnxBackend
from training import run as run_module
from training.__main__ import main
from training.errors import DataError
from training.recipes import RECIPES

ROOT = Path(__file__).parents[2]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` names every option and the tour."""
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for option in (
        "--list",
        "--all",
        "--models-dir",
        "--data-dir",
        "--seeds",
        "--epochs",
        "--device",
        "--version",
        "--force",
    ):
        assert option in printed
    assert "autograd" in printed


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    """`--list` prints one line per recipe, its name first."""
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)


def test_tour(capsys: pytest.CaptureFixture[str]) -> None:
    """`autograd` runs the tour."""
    assert main(["autograd"]) == 0
    assert "derivative" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "name a recipe"),
        (["nothing"], "unknown recipe 'nothing'"),
        (["linear", "--epochs", "0"], "'0' is not an integer from 1"),
        (["linear", "--seeds", "0,-1"], "'0,-1' is not a list of seeds such as 0-3 or 1,5,9"),
        (["linear", "--epochs", "many"], "'many' is not an integer"),
        (["linear", "--lr", "0", "--no-publish"], "'0' is not a positive number"),
        (["linear", "--lr", "0.1"], "--lr is for trials: add --no-publish"),
        (["mnist", "--hidden", "64,x", "--no-publish"], "'x' is not an integer"),
    ],
)
def test_wrong_arguments(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Invalid arguments exit 2 and say why."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


def test_several_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Recipes run one after the other; a line for each says where it was published, with its metrics."""
    assert main(["linear", "logistic-hours", "linear", "--epochs", "1", "--models-dir", str(tmp_path)]) == 0
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*")) == ["linear/1", "logistic-hours/1"]
    assert "linear: published" in capsys.readouterr().out


def test_trial_publishes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--no-publish` does everything else and prints the figures."""
    assert main(["linear", "--epochs", "2", "--no-publish", "--models-dir", str(tmp_path)]) == 0
    assert "linear: not published  mse " in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_trial_of_other_hyperparameters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A trial takes other hyperparameters, those that its recipe has; more learning gives a lower loss here."""
    losses = []
    for rate in ("0.001", "0.05"):
        trial = ["--epochs", "5", "--lr", rate, "--no-publish", "--models-dir", str(tmp_path)]
        assert main(["linear", *trial, "--batch-size", "8", "--optimizer", "sgd"]) == 0
        losses.append(float(capsys.readouterr().out.split(" mse ")[1].split()[0]))
    assert losses[1] < losses[0]
    assert main(["linear-by-hand", "--optimizer", "adamw", "--no-publish", "--models-dir", str(tmp_path)]) == 1
    assert "linear-by-hand has no --optimizer; it has --lr, --batch-size" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["logistic-hours", "logistic-clusters", "linear"])
def test_worse_version_is_not_published(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After a whole fit, one of an epoch is refused in one line unless forced; an equal one is welcome."""
    folder = ["--models-dir", str(tmp_path)]
    assert main([name, *folder]) == 0
    assert main([name, *folder]) == 0
    capsys.readouterr()
    assert main([name, "--epochs", "1", *folder]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: version 2, which is published, is better on the")
    assert error.count("\n") == 1
    assert main([name, "--epochs", "1", "--force", *folder]) == 0
    assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["1", "2", "3"]


def test_recipe_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--recipes-from` trains the recipe of the walk-through, with no other edit."""
    walk = (ROOT / "docs" / "your-own-recipe.md").read_text()
    file = tmp_path / "my_recipes.py"
    file.write_text(walk.split("```python\n")[1].split("```")[0])
    arguments = ["--recipes-from", str(file), "--models-dir", str(tmp_path / "models")]
    assert main([*arguments, "--list"]) == 0
    assert capsys.readouterr().out.split()[0] == "ripeness"
    assert main([*arguments, "ripeness"]) == 0
    assert (tmp_path / "models" / "ripeness" / "1" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("code", "complaint"),
    [("x = 1", "defines no recipe"), ("1 / 0", "ZeroDivisionError"), (None, "is not a file")],
)
def test_recipes_that_cannot_be_read(
    code: str | None, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file without recipes, or one that fails, is one line."""
    file = tmp_path / "mine.py"
    if code is not None:
        file.write_text(code)
    assert main(["--recipes-from", str(file), "--list"]) == 1
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_existing_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A version that exists is refused before any training, in one line."""
    (tmp_path / "linear" / "4").mkdir(parents=True)
    assert main(["linear", "--version", "4", "--models-dir", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "exists" in captured.err


def test_failed_parity(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An artifact that differs from the net: exit 1, one line, nothing published."""
    honest = OnnxBackend.run

    def lie(self: OnnxBackend, inputs: Array) -> Array:
        return honest(self, inputs) + np.float32(0.01)

    monkeypatch.setattr(OnnxBackend, "run", lie)
    assert main(["linear", "--epochs", "1", "--models-dir", str(tmp_path / "models")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "the onnx artifact differs from the net" in error
    assert not (tmp_path / "models").exists()


def test_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing data set: exit 1, one line."""

    def refuse(*_: object) -> None:
        raise DataError("MNIST is not in nowhere")

    monkeypatch.setattr("training.data._load_mnist_part", refuse)
    assert main(["mnist", "--data-dir", str(tmp_path), "--models-dir", str(tmp_path / "models")]) == 1
    assert capsys.readouterr().err == "error: MNIST is not in nowhere\n"


def test_interrupted(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the version is written: exit 130, one line, no file left, hidden ones included."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "write_manifest", interrupt)
    assert main(["linear", "--epochs", "1", "--models-dir", str(tmp_path / "models")]) == 130
    assert capsys.readouterr().err == "interrupted; linear was not published\n"
    assert list((tmp_path / "models").iterdir()) == []


@pytest.fixture
def hears_interrupts() -> Iterator[None]:
    """Let processes started here receive SIGINT, even if a shell started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_interrupts")
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_process_ended_while_it_trains(tmp_path: Path, sent: signal.Signals, status: int) -> None:
    """A process ended by a signal during training leaves the models folder unchanged."""
    (tmp_path / "models" / "other" / "1").mkdir(parents=True)
    command = [
        sys.executable,
        "-m",
        "training",
        "logistic-by-hand",
        "--epochs",
        "10",
        "--models-dir",
        str(tmp_path / "models"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert "epoch 1/10" in process.stdout.readline()
        time.sleep(0.1)
        process.send_signal(sent)
        _, error = process.communicate(timeout=30)
    assert process.returncode == status
    assert error == ("interrupted; logistic-by-hand was not published\n" if sent == signal.SIGINT else "")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == [
        "models",
        "models/other",
        "models/other/1",
    ]


def test_main_leaves_torch_alone() -> None:
    """Importing the command line does not import torch, so that `--help` is fast."""
    code = "import sys, training.__main__; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"
