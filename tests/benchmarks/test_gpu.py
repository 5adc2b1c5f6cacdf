"""`benchmarks.gpu`, rehearsed on the CPU: every step runs, is shown and is written down, whatever the others do."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu import PLANS
from tests.mnist_files import write_mnist
from tests.servers import ROOT

SECONDS = 300


def run(tmp_path: Path, *flags: str, **environment: str) -> tuple[int, dict[str, Any], str]:
    """Run it and return its exit code, its report and what it printed."""
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick", "--out", str(out)]
    done = subprocess.run(
        [*command, f"--made-dir={tmp_path / 'made'}", *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return done.returncode, json.loads(out.read_text())["steps"], done.stdout


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a few digits, as many as a split takes."""
    random = np.random.default_rng(0)
    images = random.integers(256, size=(5_700, 28, 28), dtype=np.uint8)
    write_mnist(tmp_path / "data", images, random.integers(10, size=5_700, dtype=np.uint8), test_count=100)
    return tmp_path / "data"


def test_rehearsal_runs_every_step(tmp_path: Path, data: Path) -> None:
    """On the CPU, each step does what it can; what is killed comes back, and what cannot fit is one clean failure."""
    code, steps, printed = run(tmp_path, f"--data-dir={data}")
    outcomes = {name: step["outcome"] for name, step in steps.items()}
    assert outcomes == dict.fromkeys(PLANS, "done") | {"medium": "skipped: there are no large models"}
    assert code == 0
    assert [row["device"] for row in steps["outputs"]["rows"]] == ["cpu"] * 18  # nine models, two backends
    assert steps["kill"]["rows"][0]["recovered after s"] > 0
    assert [row.get("status") for row in steps["memory"]["rows"]] == [500, None, None]
    assert steps["digits"]["rows"][0]["failed"] == 0
    assert "| mnist | cpu | 1 |" in printed


def test_failed_step_stops_no_other(tmp_path: Path) -> None:
    """Without data and with no model on the device asked for, the steps that need neither go on."""
    (tmp_path / "none").mkdir()
    code, steps, _ = run(tmp_path, "--only", "models", "outputs", "sizes", f"--models-dir={tmp_path / 'none'}")
    assert code == 1
    assert steps["models"]["outcome"] == "done"
    assert steps["outputs"]["outcome"] == "failed: no backend reaches it"
    assert steps["sizes"]["outcome"].startswith("failed with exit code 1")
    assert "no model mnist" in steps["sizes"]["outcome"]
