"""Tests of service.model.signature, with keys made here; `tests/contract/test_signatures.py` serves signed versions."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from service.__main__ import main
from service.errors import ModelRefusedError, StartError
from service.model.signature import SIGNATURE_FILE, check_public_key, check_signature, sign_version
from tests import fakes
from tests.keys import Keys, make_keys


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A version folder."""
    return fakes.write_version(tmp_path / "models", fakes.doubler().only("onnx"))


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    """A private key and its public one."""
    return make_keys(tmp_path)


def test_signed_version_is_accepted(folder: Path, keys: Keys) -> None:
    """The check returns the digest of the manifest that was signed, and nothing but the signature is left behind."""
    assert sign_version(folder, keys.private) == folder / SIGNATURE_FILE
    signed = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    assert check_signature(folder, keys.public) == signed
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    sign_version(folder, keys.private)  # again, over its own signature
    assert check_signature(folder, keys.public) == signed


def test_folder_reached_by_a_link_is_accepted(folder: Path, keys: Keys) -> None:
    """A version folder may be a link, as where volumes are swapped; links inside may not."""
    sign_version(folder, keys.private)
    link = folder.with_name("link")
    link.symlink_to(folder)
    assert check_signature(link, keys.public)


def _flip_signature(folder: Path) -> None:
    path = folder / SIGNATURE_FILE
    fields = json.loads(path.read_bytes())
    signature = fields["dsseEnvelope"]["signatures"][0]
    signature["sig"] = ("A" if signature["sig"][10] != "A" else "B").join(
        (signature["sig"][:10], signature["sig"][11:])
    )
    path.write_text(json.dumps(fields))


def _append(name: str) -> Callable[[Path], None]:
    def append(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes() + b" ")

    return append


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_append("manifest.json"), "not as they were signed: manifest.json"),
        (_append("model.onnx"), "not as they were signed: model.onnx"),
        (lambda folder: (folder / "more").touch(), "not as they were signed: more"),
        (lambda folder: (folder / "model.onnx").unlink(), "not as they were signed: model.onnx"),
        (lambda folder: (folder / "link").symlink_to("/etc/hostname"), "symlink"),
        (lambda folder: (folder / SIGNATURE_FILE).unlink(), "only signed versions are served"),
        (lambda folder: (folder / SIGNATURE_FILE).write_bytes(b""), "does not verify"),
        (lambda folder: (folder / SIGNATURE_FILE).write_bytes(b"{}"), "does not verify"),
        (lambda folder: (folder / SIGNATURE_FILE).write_bytes(b"\xff" * 2**21), "does not verify"),
        (_flip_signature, "does not verify"),
    ],
)
def test_changed_version_is_refused(change: Callable[[Path], object], reason: str, folder: Path, keys: Keys) -> None:
    """Whatever is not as it was signed is refused, in one sentence."""
    sign_version(folder, keys.private)
    change(folder)
    with pytest.raises(ModelRefusedError, match=reason) as raised:
        check_signature(folder, keys.public)
    assert "\n" not in str(raised.value)


def test_other_key_is_refused(folder: Path, keys: Keys, tmp_path: Path) -> None:
    """A signature by another key is as good as none."""
    (tmp_path / "other").mkdir()
    sign_version(folder, make_keys(tmp_path / "other").private)
    with pytest.raises(ModelRefusedError, match="it is by another key"):
        check_signature(folder, keys.public)


def test_damaged_version_is_not_signed(folder: Path, keys: Keys) -> None:
    """What would not be served is not signed."""
    (folder / "model.onnx").write_bytes(b"other")
    with pytest.raises(ModelRefusedError, match=r"model\.onnx"):
        sign_version(folder, keys.private)
    assert not (folder / SIGNATURE_FILE).exists()


def test_unusable_keys_are_refused(folder: Path, keys: Keys, tmp_path: Path) -> None:
    """A missing key, or one of the other kind, is a sentence that names its file."""
    for path in (keys.private, tmp_path / "nothing.pem"):
        with pytest.raises(StartError, match=path.name):
            check_public_key(path)
    with pytest.raises(StartError, match=keys.public.name):
        sign_version(folder, keys.public)
    check_public_key(keys.public)


def test_command_signs(folder: Path, keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m service sign` writes the signature, and its errors are one line."""
    assert main(["sign", str(folder), "--key", str(keys.private)]) == 0
    assert str(folder / SIGNATURE_FILE) in capsys.readouterr().out
    assert check_signature(folder, keys.public)
    assert main(["sign", str(folder), "--key", str(keys.public)]) == 1
    assert capsys.readouterr().err.startswith("error: ")
