"""A sweep fits recipes and seeds side by side, by the recipes' own code."""

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.model.version_folder import load_manifest
from tests.servers import clean_environment
from training.__main__ import main
from training.arguments import read_positive, read_seeds
from training.recipes import RECIPES
from training.sweep import Trial, build_parser, collect, fit_one, print_table, publish_best


def test_sweep_prints_a_table(tmp_path: Path) -> None:
    """Two recipes from two seeds are four lines on standard output, and nothing is published."""
    pytest.importorskip("ray", reason="needs '.[ray]'")
    arguments = ("linear", "logistic-hours", "--seeds", "0-1", "--epochs", "3", "--models-dir", str(tmp_path / "m"))
    done = subprocess.run(
        [sys.executable, "-m", "training", "sweep", *arguments],
        env=clean_environment({"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == ["linear", "linear", "logistic-hours", "logistic-hours"]
    assert not (tmp_path / "m").exists()


def test_best_is_published_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The best trial's seed is fitted again by an ordinary run."""
    options = build_parser().parse_args(["linear", "--epochs", "2", "--models-dir", str(tmp_path), "--publish"])
    publish_best([Trial("linear", 3, {"loss": 1.0}), Trial("linear", 1, {"loss": 2.0})], options)
    assert "linear: published" in capsys.readouterr().out
    training = load_manifest(tmp_path / "linear" / "1").training
    assert training is not None
    assert training.seed == 3


def test_fit_is_the_recipes_own(tmp_path: Path) -> None:
    """A trial has training and test figures; equal seeds give equal figures."""
    first, again, other = (fit_one("linear", seed, 2, "cpu", tmp_path) for seed in (1, 1, 2))
    assert first.figures == again.figures
    assert first.figures != other.figures
    assert set(first.figures) >= {"loss", "test_mse"}


def test_failed_fit_is_a_line_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A failed fit has its error in its line; the others are unaffected."""
    failed = fit_one("linear", 0, 2, "cuda:99", tmp_path)
    assert "cannot be used here" in failed.error
    good = Trial("linear", 1, {"loss": 2.0, "test_mse": 3.0})
    print_table(sorted([failed, good], key=lambda trial: trial.rank))
    lines = capsys.readouterr().out.splitlines()
    assert "seed 1" in lines[0]
    assert "cannot be used here" in lines[1]


def test_any_failure_of_a_fit_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unexpected error, or a process that died, costs one line and not the sweep."""

    def fail(*_: object) -> Any:
        raise MemoryError("no room\nfor it")

    monkeypatch.setitem(RECIPES, "linear", replace(RECIPES["linear"], fit=fail))
    assert fit_one("linear", 0, 2, "cpu", tmp_path).error == "MemoryError: no room"
    assert collect(fail, "linear", 5) == Trial("linear", 5, {}, error="MemoryError: no room")


def test_without_validation_the_first_seed_is_best() -> None:
    """The training loss chooses nothing, as in a run with several seeds."""
    trials = [Trial("m", 0, {"loss": 2.0}), Trial("m", 1, {"loss": 1.0})]
    assert sorted(trials, key=lambda trial: trial.rank) == trials


def test_trials_are_ranked_by_validation() -> None:
    """The highest validation accuracy comes first, then the lowest loss; the test split decides nothing."""
    worse = Trial("m", 0, {"validation_accuracy": 0.90, "validation_loss": 0.1, "test_accuracy": 0.99})
    better = Trial("m", 1, {"validation_accuracy": 0.91, "validation_loss": 0.2, "test_accuracy": 0.10})
    assert sorted([worse, better], key=lambda trial: trial.rank) == [better, worse]


@pytest.mark.parametrize(("text", "seeds"), [("0-3", [0, 1, 2, 3]), ("7", [7]), ("1,5,9,5", [1, 5, 9])])
def test_seeds_are_read(text: str, seeds: list[int]) -> None:
    """Ranges and lists are accepted."""
    assert list(read_seeds(text)) == seeds


@pytest.mark.parametrize("text", ["", "3-0", "a", "-1", "0-", "0-99999", "0-1-2", "²", "1,", str(2**31)])
def test_seeds_that_are_none(text: str) -> None:
    """Anything else is refused."""
    with pytest.raises(argparse.ArgumentTypeError):
        read_seeds(text)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "²", str(2**31)])
def test_epochs_that_are_none(text: str) -> None:
    """A fit needs at least one epoch."""
    with pytest.raises(argparse.ArgumentTypeError):
        read_positive(text)


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """It has its own `--help`, and names an unknown recipe."""
    with pytest.raises(SystemExit) as ended:
        main(["sweep", "--help"])
    assert ended.value.code == 0
    assert "--publish" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["sweep", "nothing"])
    assert ended.value.code == 2
    assert "unknown recipe 'nothing'" in capsys.readouterr().err
    assert build_parser().parse_args(["linear"]).seeds == range(4)
