"""The gallery: each page's script and command are run, and answers over HTTP equal those of the library itself."""

import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from service.model.manifest import Manifest
from service.model.version_folder import load_any_manifest
from tests.servers import ROOT, Server, clean_environment

PAGES = sorted(path for path in (ROOT / "docs" / "gallery").glob("*.md") if path.stem != "README")
NEEDS = {"xgboost": ("xgboost", "onnxmltools"), "lightgbm": ("lightgbm", "onnxmltools"), "quantized": ("onnx",)}
PACKAGE_SECONDS = 60  # on a busy machine; docs/gallery has the times on a quiet one
ROWS = {"torchvision": 2}  # compared; elsewhere 1,000


def find_blocks(page: Path, language: str) -> list[str]:
    """Return a page's code in a language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all pages, whose models come while it runs."""
    with Server(
        tmp_path_factory.mktemp("models"), "--workers", "1", "--device", "cpu", "--reload-interval", "0.2"
    ) as up:
        yield up


@pytest.fixture(scope="module")
def models_dir(server: Server) -> Path:
    """The folder that the server serves."""
    arguments = server.process.args
    assert isinstance(arguments, list)
    return Path(str(arguments[arguments.index("--models-dir") + 1]))


def read_numbers(answer: dict[str, Any]) -> list[float]:
    """Return the numbers of one prediction of /v1, in the order of the graph's output."""
    if "probabilities" in answer:
        return list(answer["probabilities"])
    if "outputs" in answer:
        return [number for output in answer["outputs"].values() for number in np.ravel(output)]
    return list(answer["prediction"].values())


def ask(server: Server, manifest: Any, body: Path) -> np.ndarray[Any, Any]:  # of either kind
    """Return the service's answers to a page's requests, (N, K); labels must be those of the largest numbers."""
    is_typed = isinstance(manifest, Manifest)
    path = f"/v1/models/{manifest.name}:predict" if is_typed else f"/v2/models/{manifest.name}/infer"
    until = time.monotonic() + 60
    while True:
        reply = requests.post(
            server.url + path, body.read_bytes(), headers={"Content-Type": "application/json"}, timeout=60
        )
        if reply.status_code not in (404, 503) or time.monotonic() > until:
            break
        time.sleep(0.1)
    assert reply.status_code == 200, reply.text[:500]
    if not is_typed:
        output = reply.json()["outputs"][0]
        return np.reshape(output["data"], output["shape"])
    answers = reply.json()["predictions"]
    if "label" in answers[0]:
        for answer in answers:
            index = int(np.argmax(answer["probabilities"]))
            assert answer["label"] == manifest.output.labels[index]
    return np.array([read_numbers(answer) for answer in answers])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_is_served_as_its_library_answers(
    page: Path, server: Server, models_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the script's file by one command to answers over HTTP, within 1e-4 of the library's; prints the times."""
    for library in NEEDS.get(page.stem, ()):
        pytest.importorskip(library)
    (script,) = find_blocks(page, "python")
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=tmp_path, env=clean_environment(), check=True)
    for line in find_blocks(page, "sh")[0].splitlines():
        words = shlex.split(line)[1:]
        begun, worked = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        run = subprocess.run(
            [sys.executable, *words, "--models-dir", str(models_dir)],
            cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        packaged, spent = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
        assert packaged < PACKAGE_SECONDS
        name = Path(words[3]).stem
        manifest = load_any_manifest(models_dir / name / "1")
        assert (models_dir / name / "1" / "manifest.json").stat().st_size < 100_000
        body = next(path for path in (tmp_path / f"{name}-rows.json", tmp_path / f"{name}.json") if path.exists())
        expected = np.load(tmp_path / f"{name}.npy")
        found = ask(server, manifest, body)
        cpu = spent.ru_utime + spent.ru_stime - worked.ru_utime - worked.ru_stime
        with capsys.disabled():
            print(f"\n{name}: packaged in {packaged:.1f} s ({cpu:.1f} s of CPU), all answers after", end=" ")
            print(f"{time.monotonic() - begun:.1f} s")
        assert len(expected) == ROWS.get(page.stem, 1000)
        assert found.shape == expected.shape
        assert np.allclose(found, expected, rtol=1e-4, atol=1e-4)
        if isinstance(manifest, Manifest) and manifest.output.labels:
            order = np.sort(expected, axis=1)
            is_clear = order[:, -1] - order[:, -2] > 1e-3
            assert (found.argmax(axis=1) == expected.argmax(axis=1))[is_clear].all()


def test_gallery_lists_every_page() -> None:
    """The table names each page."""
    table = (ROOT / "docs" / "gallery" / "README.md").read_text()
    assert all(f"({page.name})" in table for page in PAGES)
    assert len(PAGES) == 10
