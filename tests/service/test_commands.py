"""Tests of service.cli.commands, through the command line."""

import io
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from service import __version__
from service.__main__ import main
from service.cli.commands import find_version
from service.cli.demo import DEMO
from service.errors import NotFoundError
from tests import fakes
from tests.servers import ROOT, clean_environment


def test_predict_from_a_file(models_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`predict` prints the very body that the service would answer, for the newest version or a named one."""
    body = tmp_path / "body.json"
    body.write_text('{"instances": [[2], {"x": 3}]}')
    flags = ["--input", str(body), "--models-dir", str(models_dir)]
    assert main(["predict", "doubler", *flags]) == 0
    expected = '{"model":"doubler","version":2,"predictions":[{"prediction":5.0},{"prediction":7.5}]}\n'
    assert capsys.readouterr().out == expected
    assert main(["predict", "doubler/1", "--backend", "torchscript", *flags]) == 0
    assert [each["prediction"] for each in json.loads(capsys.readouterr().out)["predictions"]] == [4, 6]


def test_predict_from_standard_input(
    models_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--input -` reads standard input; parameters work as over HTTP."""
    body = b'{"instances": [[0, 0]], "parameters": {"threshold": 0.5}}'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(body)))
    assert main(["predict", "coin", "--input", "-", "--models-dir", str(models_dir)]) == 0
    (prediction,) = json.loads(capsys.readouterr().out)["predictions"]
    assert prediction == {"prediction": 1, "label": "heads", "probability": 0.5, "probabilities": [0.5, 0.5]}


