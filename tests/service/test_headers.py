"""Tests of service.api.headers."""

import tracemalloc

import pytest

from service.api.headers import PredictRoute, match_route, match_target


@pytest.mark.parametrize("name", ["doubler", "x" * 60_000])
def test_predict_path_names_its_target(name: str) -> None:
    """A name may be long; that there is no such model is said later."""
    path = f"/v1/models/{name}/versions/2:predict"
    assert match_route(path) == PredictRoute("v1", (name, "2"), "predict", path)
    path = f"/v2/models/{name}/infer"
    assert match_route(path) == PredictRoute("v2", (name, None), "infer", path)
    assert match_route(f"/v2/models/{name}") is None


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"/v1/models/%64oubler:predict?x=1", "/v1/models/doubler:predict"),
        (b"/v1/models/doubler%3Apredict", "/v1/models/doubler:predict"),
        (b"/v1/models/a%2Fb:predict", ""),
        (b"/v1/models/%ff:predict", "/v1/models/\N{REPLACEMENT CHARACTER}:predict"),
    ],
)
def test_targets_are_percent_decoded(target: bytes, path: str) -> None:
    """A percent-encoded path is the path that it encodes; an encoded slash is no part of a model's name."""
    route = match_target(target)
    assert (route.path if route else "") == path


def test_long_paths_are_not_kept() -> None:
    """Paths that callers make up take no memory once they are answered."""
    tracemalloc.start()
    try:
        for number in range(200):
            match_target(f"/v1/models/{number}{'x' * 60_000}:predict".encode())
        assert tracemalloc.get_traced_memory()[0] < 2**20
    finally:
        tracemalloc.stop()
