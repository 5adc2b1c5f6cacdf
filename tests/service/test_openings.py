"""Tests of service.model.openings."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from service.model import openings
from service.model.openings import Openings, is_quarantined

ANSWER = {"place": "inline", "cost": [0.0, 1.0, 1]}


def die(folder: Path, end: int, *, is_alone: bool = True) -> dict[str, Any] | None:
    """Let a process die while it opens a version, and return what its successor knows of it."""
    child = os.fork()
    if not child:
        with Openings(folder, "checker", 60).opening("m/1"):
            os._exit(0)
    os.waitpid(child, 0)
    successor = Openings(folder, "checker", 60)
    successor.blame(end, is_alone)
    return successor.read("m/1")


@pytest.mark.parametrize(
    ("end", "is_alone", "deaths", "sentence"),
    [
        (-signal.SIGFPE, True, 1, "killed by SIGFPE while opening"),
        (-signal.SIGSEGV, False, 2, "killed by SIGSEGV while opening"),
        (-signal.SIGALRM, False, 1, "not open after 60 s (--open-timeout)"),
        (1, True, 2, "its process ended with exit code 1 while opening"),
    ],
)
def test_version_is_quarantined_by_what_it_did(
    end: int, is_alone: bool, deaths: int, sentence: str, tmp_path: Path
) -> None:
    """A crash counts at once where nothing else can have caused it; any other end must happen twice."""
    for _ in range(deaths - 1):
        assert die(tmp_path, end, is_alone=is_alone) is None
    known = die(tmp_path, end, is_alone=is_alone)
    assert known is not None
    assert is_quarantined(known)
    assert known["error"][:2] == ["ModelRefusedError", f"{sentence}; it is tried again when its files change"]
    assert Openings(tmp_path, "engine-cpu", 60).read("m/1") is None  # that one may still try
    assert Openings(tmp_path, "checker", 60).read("m/2") is None


def test_version_that_was_ended_from_outside_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL is no crash: after the second, each pause is twice as long, up to ten minutes, and a success ends it."""
    now = 1000.0
    monkeypatch.setattr("service.model.openings.time.monotonic", lambda: now)
    assert die(tmp_path, -signal.SIGKILL) is None
    for pause in (2, 4, 8):
        known = die(tmp_path, -signal.SIGKILL)
        assert known is not None
        assert is_quarantined(known)
        sentence = f"killed by SIGKILL while opening; it is tried again in {pause} s, or when its files change"
        assert known["error"] == ["ModelRefusedError", sentence, now + pause]
        now += pause - 0.1
        assert Openings(tmp_path, "checker", 60).read("m/1") is not None
        now += 0.2
        assert Openings(tmp_path, "checker", 60).read("m/1") is None
    for _ in range(20):
        known = die(tmp_path, -signal.SIGKILL)
    assert known is not None
    assert "in 600 s" in known["error"][1]
    with Openings(tmp_path, "checker", 60).opening("m/1"):
        pass
    assert die(tmp_path, -signal.SIGKILL) is None


def test_end_between_two_openings_is_nobodys_fault(tmp_path: Path) -> None:
    """A process that dies when it opens nothing leaves no note; the answers that it had stay."""
    first = Openings(tmp_path, "checker", 60)
    with first.opening("m/1"):
        first.write("m/1", ANSWER)
    successor = Openings(tmp_path, "checker", 60)
    successor.blame(-signal.SIGSEGV, is_alone=True)
    assert successor.read("m/1") == ANSWER
    assert not is_quarantined(ANSWER)


def test_folder_that_is_gone_keeps_nothing_and_fails_nothing(tmp_path: Path) -> None:
    """Without the folder, versions open all the same."""
    gone = Openings(tmp_path / "gone", "checker", 60)
    with gone.opening("m/1"):
        gone.write("m/1", ANSWER)
    gone.blame(-signal.SIGSEGV, is_alone=True)
    assert gone.read("m/1") is None
    here = Openings(tmp_path / "here", "checker", 60)
    (tmp_path / "here").mkdir()
    with here.opening("m/1"):
        shutil.rmtree(tmp_path / "here")


def test_oldest_answers_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in which versions come and go for ever does not grow."""
    monkeypatch.setattr(openings, "MOST", 2)
    kept = Openings(tmp_path, "checker", 60)
    for number in range(4):
        kept.write(f"m/{number}/auto/abc", ANSWER)
    kept.blame(0, is_alone=True)
    assert [kept.read(f"m/{number}/auto/abc") for number in range(4)] == [None, None, ANSWER, ANSWER]


def test_answers_about_former_files_are_replaced(tmp_path: Path) -> None:
    """However often a version's files change, one answer is kept of it, that about the files of now."""
    kept = Openings(tmp_path, "checker", 60)
    for number in range(4):
        kept.write(f"m/1/auto/{number}", ANSWER | {"cost": [0.0, number, 1]})
    assert [kept.read(f"m/1/auto/{number}") for number in range(4)] == [None] * 3 + [ANSWER | {"cost": [0.0, 3, 1]}]
    assert len(list(tmp_path.iterdir())) == 1
