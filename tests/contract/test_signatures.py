"""A service that requires signatures, over HTTP: what is signed is served, and what is not leaves it as it was."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.model.signature import SIGNATURE_FILE, sign_version
from tests import fakes
from tests.keys import Keys, make_keys
from tests.servers import Server, run_service
from tests.wire import wait_until

LIVELY = ("--workers", "1", "--reload-interval", "0.1")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """The keys of whoever may publish."""
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def serving(empty_dir: Path, keys: Keys) -> Iterator[Server]:
    """A server of one signed version."""
    sign_version(fakes.write_version(empty_dir, fakes.doubler().only("onnx")), keys.private)
    with Server(empty_dir, *LIVELY, "--require-signature", str(keys.public)) as server:
        yield server


def predict(server: Server) -> object:
    """Return what the latest version says of 1."""
    return server.predict("doubler", [[1]]).json()["predictions"][0]["prediction"]


def write_unsigned(root: Path, version: int, factor: float) -> Path:
    """Publish a version that is whole, in one step."""
    beside = fakes.write_version(root.parent / "beside", fakes.doubler(version, factor).only("onnx"))
    return beside.rename(root / "doubler" / str(version))


def test_only_signed_versions_are_served(serving: Server, empty_dir: Path, keys: Keys) -> None:
    """A version without a signature is refused with a sentence; once it is signed, it is served."""
    assert predict(serving) == 2
    folder = write_unsigned(empty_dir, 2, 3.0)
    wait_until(lambda: "only signed versions are served" in serving.log())
    assert predict(serving) == 2
    sign_version(folder, keys.private)
    wait_until(lambda: predict(serving) == 3)


def test_signature_of_another_key_is_refused(serving: Server, empty_dir: Path, tmp_path: Path) -> None:
    """Whoever may write to the folder but has not the key changes nothing."""
    folder = write_unsigned(empty_dir, 2, 3.0)
    sign_version(folder, make_keys(tmp_path).private)
    wait_until(lambda: "it is by another key" in serving.log())
    assert predict(serving) == 2
    versions = serving.get("/v1/models/doubler").json()
    assert "it is by another key" in json.dumps(versions)


def test_signed_version_that_is_changed_is_refused(serving: Server, empty_dir: Path, keys: Keys) -> None:
    """A signature of other files, such as that of the version before, proves nothing."""
    folder = write_unsigned(empty_dir, 2, 3.0)
    (folder / SIGNATURE_FILE).write_bytes((empty_dir / "doubler/1" / SIGNATURE_FILE).read_bytes())
    wait_until(lambda: "not as they were signed: manifest.json" in serving.log())
    assert predict(serving) == 2


def test_service_does_not_start_without_a_usable_key(empty_dir: Path, tmp_path: Path) -> None:
    """A key that is not there is one line, before anything is served."""
    fakes.write_version(empty_dir, fakes.doubler().only("onnx"))
    done = run_service("serve", "--models-dir", str(empty_dir), "--require-signature", str(tmp_path / "nothing.pem"))
    assert done.returncode == 1
    assert "nothing.pem is not a public key" in done.stderr
