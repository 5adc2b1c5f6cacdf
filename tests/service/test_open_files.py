"""Tests of service.hosts.open_files."""

import resource

import pytest

from service.hosts.open_files import RESERVED, SHARED, fit_open_files
from service.settings import Settings

OTHERS = RESERVED + 2 * SHARED
INFINITE = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("before", "after", "connections"),
    [
        ((1024, 2**20), (4096 + OTHERS, 2**20), 4096),
        ((1024, INFINITE), (4096 + OTHERS, INFINITE), 4096),
        ((65536, 65536), (65536, 65536), 4096),
        ((INFINITE, INFINITE), (INFINITE, INFINITE), 4096),
        ((1024, 2048), (2048, 2048), 2048 - OTHERS),
        ((64, 64), (64, 64), 1),
    ],
)
def test_limit_is_raised_or_the_connections_are_fewer(
    before: tuple[int, int],
    after: tuple[int, int],
    connections: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The soft limit is raised as far as needed, never lowered; where the hard one is too low, one line says so."""
    limits = [before]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: limits.append(both))
    assert fit_open_files(Settings(), processes=2).max_connections == connections
    assert limits[-1] == after
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == (connections < 4096)
    for line in warned:
        assert line.startswith(f"a worker takes {connections} connections, not --max-connections=4096: it may open ")
        assert line.endswith(f"raise `ulimit -Hn` to {4096 + OTHERS}")
