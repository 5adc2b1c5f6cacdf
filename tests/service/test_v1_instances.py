"""Tests of service.api.v1.instances and of the fast reader in decode, which must agree."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.api.json_values import fast_json
from service.api.v1.decode import parse_instances
from service.api.v1.instances import nested_shapes, read_instances
from service.errors import InvalidRequestError
from service.model.manifest import ImageInput, ImageSpec, Manifest
from tests import fakes

COIN, CANVAS, DOUBLER = fakes.coin().manifest(), fakes.canvas().manifest(), fakes.doubler().manifest()
TINY = Manifest.model_validate(
    fakes.canvas().fields()
    | {"input": {"kind": "image", "shape": [6], "image": {"width": 3, "height": 2}}, "artifacts": CANVAS.artifacts}
)

NUMBERS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(0, 1, width=32),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, -0.0, 1, 1e308, -1e39, 5e-324, 2**53 + 1]),
)
VALUES: st.SearchStrategy[Any] = st.one_of(
    NUMBERS, st.none(), st.booleans(), st.sampled_from(["", "[", "]", "a", "b", "instances", "1"])
)
TREES: st.SearchStrategy[Any] = st.recursive(
    VALUES,
    lambda inner: (
        st.lists(inner, max_size=6) | st.dictionaries(st.sampled_from(["a", "b", "x", "["]), inner, max_size=3)
    ),
    max_leaves=12,
)
ROWS = st.sampled_from([1, 2, 6]).flatmap(
    lambda wide: st.lists(st.lists(NUMBERS, min_size=wide, max_size=wide), min_size=1, max_size=4)
)
BODIES = st.one_of(
    st.builds(lambda rows: {"instances": rows}, ROWS | TREES),
    st.dictionaries(st.sampled_from(["instances", "parameters", "x"]), ROWS | TREES, max_size=2),
    TREES,
).map(lambda tree: json.dumps(tree).encode())


@settings(max_examples=400)
@given(BODIES, st.sampled_from([COIN, DOUBLER, TINY]))
@example(b'{"instances": [["[", 1]]}', COIN)
@example(b'{"instances": [{"[": 4}]}', DOUBLER)
@example(b'{"instances": [[1]], "instances": [[2]]}', DOUBLER)
@example(b'{"inst\\u0061nces": [[1]]}', DOUBLER)
@example(b'{"instances": [[1]]}{"instances": [[2]]}', DOUBLER)
@example(b'{"instances": [[0.1, 1e-400]]}', COIN)
def test_where_the_plain_reader_answers_the_full_reader_agrees(body: bytes, manifest: Manifest) -> None:
    """Whatever the body, the plain reader says None or the very array that the full reader gives."""
    inputs = parse_instances(body, manifest)
    if inputs is not None:
        fields = orjson.loads(body)
        assert list(fields) == ["instances"]
        other = read_instances(fields["instances"], manifest)
        assert (inputs.dtype, other.dtype, inputs.shape) == (np.dtype(np.float32), np.dtype(np.float32), other.shape)
        np.testing.assert_array_equal(inputs, other)


@given(st.lists(st.lists(st.floats(-3e38, 3e38), min_size=2, max_size=2), min_size=1, max_size=5))
def test_plain_reader_answers_plain_bodies(rows: list[list[float]]) -> None:
    """Rows of finite numbers are read by the plain reader, to the nearest float32."""
    inputs = parse_instances(json.dumps({"instances": rows}).encode(), COIN)
    assert inputs is not None
    np.testing.assert_array_equal(inputs, np.array(rows, np.float32))


MALFORMED: list[tuple[Any, Manifest, str]] = [
    (None, COIN, "instances is null, expected a list of instances"),
    (3, COIN, "instances is a number, expected a list of instances"),
    ("x", COIN, "instances is a string, expected a list of instances"),
    (True, COIN, "instances is a boolean, expected a list of instances"),
    ({"a": 1, "b": 2}, COIN, "instances is an object, expected a list of instances"),
    ([], COIN, "instances is empty; send at least one instance"),
    ([1, 2], COIN, "instances[0] is a number, expected a list of numbers or an object of a, b"),
    ([[1, 2], None], COIN, "instances[1] is null, expected a list of numbers or an object of a, b"),
    ([[1, 2], "ab"], COIN, "instances[1] is a string, expected a list of numbers or an object of a, b"),
    ([[]], COIN, "instances[0] has 0 values, expected 2"),
    ([[1]], COIN, "instances[0] has 1 values, expected 2"),
    ([[1, 2], [1, 2, 3]], COIN, "instances[1] has 3 values, expected 2"),
    ([[[1, 2]]], COIN, "instances[0] has 1 values, expected 2"),
    ([[[1], [2]]], COIN, "instances[0][0] is a list, expected a number"),
    ([[1, [2]]], COIN, "instances[0][1] is a list, expected a number"),
    ([[1, {"b": 2}]], COIN, "instances[0][1] is an object, expected a number"),
    ([[1, "2"]], COIN, "instances[0][1] is a string, expected a number"),
    ([[None, 2]], COIN, "instances[0][0] is null, expected a number"),
    ([[1, 2], [True, 2]], COIN, "instances[1][0] is a boolean, expected a number"),
    ([[1, 1e39]], COIN, "instances[0][1] is not a finite number that float32 can hold"),
    ([[-(10**30), 2], [10**39, 2]], COIN, "instances[1][0] is not a finite number that float32 can hold"),
    ([{}], COIN, "instances[0] lacks the feature 'a'; expected a, b"),
    ([{"a": 1}], COIN, "instances[0] lacks the feature 'b'; expected a, b"),
    ([{"a": 1, "b": 2, "c": 3}], COIN, "instances[0] has an unknown feature 'c'; expected a, b"),
    ([[1, 2], {"a": "1", "b": 2}], COIN, "instances[1].a is a string, expected a number"),
    ([{"a": 1, "b": None}], COIN, "instances[0].b is null, expected a number"),
    ([[0.5] * 783], CANVAS, "instances[0] has 783 values, expected 784"),
    ([[0.5] * 784] * 3 + [[0.5] * 785], CANVAS, "instances[3] has 785 values, expected 784"),
    ([{"a": 1}], CANVAS, "instances[0] is an object, expected 784 numbers, flat or as 28 rows of 28"),
    ([[[0.5] * 28] * 27], CANVAS, "instances[0] has 27 rows, expected 28"),
    ([[[0.5] * 28] * 27 + [[0.5] * 27]], CANVAS, "instances[0][27] has 27 values, expected 28"),
    ([[[0.5] * 28] * 27 + [3]], CANVAS, "instances[0][27] is a number, expected a list of 28"),
    ([[[0] * 27 + ["1"]] + [[0.5] * 28] * 27], CANVAS, "instances[0][0][27] is a string, expected a number"),
    ([[0.5] * 783 + [255]], CANVAS, "instances[0][783] is 255, outside [0, 1]"),
    ([[-0.1] + [0.5] * 783], CANVAS, "instances[0][0] is -0.1, outside [0, 1]"),
    ([[0.5] * 784, [2e39] + [0.5] * 783], CANVAS, "instances[1][0] is not a finite number"),
]


@pytest.mark.parametrize(("instances", "manifest", "message"), MALFORMED, ids=[case[2] for case in MALFORMED])
def test_malformed_instances_are_refused_by_both_readers(instances: Any, manifest: Manifest, message: str) -> None:
    """The plain reader says None, and the full reader says what is wrong and where."""
    assert parse_instances(json.dumps({"instances": instances}).encode(), manifest) is None
    with pytest.raises(InvalidRequestError) as caught:
        read_instances(instances, manifest)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"null", b'"x"', b"{}", b"\xff", b"[" * 10**6),
        *(b'{"instances": [[NaN]]}', b'{"instances": [[1e999]]}', b'{"instances": [[01]]}', b'{"instances": [[1]]'),
        b'{"instances": [[1]], "parameters": {}}',
    ],
)
def test_plain_reader_leaves_everything_else_alone(body: bytes) -> None:
    """Bodies that are not one plain object are for the other reader."""
    assert parse_instances(body, DOUBLER) is None


def test_objects_are_read_by_name_in_any_order() -> None:
    """Objects keyed by feature name give the columns of the manifest, and may stand beside lists."""
    inputs = read_instances([{"b": 2, "a": 1}, [3, 4]], COIN)
    assert inputs.tolist() == [[1, 2], [3, 4]]


def test_without_simdjson_every_body_takes_the_other_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where simdjson has no wheel, the plain reader declines."""
    monkeypatch.setattr(fast_json, "parse", None)
    assert parse_instances(b'{"instances": [[1]]}', DOUBLER) is None


