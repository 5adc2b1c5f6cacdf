"""Tests of service.api.headers."""

import tracemalloc

import pytest

from service.api.headers import PredictRoute, match_route


@pytest.mark.parametrize("name", ["doubler", "x" * 60_000])
def test_predict_path_names_its_target(name: str) -> None:
    """A name may be long; that there is no such model is said later."""
    path = f"/v1/models/{name}/versions/2:predict"
    assert match_route(path) == PredictRoute("v1", name, "2", path)
    path = f"/v2/models/{name}/infer"
    assert match_route(path) == PredictRoute("v2", name, None, path)
    assert match_route(f"/v2/models/{name}") is None


def test_long_paths_are_not_kept() -> None:
    """Paths that callers make up take no memory once they are answered."""
    tracemalloc.start()
    try:
        for number in range(200):
            match_route(f"/v1/models/{number}{'x' * 60_000}:predict")
        assert tracemalloc.get_traced_memory()[0] < 2**20
    finally:
        tracemalloc.stop()
