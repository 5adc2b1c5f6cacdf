"""Tests of service.registry.model_folder."""

import json
import os
import shutil
from pathlib import Path

import pytest

from service.errors import InvalidRequestError, ModelRefusedError
from service.registry.model_folder import (
    SETTINGS_FILE,
    ModelSettings,
    find_misplaced,
    list_versions,
    load_settings,
    save_settings,
    scan,
)
from tests import fakes


def test_versions_are_listed_by_name_and_number(empty_dir: Path) -> None:
    """Folders <name>/<number> with a manifest are versions; anything else is nothing."""
    for version in (10, 9):
        fakes.write_version(empty_dir, fakes.doubler(version=version))
    fakes.write_version(empty_dir, fakes.coin())
    source = empty_dir / "coin" / "1"
    for other in (".hidden/1", "coin/01", "coin/latest", "coin/-1", "coin/²", "coin/1.0"):
        shutil.copytree(source, empty_dir / other)
    (empty_dir / "coin" / "2").mkdir()
    (empty_dir / "README.md").write_text("x")
    assert [(each.name, each.version) for each in list_versions(empty_dir)] == [
        ("coin", 1),
        ("doubler", 9),
        ("doubler", 10),
    ]


def test_name_that_is_no_text_is_skipped(empty_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder whose name no URL could hold is left out, with one warning."""
    folder = fakes.write_version(empty_dir, fakes.coin())
    for name in (b"caf\xe9", b"two\nlines"):
        shutil.copytree(folder.parent, empty_dir / os.fsdecode(name))
    for _ in range(2):
        assert [each.name for each in list_versions(empty_dir)] == ["coin"]
    lines = sorted(record.getMessage().partition(":")[0] for record in caplog.records)
    assert lines == [r"folder 'caf\udce9' is not served", r"folder 'two\nlines' is not served"]


def test_fingerprint_changes_with_a_file(empty_dir: Path) -> None:
    """A fingerprint is the same while the files are, and another when one is written, replaced or added."""
    folder = fakes.write_version(empty_dir, fakes.coin())
    seen = {list_versions(empty_dir)[0].fingerprint, list_versions(empty_dir)[0].fingerprint}
    assert len(seen) == 1
    os.utime(folder / "model.onnx", ns=(1, 1))
    seen.add(list_versions(empty_dir)[0].fingerprint)
    (folder / "note.txt").write_text("x")
    seen.add(list_versions(empty_dir)[0].fingerprint)
    assert len(seen) == 3


def test_scans_compare(empty_dir: Path) -> None:
    """Two scans are equal until a file of a version or a model's settings change; hidden files are nothing yet."""
    folder = fakes.write_version(empty_dir, fakes.coin())
    before = scan(empty_dir)
    (empty_dir / ".staging").mkdir()
    (empty_dir / ".staging" / "manifest.json").write_text("x")
    (folder.parent / ".settings-x").write_text("x")
    assert scan(empty_dir) == before
    seen = {before}
    (folder.parent / SETTINGS_FILE).write_text("{}")
    seen.add(scan(empty_dir))
    os.utime(folder / "model.onnx", ns=(1, 1))
    seen.add(scan(empty_dir))
    (folder / "model.onnx").unlink()
    seen.add(scan(empty_dir))
    assert len(seen) == 4
    assert scan(folder) != scan(empty_dir)
    with pytest.raises(FileNotFoundError):
        scan(empty_dir / "nosuch")


def test_folder_of_one_version(empty_dir: Path) -> None:
    """A folder that holds a version's files is that version, under the name given or its manifest's."""
    folder = fakes.write_version(empty_dir, fakes.doubler(version=3))
    assert [(each.name, each.version, each.path, each.serve_as) for each in list_versions(folder)] == [
        ("doubler", 3, folder, "doubler")
    ]
    assert list_versions(folder, "served")[0].name == "served"
    (folder / "manifest.json").write_text("{")
    assert [(each.name, each.version) for each in list_versions(folder, "served")] == [("served", 1)]
    assert [(each.name, each.version) for each in list_versions(folder, "", ("doubler", 3))] == [("doubler", 3)]


def test_models_in_the_wrong_place_are_found(empty_dir: Path) -> None:
    """A manifest or a graph outside a version folder is reported, with its right place; other files are not."""
    root = empty_dir
    fakes.write_version(root, fakes.doubler())
    (root / "doubler" / "old.onnx").touch()
    (root / "doubler" / "checkpoints").mkdir()
    (root / "doubler" / "checkpoints" / "last.pt").touch()
    (root / ".staging").mkdir()
    (root / ".staging" / "manifest.json").touch()
    (root / "README.md").touch()
    assert find_misplaced(root, scan(root)) == ()
    for folder, names in {
        "flat": ("manifest.json", "model.onnx"),
        "graph": ("model.pt",),
        "vv/v1": ("manifest.json", "model.onnx"),
        "ww/01": ("manifest.json",),
        "half/3": ("model.onnx",),
    }.items():
        (root / folder).mkdir(parents=True)
        for name in names:
            (root / folder / name).touch()
    wrong = "holds a manifest, but its name is no version; rename it to a number, such as"
    assert find_misplaced(root, scan(root)) == (
        f"{root}/flat holds a manifest but no version folder; move it to {root}/flat/1",
        f"{root}/graph holds a graph but no manifest.json; `python -m service package` writes one",
        f"{root}/half/3 holds a graph but no manifest.json; `python -m service package` writes one",
        f"{root}/vv/v1 {wrong} {root}/vv/1",
        f"{root}/ww/01 {wrong} {root}/ww/1",
    )
    (root / "manifest.json").touch()
    assert find_misplaced(root, scan(root)) == ()


def test_settings_are_kept(empty_dir: Path) -> None:
    """Settings that were saved are loaded, one change leaves the others; without a file they are the defaults."""
    (empty_dir / "doubler").mkdir()
    assert load_settings(empty_dir, "doubler") == ModelSettings()
    save_settings(empty_dir, "doubler", {"labels": {"stable": 1}})
    save_settings(empty_dir, "doubler", {"latest": 2})
    assert load_settings(empty_dir, "doubler") == ModelSettings(latest=2, labels={"stable": 1})
    assert json.loads((empty_dir / "doubler" / SETTINGS_FILE).read_text()) == {"latest": 2, "labels": {"stable": 1}}
    assert os.listdir(empty_dir / "doubler") == [SETTINGS_FILE]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"lates": 1}',
        '{"latest": "x"}',
        '{"labels": {"2": 1}}',
        '{"labels": {"a/b": 1}}',
        '{"versions": 1}',
    ],
)
def test_malformed_settings_are_refused(text: str, empty_dir: Path) -> None:
    """Settings with an unknown field, another kind of value, or a label that looks like a number, are not used."""
    (empty_dir / "doubler").mkdir()
    (empty_dir / "doubler" / SETTINGS_FILE).write_text(text)
    with pytest.raises(ModelRefusedError, match=r"^settings\.json"):
        load_settings(empty_dir, "doubler")
    with pytest.raises(ModelRefusedError):
        save_settings(empty_dir, "doubler", {"latest": 1})
    assert (empty_dir / "doubler" / SETTINGS_FILE).read_text() == text


def test_folder_that_cannot_be_written_is_said(empty_dir: Path) -> None:
    """Where settings cannot be saved, the sentence names the file."""
    with pytest.raises(InvalidRequestError, match=r"settings\.json cannot be written: "):
        save_settings(empty_dir, "nosuch", {"latest": 1})