def _picture(shape: tuple[int, ...], width: int, height: int, channels: int) -> Manifest:
    spec = ImageInput(
        kind="image",
        shape=shape,
        image=ImageSpec.model_validate({"width": width, "height": height, "channels": channels}),
    )
    return CANVAS.model_copy(update={"input": spec})


@pytest.mark.parametrize(
    ("shape", "channels", "nested"),
    [
        ((6,), 1, [(2, 3)]),
        ((2, 3), 1, [(2, 3)]),
        ((1, 2, 3), 1, [(2, 3), (1, 2, 3)]),
        ((2, 3, 1), 1, [(2, 3), (2, 3, 1)]),
        ((3, 2, 3), 3, [(3, 2, 3)]),
        ((2, 3, 3), 3, [(2, 3, 3)]),
        ((18,), 3, [(2, 3, 3)]),
    ],
)
def test_pictures_nest_as_rows_or_as_the_shape(
    shape: tuple[int, ...], channels: int, nested: list[tuple[int, ...]]
) -> None:
    """Flat, as rows of pixels, or as the input's shape: every way gives the same array, numbers in the same order."""
    manifest = _picture(shape, 3, 2, channels)
    assert isinstance(manifest.input, ImageInput)
    assert nested_shapes(manifest.input) == nested
    pixels = np.linspace(0, 1, 6 * channels, dtype=np.float32)
    for way in [(6 * channels,), *nested]:
        inputs = read_instances([pixels.reshape(way).tolist()], manifest)
        np.testing.assert_array_equal(inputs, pixels.reshape(1, *shape))


def test_manifest_of_the_tiny_picture_is_one() -> None:
    """The property test's picture has as many pixels as its shape."""
    assert replace(fakes.canvas(), name="tiny").manifest().input == CANVAS.input
    assert TINY.input.shape == (6,)
