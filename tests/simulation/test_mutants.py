"""Bugs put in on purpose are found by the seeds of CI."""

import pytest

from tests.simulation.mutants import MUTANTS
from tests.simulation.test_seeds import simulate


def test_mutants_are_many() -> None:
    """There are at least twenty, of every scenario."""
    assert len(MUTANTS) >= 20
    assert len({mutant.scenario for mutant in MUTANTS}) == 4


@pytest.mark.parametrize("scenario", sorted({mutant.scenario for mutant in MUTANTS}))
def test_mutants_are_found(scenario: str) -> None:
    """Some seed fails with each, and passes without it."""
    report = simulate(scenario, "--mutants")
    assert report.count("found by seed") == sum(mutant.scenario == scenario for mutant in MUTANTS), report
    print(report)
