"""Tests of service.runtime_folder, and that a service goes on without its folder."""

import json
import os
import shutil
import stat
import tempfile
from pathlib import Path

import pytest

from service import runtime_folder
from service.errors import StartError
from service.runtime_folder import Access, RuntimeFolder, build_url, find_access


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two places for the folder, in place of the system's."""
    found = [tmp_path / "first", tmp_path / "second"]
    for each in found:
        each.mkdir()
    monkeypatch.setattr(runtime_folder, "_list_places", lambda: found)
    return found


def test_folder_is_private_and_removed(places: list[Path]) -> None:
    """It is in the first place, for this user alone, and so is the token in it; it ends with the service."""
    with RuntimeFolder() as folder:
        folder.allow_command_line("127.0.0.1", 8000, "secret")
        assert folder.path.parent == places[0]
        assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
        (file,) = folder.path.iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert find_access("http://127.0.0.1:8000") == Access("http://127.0.0.1:8000", "secret")
    assert not folder.path.exists()
    assert find_access("http://127.0.0.1:8000") is None


@pytest.mark.parametrize(
    ("host", "url", "is_found"),
    [
        ("127.0.0.1", "http://localhost:8000", True),
        ("127.0.0.1", "http://[::1]:8000", True),
        ("0.0.0.0", "http://127.0.0.1:8000/", True),
        ("::", "http://localhost:8000", True),
        ("192.0.2.7", "http://192.0.2.7:8000", True),
        ("192.0.2.7", "http://127.0.0.1:8000", False),
        ("127.0.0.1", "http://192.0.2.7:8000", False),
        ("127.0.0.1", "http://127.0.0.1:8001", False),
        ("127.0.0.1", "https://127.0.0.1:8000", False),
        ("127.0.0.1", "http://127.0.0.1.example.com:8000", False),
        ("127.0.0.1", "http://127.0.0.1:x", False),
        ("127.0.0.1", "http://[::", False),
        ("127.0.0.1", "", False),
    ],
)
def test_token_is_only_for_its_service(host: str, url: str, is_found: bool) -> None:
    """It is sent to no other port, machine or protocol."""
    with RuntimeFolder() as folder:
        folder.allow_command_line(host, 8000, "secret")
        assert (find_access(url) is not None) == is_found


def test_each_service_has_its_own() -> None:
    """Services on several ports are told apart."""
    with RuntimeFolder() as one, RuntimeFolder() as other:
        one.allow_command_line("127.0.0.1", 8000, "one")
        other.allow_command_line("127.0.0.1", 8001, "other")
        assert [find_access(build_url("127.0.0.1", port)) for port in (8000, 8001)] == [
            Access("http://127.0.0.1:8000", "one"),
            Access("http://127.0.0.1:8001", "other"),
        ]


def test_dead_services_and_other_users_are_ignored(places: list[Path], tmp_path: Path) -> None:
    """What a killed service left, or another user has laid out, is no service to talk to."""
    access = json.dumps(Access("http://127.0.0.1:8000", "stale"))
    for name, mode in (("model-service-dead", 0o700), ("model-service-open", 0o755)):
        (places[0] / name).mkdir(mode=mode)
        (places[0] / name / "access.json").write_text(access)
    (places[1] / "model-service-link").symlink_to(tmp_path)
    (places[1] / "model-service-file").touch()
    locked = runtime_folder._open_locked(places[0] / "model-service-open")
    assert find_access("http://127.0.0.1:8000") is None
    os.close(locked)


def test_leftovers_of_killed_services_are_removed(places: list[Path]) -> None:
    """What a killed service left is removed by the next; living services, and folders just made, are not."""
    with RuntimeFolder() as living:
        for name in ("model-service-dead", "model-service-new", "model-service-open", "other"):
            (places[1] / name).mkdir(mode=0o755 if name.endswith("open") else 0o700)
        for folder in (living.path, *places[1].iterdir()):
            if not folder.name.endswith("new"):
                os.utime(folder, (0, 0))
        with RuntimeFolder():
            assert living.path.exists()
            assert {each.name for each in places[1].iterdir()} == {"model-service-new", "model-service-open", "other"}


def test_folder_that_was_removed_is_made_again(places: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    """Cleaned away, as a whole or in part, it is there again after the next check."""
    with RuntimeFolder() as folder:
        folder.allow_command_line("127.0.0.1", 8000, "secret")
        for is_whole in (True, False):
            shutil.rmtree(folder.path) if is_whole else (folder.path / "access.json").unlink()
            assert find_access("http://127.0.0.1:8000") is None
            folder.repair()
            assert find_access("http://127.0.0.1:8000") is not None
        assert not caplog.records
        shutil.rmtree(places[0])
        for _ in range(3):
            folder.repair()
    sentence = f"{folder.path} cannot be written to: No such file or directory; `python -m service models` and new"
    assert [record.getMessage() for record in caplog.records] == [f"{sentence} engines need it"]


def test_folder_of_another_user_in_its_place_gets_no_token(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever takes the name of a folder that was removed does not learn the token."""
    with RuntimeFolder() as folder:
        folder.allow_command_line("127.0.0.1", 8000, "secret")
        shutil.rmtree(folder.path)
        folder.path.mkdir(mode=0o777)
        os.chmod(folder.path, 0o777)
        folder.repair()
        assert not list(folder.path.iterdir())
        assert "File exists" in caplog.text


def test_full_place_is_passed_over(places: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be written, the next place is taken; where there is none, the reason is said."""
    real = Path.write_bytes

    def write(path: Path, data: bytes) -> int:
        if path.is_relative_to(places[0]):
            raise OSError(28, "No space left on device")
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", write)
    with RuntimeFolder() as folder:
        assert folder.path.parent == places[1]
    assert not list(places[0].iterdir())
    places.pop()
    with pytest.raises(StartError, match=r"first: No space left on device\); set TMPDIR"):
        RuntimeFolder()


def test_memory_is_preferred_unless_logging_out_removes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that was started in a login session is to outlive it, so its folder is on disk."""
    monkeypatch.undo()
    for name in ("run", "disk"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "disk"))
    monkeypatch.delenv("XDG_SESSION_ID", raising=False)
    listed = runtime_folder._list_places()
    assert (listed[0], listed[-1]) == (tmp_path / "run", tmp_path / "disk")
    monkeypatch.setenv("XDG_SESSION_ID", "1")
    assert runtime_folder._list_places()[0] == tmp_path / "disk"
