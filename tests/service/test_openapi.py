"""Tests of service.api.openapi."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import validate

from service.api.limits import NO_LIMITS
from service.api.openapi import build_openapi, choose_titles
from service.api.schemas import build_example, instance_schema, response_schema
from service.api.v1.pictures import read_encoded
from service.api.v2.openapi import infer_body
from service.model.manifest import Manifest
from service.registry.registry import Registry
from service.settings import Settings
from tests import fakes

SIDES = {"width": 224, "height": 224}


@pytest.fixture(scope="module")
def document(models_dir: Path) -> dict[str, Any]:
    """The description of the good models."""
    registry = Registry(Settings(models_dir=models_dir, device="cpu"))
    registry.load()
    return build_openapi(registry)


def test_document_is_valid_openapi(document: dict[str, Any]) -> None:
    """The document validates against the OpenAPI 3.1 specification."""
    assert document["openapi"] == "3.1.0"
    validate(document)


def test_every_model_has_a_typed_operation(document: dict[str, Any]) -> None:
    """Each model has predict operations, for the newest and for a named version, with schemas of its own."""
    for name, title in choose_titles(["doubler", "coin", "switch", "compass", "canvas"]).items():
        for path in (f"/v1/models/{name}:predict", f"/v1/models/{name}/versions/{{version}}:predict"):
            content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
            assert content["schema"] == {"$ref": f"#/components/schemas/{title}Request"}


def test_features_are_named_with_unit_and_range(document: dict[str, Any]) -> None:
    """An instance's schema has the features by name; what they are and what training covered is in the description."""
    items = document["components"]["schemas"]["DoublerRequest"]["properties"]["instances"]["items"]
    text = str(items)
    assert "a length in m; the training data covered -10 to 10" in text
    assert "'x'" in text


def test_answers_are_typed_by_task(document: dict[str, Any]) -> None:
    """A class model's answer names its labels; a regression's has a number alone."""
    schemas = document["components"]["schemas"]
    prediction = schemas["CompassResponse"]["properties"]["predictions"]["items"]
    assert prediction["properties"]["label"]["enum"] == ["north", "east", "south", "west"]
    assert prediction["properties"]["probabilities"]["maxItems"] == 4
    number = schemas["DoublerResponse"]["properties"]["predictions"]["items"]
    assert list(number["properties"]) == ["prediction"]
    assert "threshold" in schemas["CoinRequest"]["properties"]["parameters"]["properties"]
    assert schemas["CompassRequest"]["properties"]["parameters"]["properties"]["top_k"]["maximum"] == 4
    assert "parameters" not in schemas["DoublerRequest"]["properties"]


def test_operation_ids_are_unique(document: dict[str, Any]) -> None:
    """No two operations share an id, or generated clients would lose one."""
    ids = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert len(ids) == len(set(ids))


def test_titles_are_type_names_and_never_collide() -> None:
    """Names that differ in punctuation alone keep schemas of their own."""
    assert choose_titles(["logistic-hours", "mnist"]) == {"logistic-hours": "LogisticHours", "mnist": "Mnist"}
    names = ["a-1", "a1", "a_1", "a--1"]
    assert len(set(choose_titles(names).values())) == len(names)


def test_example_is_a_golden_sample_or_the_middle_of_the_ranges() -> None:
    """The example uses what is known of the input, with feature names for tabular models."""
    assert build_example(fakes.doubler().manifest()) == {"instances": [{"x": 0.0}]}
    assert build_example(replace(fakes.doubler(), more={}).manifest()) == {"instances": [{"x": 0.0}]}
    assert build_example(fakes.coin().manifest()) == {"instances": [{"a": 0.5, "b": 0.5}]}
    assert list(build_example(fakes.canvas().manifest())["instances"][0]) == ["b64"]


def test_example_of_a_large_picture_is_small_and_can_be_read() -> None:
    """A sample of 150,000 numbers would make a document that no page opens; a small PNG is as good."""
    light = fakes.traffic_light()
    large = replace(light, input=light.input | {"shape": [3, 224, 224], "image": light.input["image"] | SIDES})
    manifest = large.manifest()
    example = build_example(manifest)
    inputs = read_encoded(example["instances"], manifest, NO_LIMITS)
    assert inputs.shape == (1, 3, 224, 224)
    assert len(str(example)) + len(str(infer_body(manifest))) < 20_000


def test_thousand_labels_are_not_listed_thrice() -> None:
    """A schema lists up to a hundred labels, and says how many there are beyond."""
    fake = fakes.compass()
    labels = [f"kind {index}" for index in range(1000)]
    manifest = fake.manifest().model_copy(
        update={"output": fake.manifest().output.model_copy(update={"labels": labels})}
    )
    assert len(str(response_schema(manifest))) < 3000
    assert "east" in str(response_schema(fake.manifest()))


@pytest.mark.parametrize(("shape", "ways"), [([784], 2), ([28, 28], 2), ([1, 28, 28], 3)])
def test_pictures_may_be_sent_as_the_reader_reads_them(shape: list[int], ways: int, models_dir: Path) -> None:
    """The schema offers flat numbers and each way of nesting that the reader takes."""
    del models_dir
    fields = fakes.canvas().fields()
    fields["input"]["shape"] = shape
    schema = instance_schema(Manifest.model_validate(fields))
    assert len(schema["anyOf"]) == ways
    assert schema["anyOf"][0]["maxItems"] == 784


@pytest.mark.parametrize(
    ("image", "meaning"),
    [
        ({"fitting": "mnist"}, "784 pixels in [0, 1]; 1 is ink, 0 is paper"),
        ({"polarity": "dark-on-light"}, "784 pixels in [0, 1]; 0 is ink, 1 is paper"),
        ({"polarity": "as-is"}, "784 pixels in [0, 1]; 0 is black"),
        ({"channels": 3}, "2352 pixels in [0, 1]; 0 is black"),
    ],
)
def test_pictures_without_ink_are_not_said_to_have_some(image: dict[str, Any], meaning: str) -> None:
    """Ink and paper are spoken of only where a picture is turned by them."""
    fields = fakes.canvas().fields()
    size = {"width": 28, "height": 28}
    fields["input"] |= {"shape": [784 * image.get("channels", 1)], "image": size | image}
    schema = instance_schema(Manifest.model_validate(fields))
    assert schema["anyOf"][0]["description"] == meaning


def test_model_that_does_not_serve_has_no_operation(empty_dir: Path) -> None:
    """A refused model is not described as callable."""
    fakes.write_version(empty_dir, fakes.liar())
    registry = Registry(Settings(models_dir=empty_dir, device="cpu"))
    registry.load()
    assert not [path for path in build_openapi(registry)["paths"] if "liar" in path]
