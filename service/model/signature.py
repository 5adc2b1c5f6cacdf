"""Signatures of version folders, by OpenSSF's `model-signing` with a key of one's own; nothing is looked up online.

A signature covers every file of the folder. The manifest that is then read must be the one that was signed, and it has
the digests of the artifacts, so that nothing can be exchanged between the check and its use.
"""

import base64
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from service.errors import ModelRefusedError, StartError
from service.model.version_folder import MANIFEST_FILE, load_any_manifest, load_artifact

SIGNATURE_FILE = "model.sig"
MAX_SIGNATURE_BYTES = 2**20
_CHANGED = re.compile(r"(?:Hash mismatch for '|(?:Extra|Missing) files [^:]*: )([^'\"]+)")
_MISSING = "signatures need the library model-signing; install it with `pip install 'model-service[sign]'`"


def sign_version(folder: Path, key: Path) -> Path:
    """Sign a version folder, whose artifacts must be as its manifest says, and return the signature's file.

    Args:
        folder: the version folder, `<name>/<version>`.
        key: a PEM file with a private key on the curve P-256, P-384 or P-521, without a password.

    Raises:
        ModelRefusedError: the version is damaged, or has a link in it.
        StartError: the library is not installed, or the key cannot be used.
    """
    for artifact in load_any_manifest(folder).artifacts.values():
        load_artifact(folder, artifact)
    model_signing = _import_library()
    try:
        signer = model_signing.signing.Config().use_elliptic_key_signer(private_key=key)
    except Exception as error:  # the library raises whatever its parts do
        raise StartError(f"{key} is not a private key that can sign: {error}") from error
    target = folder / SIGNATURE_FILE
    hashing = model_signing.hashing.Config().set_ignored_paths(paths=[SIGNATURE_FILE])
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as beside:
        written = Path(beside) / SIGNATURE_FILE
        try:
            signer.set_hashing_config(hashing).sign(folder.resolve(), written)
        except ValueError as error:
            raise ModelRefusedError(f"{folder} cannot be signed: {error}") from error
        written.replace(target)
    return target


def check_public_key(key: Path) -> None:
    """Check that signatures can be checked.

    Raises:
        StartError: the library is not installed, or the key cannot be used.
    """
    try:
        _import_library().verifying.Config().use_elliptic_key_verifier(public_key=key)
    except Exception as error:
        raise StartError(f"--require-signature: {key} is not a public key that can be used: {error}") from error


def check_signature(folder: Path, key: Path) -> str:
    """Check that every file of a version folder is as it was signed, and return the SHA-256 of the signed manifest.

    Raises:
        ModelRefusedError: there is no signature, or it is by another key, or of other files.
        StartError: see `check_public_key`.
    """
    check_public_key(key)
    try:
        with (folder / SIGNATURE_FILE).open("rb") as file:
            content = file.read(MAX_SIGNATURE_BYTES)
    except OSError as error:
        raise ModelRefusedError(
            f"{SIGNATURE_FILE} cannot be read ({error.strerror}), and only signed versions are served; "
            "sign it with `python -m service sign`"
        ) from error
    verifier = _import_library().verifying.Config().use_elliptic_key_verifier(public_key=key)
    with tempfile.TemporaryDirectory() as private:  # what is checked cannot be exchanged before it is read below
        copy = Path(private) / SIGNATURE_FILE
        copy.write_bytes(content)
        try:
            verifier.verify(folder.resolve(), copy)
            return _find_digest(content, MANIFEST_FILE)
        except Exception as error:
            raise ModelRefusedError(f"{SIGNATURE_FILE} does not verify: {_explain(error)}") from error


def _find_digest(signature: bytes, name: str) -> str:
    """Return the SHA-256 of a file in a signature that has been verified."""
    envelope = json.loads(signature)["dsseEnvelope"]
    signed = json.loads(base64.b64decode(envelope["payload"]))["predicate"]["resources"]
    return next(str(file["digest"]) for file in signed if file["name"] == name and file["algorithm"] == "sha256")


def _explain(error: Exception) -> str:
    """Return the library's reason as a part of one sentence."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if "Key mismatch" in reason or type(error).__name__ == "InvalidSignature":
        return "it is by another key"
    if files := _CHANGED.findall(reason):
        return f"these files are not as they were signed: {', '.join(files)}"
    return reason[:200]


def _import_library() -> Any:  # noqa: ANN401 - it is an extra
    try:
        import model_signing  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as error:
        raise StartError(_MISSING) from error
    return model_signing
