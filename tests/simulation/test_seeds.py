"""Every scenario passes with its seeds; see `python -m tests.simulation --help`."""

import os
import subprocess
import sys

import pytest

from tests.servers import ROOT
from tests.simulation.__main__ import SEEDS


def simulate(*arguments: str) -> str:
    """Run the simulation in a process whose sets have the order that seeds ask for, and return what it says."""
    command = [sys.executable, "-m", "tests.simulation", "--jobs", "1", *arguments]
    # Not under coverage, which follows no greenlets.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COV_", "COVERAGE_"))}
    found = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.mark.parametrize("scenario", SEEDS)
def test_seeds_pass(scenario: str) -> None:
    """No seed finds a request unanswered, workers that disagree, or anything that is left."""
    report = simulate(scenario)
    assert f"{SEEDS[scenario]:,} seeds pass" in report
    print(report)


def test_same_seed_is_same_run() -> None:
    """A seed that fails can be replayed in another process, step by step."""
    for scenario in SEEDS:
        assert simulate(scenario, "--replay", "11") == simulate(scenario, "--replay", "11")
