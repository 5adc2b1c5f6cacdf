"""What `pip install` installs, from a wheel that is built from the source distribution."""

import json
import site
import socket
import subprocess
import sys
import tarfile
import venv
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from tests.servers import ROOT, clean_environment
from tests.wire import wait_until

pytest.importorskip("build", reason="it needs build, of the dev extra")


ENVIRONMENT = {name: value for name, value in clean_environment().items() if name != "PYTHONPATH"}


def run(command: list[str | Path], folder: Path) -> str:
    """Run a command in a folder, and return its output."""
    done = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed command, in an environment whose other packages are those of this one."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("distribution")
    for name in run(
        ["git", "ls-files", "model_service", "service", "training", "pyproject.toml", "README.md", "LICENSE"], ROOT
    ).split():
        target = folder / "source" / name
        if (ROOT / name).exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, folder / "source"], folder)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        assert any(name.endswith("service/demo/mnist-cnn/3/model.onnx") for name in archive.getnames())
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    run(
        [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", next(folder.glob("*.whl"))],
        folder,
    )
    home = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip())
    (home / "others.pth").write_text("\n".join(site.getsitepackages()))
    assert run([python, "-c", "import service; print(service.__file__)"], folder).startswith(str(home))
    return folder / "venv" / "bin" / "model-service"


def test_demo_answers_in_any_folder(program: Path, tmp_path: Path) -> None:
    """`serve --demo` serves two models, the page and the docs, without a models folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [str(program), "serve", "--demo", "--port", str(port), "--workers", "1"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=log, stderr=log)
    try:
        wait_until(lambda: _get(f"{url}/health/ready") == 200 or process.poll() is not None, 60)
        body = json.dumps({"instances": [{"hours": 2}]}).encode()
        with urlopen(
            Request(f"{url}/v1/models/logistic-hours:predict", body, {"Content-Type": "application/json"})
        ) as got:
            assert json.load(got)["predictions"][0]["label"] == "fail"
        for path in ("/playground/app.js", "/docs", "/docs/swagger-ui.css", "/v1/models/mnist-cnn/card"):
            assert _get(f"{url}{path}") == 200
    finally:
        process.terminate()
        assert process.wait(30) == 0, (tmp_path / "log").read_text()


def _get(url: str) -> int:
    try:
        with urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except OSError:
        return 0


def test_new_folder_is_verified_and_predicts(program: Path, tmp_path: Path) -> None:
    """`init`, `verify` and `predict` work by the command's own name."""
    assert "model-service serve --models-dir models" in run([program, "init"], tmp_path)
    assert "0 failed" in run([program, "verify"], tmp_path)
    (tmp_path / "body.json").write_text('{"instances": [[4]]}')
    answer = run([program, "predict", "logistic-hours", "--input", "body.json"], tmp_path)
    assert json.loads(answer)["predictions"][0]["label"] == "pass"
    assert "py.typed" in run(["ls", next(program.parents[1].glob("lib/*/site-packages/model_service"))], tmp_path)
