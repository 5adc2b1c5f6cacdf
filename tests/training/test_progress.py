"""Progress is a bar on a terminal and a few plain lines otherwise."""

import pytest

from training.progress import Epoch, Progress


def show(epochs: int) -> None:
    """Report some epochs of two steps."""
    with Progress("test", epochs, 2) as progress:
        for _ in range(epochs):
            progress.step()
            progress.step()
            progress.epoch(Epoch(0.25, 1.0))


def test_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """If stderr is no terminal, about ten lines with loss and accuracy go to stdout, and nothing to stderr."""
    show(100)
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert len(lines) == 10
    assert lines[-1] == "test: epoch 100/100  loss 0.2500  accuracy 1.0000"
    assert captured.err == ""


def test_early_stop_is_announced(capsys: pytest.CaptureFixture[str]) -> None:
    """It says after which epoch the fit ended, and why."""
    with Progress("test", 10, 1) as progress:
        progress.step()
        progress.epoch(Epoch(0.25, 1.0))
        progress.stop("199 of 200 points are right")
    assert "test: stopped after iteration 1: 199 of 200 points are right" in capsys.readouterr().out


def test_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal a bar with loss and accuracy goes to stderr, and nothing to stdout."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    show(100)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "epoch 100/100" in captured.err
    assert "accuracy 1.0000" in captured.err