@pytest.mark.parametrize(
    ("model", "body", "message"),
    [
        ("nosuch", "{}", "there is no nosuch in "),
        ("doubler/9", "{}", "there is no doubler/9 in "),
        ("doubler", "{}", 'the body has no "instances"'),
        ("doubler", '{"instances": [[1, 2]]}', "instances[0] has 2 values, expected 1"),
        ("doubler", None, "cannot be read: No such file"),
    ],
)
def test_predict_refuses_with_one_line(
    model: str, body: str | None, message: str, models_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be answered is one line on standard error, nothing on standard output, exit code 1."""
    file = tmp_path / "body.json"
    if body is not None:
        file.write_text(body)
    assert main(["predict", model, "--input", str(file), "--models-dir", str(models_dir)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_verify_prints_a_row_for_each_backend(models_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`verify` checks every version on every backend: digest, golden samples, and parity between the two."""
    assert main(["verify", "--models-dir", str(models_dir), "--device", "cpu"]) == 0
    header, *rows, summary = capsys.readouterr().out.splitlines()
    assert header.split() == ["model", "version", "backend", "device", "digest", "golden", "parity"]
    assert len(rows) == 12
    assert summary == "12 checks of 6 versions, 0 skipped, 0 failed"
    doubler = [row.split() for row in rows if row.startswith("doubler")]
    assert doubler[0] == ["doubler", "1", "onnx", "cpu", "ok", "2", "ok", "-"]
    assert doubler[1] == ["doubler", "1", "torchscript", "cpu", "ok", "2", "ok", "0.0e+00", "from", "onnx"]


def test_verify_fails_for_one_broken_version(empty_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One broken version fails the command, and its row says why; the others are checked all the same."""
    fakes.write_version(empty_dir, fakes.doubler())
    fakes.write_version(empty_dir, fakes.liar())
    (fakes.write_version(empty_dir, fakes.doubler(version=2)) / "manifest.json").write_text("{}")
    third = fakes.doubler(version=3)
    third.contents["torchscript"] = fakes.doubler(factor=2.001).contents["torchscript"]
    third.more.clear()
    fakes.write_version(empty_dir, third)
    assert main(["verify", "--models-dir", str(empty_dir)]) == 1
    text = capsys.readouterr().out
    assert "FAILED: its onnx graph on cpu misses a golden output" in text
    assert "FAILED: manifest.json: name: Field required" in text
    assert "FAILED: 1.0e-03 from onnx" in text
    assert text.splitlines()[-1] == "6 checks of 4 versions, 0 skipped, 3 failed"


def test_verify_names_the_damaged_file(empty_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A damaged file fails in its own row; the other file of the version is intact, and is not run."""
    with (fakes.write_version(empty_dir, fakes.doubler()) / "model.pt").open("ab") as file:
        file.write(b"x")
    assert main(["verify", "--models-dir", str(empty_dir)]) == 1
    _, onnx, torchscript, summary = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"doubler +1 +onnx +- +ok +- +skipped: another file of it is damaged", onnx)
    assert "torchscript  -       FAILED: model.pt has " in torchscript
    assert summary == "2 checks of 1 versions, 1 skipped, 1 failed"


def test_reader_that_has_gone_is_no_traceback(models_dir: Path) -> None:
    """A command whose output nobody reads any more, as in `verify | head`, ends without a word."""
    command = [sys.executable, "-m", "service", "verify", "--models-dir", str(models_dir)]
    with subprocess.Popen(
        command, cwd=ROOT, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait() == 1


def test_verify_of_nothing_fails(empty_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty models folder is an error, not a success about nothing."""
    assert main(["verify", "--models-dir", str(empty_dir)]) == 1
    assert capsys.readouterr().err == f"error: there is no model in {empty_dir}\n"


def test_newest_version_is_found_by_number(empty_dir: Path) -> None:
    """Version 10 comes after version 9; hidden folders and words are no versions."""
    for version in (9, 10):
        fakes.write_version(empty_dir, fakes.doubler(version=version))
    fakes.write_version(empty_dir / ".staging-x", fakes.doubler())
    assert find_version(empty_dir, "doubler").version == 10
    assert find_version(empty_dir, "doubler", "9").version == 9
    with pytest.raises(NotFoundError, match=r"there is no x in .*; there are doubler"):
        find_version(empty_dir, "x")


def test_verify_knows_versions_from_other_folders(empty_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder named ² or 01 is no version, and no reason to fail."""
    folder = fakes.write_version(empty_dir, fakes.doubler())
    for other in ("²", "01"):
        shutil.copytree(folder, folder.parent / other)
    assert main(["verify", "--models-dir", str(empty_dir), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 checks of 1 versions, 0 skipped, 0 failed"


def test_folder_of_one_version_is_verified_and_predicts(
    empty_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """KServe's layout, one version's files directly in the folder, is read by every command as it is served."""
    fakes.write_version(empty_dir, fakes.doubler(version=3)).rename(tmp_path / "mounted")
    flags = ["--models-dir", str(tmp_path / "mounted"), "--device", "cpu"]
    assert main(["verify", *flags]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["doubler", "3", "onnx"]
    (tmp_path / "body.json").write_text('{"instances": [[2]]}')
    assert main(["predict", "doubler", "--input", str(tmp_path / "body.json"), *flags]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == 3


class Foreign(BaseHTTPRequestHandler):
    """Answers every POST as a proxy in front of nothing does, or another service; the path says how."""

    def do_POST(self) -> None:
        """Answer."""
        code, _, text = self.path[1:].partition("/")[0].partition("-")
        self.send_response(int(code))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def foreign() -> Iterator[str]:
    """The address of a server that is no model service."""
    with HTTPServer(("127.0.0.1", 0), Foreign) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("502-<html>", "/502-<html>/v2/repository/index answers 502 Bad Gateway"),
        ("502-[]", "answers 502 Bad Gateway"),
        ('400-{"error":"no"}', "error: no"),
        ("200-<html>", "no model service answers at "),
    ],
)
def test_what_is_no_model_service_is_one_line(
    path: str, message: str, foreign: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a proxy or another service answers is one line and exit code 1, whatever it is."""
    assert main(["models", "list", "--url", f"{foreign}/{path}"]) == 1
    error = capsys.readouterr().err
    assert (error.startswith("error: "), message in error, error.count("\n")) == (True, True, 1), error


@pytest.mark.parametrize("url", ["foo", "http:", "http://127.0.0.1:x", "http://127.0.0.1:1/a b", "http://[::"])
def test_address_that_is_none_is_one_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An address that cannot be asked is one line and exit code 1."""
    assert main(["models", "list", "--url", url]) == 1
    error = capsys.readouterr().err
    assert (error.startswith("error: "), url in error, error.count("\n")) == (True, True, 1), error


def test_wrong_command_line_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    """Argparse's own errors keep their code."""
    for arguments in ([], ["dance"], ["predict"], ["serve", "--nosuch"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["srve"],
            "there is no 'srve' here; there are serve, init, verify, predict, models, sign, package, completion;"
            " did you mean serve?",
        ),
        (["serve", "--prot", "9"], "serve takes no --prot; did you mean --port?"),
        (["models", "lst"], "did you mean list?"),
        (["verify", "--zzz"], "verify takes no --zzz; see"),
    ],
)
def test_mistyped_words_get_a_suggestion(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line says what is wrong, what is close, and where the help is."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error
    assert "--help`" in error


def test_help_of_models_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Port and keys are those of the service that is asked, not of one that starts."""
    with pytest.raises(SystemExit):
        main(["models", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "port of the service, on this machine" in text
    assert "0 picks a free one" not in text


def test_init_makes_a_folder_that_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example verifies where it was put, and what is there already is left alone."""
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    assert "model-service serve --models-dir models" in capsys.readouterr().out
    assert main(["verify", "--models-dir", "models"]) == 0
    assert main(["init"]) == 1
    assert "models exists and is not an empty folder" in capsys.readouterr().err


def test_demo_is_what_is_published() -> None:
    """The installed models are copies of published ones, and verify."""
    assert main(["verify", "--models-dir", str(DEMO)]) == 0
    for copy, file in (("mnist-cnn/3", "model.int8.onnx"), ("logistic-hours/1", "model.onnx")):
        assert (DEMO / copy / "model.onnx").read_bytes() == (ROOT / "models" / copy / file).read_bytes()


def test_completion_names_commands_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    """In bash, `mod` becomes models, and `serve --work` becomes --workers."""
    assert main(["completion"]) == 0
    script = capsys.readouterr().out
    for words, found in (("mod", "models"), ("serve --work", "--workers")):
        typed = words.split()
        ask = f"COMP_WORDS=(model-service {words}); COMP_CWORD={len(typed)}; _model_service; echo ${{COMPREPLY[@]}}"
        done = subprocess.run(
            ["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True, timeout=30
        )
        assert done.stdout.split() == [found]


def test_missing_packages_are_one_line() -> None:
    """Outside the environment, a command says what to do and shows no traceback."""
    command = [sys.executable, "-S", "-m", "service", "serve"]
    done = subprocess.run(
        command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert ".venv/bin/python" in done.stderr
    assert done.stderr.count("\n") == 1


def test_bad_setting_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    """A setting that cannot be used is one line, exit code 1."""
    assert main(["serve", "--workers", "many"]) == 1
    assert capsys.readouterr().err.startswith("error: --workers='many': ")


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    """--version and --help of every command answer and leave with 0."""
    for arguments in (
        ["--version"],
        ["--help"],
        *([name, "--help"] for name in ("serve", "verify", "predict", "package")),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
    assert __version__ in capsys.readouterr().out
