"""Typed columns in, and every further kind of output, over real HTTP: in the workers, and through an engine."""

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from tests import columns
from tests.fuzz.api import fuzz
from tests.servers import Server
from tests.wire import wait_until

HOME = {"age": 40, "rooms": 2, "garden": True, "city": "Oslo", "remark": "fine", "since": "1970-01-03T12:00:00Z"}
ANSWER = {"age": 40.0, "rooms": 2.0, "garden": 1.0, "city": 2.0, "remark": 1.0, "since": 2.5}


@pytest.fixture(scope="module", params=["inline", "engine"])
def homes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of one worker with every model of `tests.columns`, which run there, or in its engine."""
    root = tmp_path_factory.mktemp("columns")
    columns.write_all(root)
    with Server(root, "--workers", "1", "--placement", request.param) as server:
        assert server.get("/v1/models/house").json()["placement"] == request.param
        yield server


def ask(server: Server, model: str, instances: list[Any], **parameters: object) -> list[Any]:
    """Return the predictions for instances."""
    response = server.predict(model, instances, **parameters)
    assert response.status_code == 200, response.text
    predictions: list[Any] = response.json()["predictions"]
    return predictions


def refuse(server: Server, instances: list[Any]) -> str:
    """Return the sentence with which the house refuses instances."""
    response = server.predict("house", instances)
    assert response.status_code == 400
    sentence: str = response.json()["error"]
    return sentence


def test_objects_and_lists_give_the_same(homes: Server) -> None:
    """Each value comes to its own input of the graph, with its type; a default and null stand in for what is absent."""
    assert ask(homes, "house", [HOME, list(HOME.values())]) == [{"prediction": ANSWER}] * 2
    little = {"garden": False, "city": "Bonn", "since": "1970-01-01"}
    assert ask(homes, "house", [little, HOME | {"age": None, "remark": None}]) == [
        {"prediction": {"age": -1.0, "rooms": 3.0, "garden": 0.0, "city": 6.0, "remark": -1.0, "since": 0.0}},
        {"prediction": ANSWER | {"age": -1.0, "remark": -1.0}},
    ]


def test_requests_at_once_get_their_own_answers(homes: Server) -> None:
    """Requests with text of all lengths share batches, and each is answered for its own rows."""
    remarks = ["fine", None, "x" * 5000, "ünï", "\u0000", ""]

    def one(number: int) -> None:
        rows = [
            HOME | {"age": number, "city": columns.CITIES[(number + at) % 7], "remark": remarks[(number + at) % 6]}
            for at in range(number % 5 + 1)
        ]
        expected = [
            ANSWER
            | {
                "age": float(number),
                "city": float((number + at) % 7),
                "remark": {0: 1.0, 1: -1.0}.get((number + at) % 6, 0.0),
            }
            for at in range(len(rows))
        ]
        assert [each["prediction"] for each in ask(homes, "house", rows)] == expected

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(96)))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"city": "Pari"},
            'instances[1].city is "Pari", expected one of Paris, Rome, Oslo, Bern, Wien, Riga, …; did you mean Paris?',
        ),
        ({"city": 3}, "instances[1].city is 3, expected one of Paris, Rome, Oslo, Bern, Wien, Riga, …"),
        ({"city": None}, "instances[1].city is null, expected one of Paris, Rome, Oslo, Bern, Wien, Riga, …"),
        ({"age": "x"}, "instances[1].age is a string, expected a number or null"),
        ({"age": True}, "instances[1].age is a boolean, expected a number or null"),
        ({"age": 1e300}, "instances[1].age is not a number that FP32 can hold"),
        ({"rooms": 2.5}, "instances[1].rooms is 2.5, expected a whole number"),
        ({"rooms": None}, "instances[1].rooms is null, expected a whole number"),
        ({"rooms": 2**63}, "instances[1].rooms is not a number that INT64 can hold"),
        ({"garden": 1}, "instances[1].garden is a number, expected true or false"),
        ({"remark": 5}, "instances[1].remark is a number, expected a string or null"),
        (
            {"since": "soon"},
            'instances[1].since is "soon", expected a date and time in ISO 8601, such as 2024-01-31T12:00:00Z',
        ),
        ({"agee": 1}, "instances[1] has an unknown column 'agee'; did you mean 'age'?"),
        ({"zzz": 1}, "instances[1] has an unknown column 'zzz'; expected age, rooms, garden, city, remark, since"),
    ],
)
def test_refusal_names_the_value_and_what_is_allowed(homes: Server, change: dict[str, Any], sentence: str) -> None:
    """A wrong value is a 400 that says where it is, what it is, and what is expected."""
    assert refuse(homes, [HOME, HOME | change]) == sentence


def test_missing_column_is_named(homes: Server) -> None:
    """A column without a default must be there; a list must have a value for each."""
    without = {name: value for name, value in HOME.items() if name != "garden"}
    assert refuse(homes, [HOME, without]) == "instances[1] lacks the column 'garden', which has no default"
    short = "instances[1] has 2 values, expected 6: age, rooms, garden, city, remark, since"
    assert refuse(homes, [HOME, [1, 2]]) == short
    expected = "expected an object of age, rooms, garden, city, remark, since, or a list of their values"
    assert refuse(homes, [HOME, 7]) == f"instances[1] is a number, {expected}"


def test_numbers_out_of_range_are_answered_and_counted(homes: Server) -> None:
    """A range is what the training data covered: beyond it there is an answer, and a figure for operators."""

    def read_counts() -> list[float]:
        lines = [
            line for line in homes.get("/metrics").text.splitlines() if line.startswith("service_out_of_range_total")
        ]
        counts = {line.split('"')[1]: float(line.rpartition(" ")[2]) for line in lines if 'model="house"' in line}
        return [counts.get(name, 0) for name in ("age", "rooms")]

    before = read_counts()
    assert ask(homes, "house", [HOME | {"age": 150, "rooms": 0}])[0]["prediction"]["age"] == 150.0
    wait_until(lambda: all(now > then for now, then in zip(read_counts(), before, strict=True)))


def test_same_model_by_its_tensors(homes: Server) -> None:
    """/v2 has one input for each column, with its datatype, and the same answer; NaN is null in binary data."""
    described = homes.get("/v2/models/house").json()
    assert [(each["name"], each["datatype"], each["shape"]) for each in described["inputs"]] == [
        ("age", "FP32", [-1, 1]),
        ("rooms", "INT64", [-1, 1]),
        ("garden", "BOOL", [-1, 1]),
        ("city", "BYTES", [-1, 1]),
        ("remark", "BYTES", [-1, 1]),
        ("since", "FP64", [-1, 1]),
    ]
    config = homes.get("/v2/models/house/config").json()
    assert [each["data_type"] for each in config["input"]][2:4] == ["TYPE_BOOL", "TYPE_STRING"]
    data = {"age": [40.0], "rooms": [2], "garden": [True], "city": ["Oslo"], "remark": ["fine"], "since": [2.5]}
    inputs = [each | {"shape": [1, 1], "data": data[each["name"]]} for each in described["inputs"]]
    answer = homes.post("/v2/models/house/infer", json={"inputs": inputs}).json()
    assert answer["outputs"][0]["data"] == list(ANSWER.values())
    short = [inputs[0] | {"shape": [2, 1], "data": [1.0, 2.0]}, *inputs[1:]]
    refused = homes.post("/v2/models/house/infer", json={"inputs": short})
    assert (refused.status_code, "not equally many rows" in refused.json()["error"]) == (400, True)


TABLE: dict[str, tuple[str, list[Any]]] = {
    "age": ("FP64", [40.0, None]),
    "garden": ("BOOL", [True, False]),
    "city": ("BYTES", ["Oslo", "Bonn"]),
    "remark": ("BYTES", ["fine", None]),
    "since": ("BYTES", ["1970-01-03T12:00:00Z", "1970-01-01"]),
}


def tabulate(changes: dict[str, tuple[str, list[Any]]], *shape: int) -> dict[str, Any]:
    """Return an infer request with an input for each column of `TABLE`."""
    table = (TABLE | changes).items()
    return {
        "inputs": [
            {"name": name, "datatype": datatype, "shape": [len(data), *shape], "data": data}
            for name, (datatype, data) in table
        ]
    }


@pytest.mark.parametrize("shape", [(), (1,)])
def test_same_model_by_its_columns(homes: Server, shape: tuple[int, ...]) -> None:
    """/v2 also takes a table: an input for each column, its values those of /v1, with nulls and defaults."""
    answer = homes.post("/v2/models/house/infer", json=tabulate({}, *shape)).json()
    first = list((ANSWER | {"rooms": 3.0}).values())
    assert answer["outputs"][0]["data"] == [*first, -1.0, 3.0, 0.0, 6.0, -1.0, 0.0], answer
    short = homes.post("/v2/models/house/infer", json=tabulate({"rooms": ("INT32", [2, 4])}, *shape)).json()
    assert short["outputs"][0]["data"][1::6] == [2.0, 4.0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"city": ("BYTES", ["Oslo", "Bon"])}, 'instances[1].city is "Bon"'),
        ({"city": ("INT64", [2, 6])}, "instances[0].city is 2"),
        ({"garden": ("BOOL", [True, None])}, "instances[1].garden is null"),
        ({"rooms": ("FP32", [1.0, 2.5])}, "instances[1].rooms is 2.5"),
        ({"age": ("FP64", [40.0])}, "the columns have 1, 2 rows"),
        ({"town": ("BYTES", ["Oslo", "Bonn"])}, "the model has no input 'town'"),
    ],
)
def test_refusal_names_the_value_of_a_table(homes: Server, changes: dict[str, Any], sentence: str) -> None:
    """A table is refused as instances are."""
    answer = homes.post("/v2/models/house/infer", json=tabulate(changes))
    assert (answer.status_code, sentence in answer.json()["error"]) == (400, True), answer.text


@pytest.mark.parametrize("datatype", ["FP32", "FP64", "INT64"])
def test_features_as_inputs_of_their_own(homes: Server, datatype: str) -> None:
    """A model of plain features takes a table, too."""
    tensors = [
        {"name": name, "datatype": datatype, "shape": [2], "data": data}
        for name, data in (("b", [3, 4]), ("a", [1, 2]))
    ]
    answer = homes.post("/v2/models/box/infer", json={"inputs": tensors}).json()
    assert answer["outputs"][0]["data"] == [1.0, 3.0, 2.0, 4.0], answer
    for changed, sentence in (
        ({"data": [1, None]}, "instances[1].a is null"),
        ({"data": [1], "shape": [1]}, "the columns have 1, 2 rows"),
        ({"name": "c"}, "the model has no input 'b'; it takes 'inputs'"),
    ):
        refused = homes.post("/v2/models/box/infer", json={"inputs": [tensors[0], tensors[1] | changed]})
        assert (refused.status_code, sentence in refused.json()["error"]) == (400, True), refused.text


def test_columns_as_binary_data(homes: Server) -> None:
    """NaN is null there, and an infinity is refused."""
    inputs, data = [], b""
    values = {"age": np.array([40, np.nan]), "garden": np.array([True, False])}
    for name, (datatype, column) in TABLE.items():
        if datatype == "BYTES":
            texts = ["none" if each is None else each for each in column]
            binary = b"".join(len(text).to_bytes(4, "little") + text.encode() for text in texts)
        else:
            binary = values[name].tobytes()
        size = {"binary_data_size": len(binary)}
        inputs.append({"name": name, "datatype": datatype, "shape": [2, 1], "parameters": size})
        data += binary
    header = orjson.dumps({"inputs": inputs})
    fields = {"Inference-Header-Content-Length": str(len(header)), "Content-Type": "application/octet-stream"}
    answer = homes.post("/v2/models/house/infer", data=header + data, headers=fields).json()
    assert answer["outputs"][0]["data"][::6] == [40.0, -1.0], answer
    infinite = data.replace(np.array([np.nan]).tobytes(), np.array([np.inf]).tobytes())
    refused = homes.post("/v2/models/house/infer", data=header + infinite, headers=fields)
    assert (refused.status_code, "column 'age' has a number that is not finite" in refused.text) == (400, True)


def test_example_of_the_document_works(homes: Server) -> None:
    """Each model's own request schema says its types, and the example can be sent as it is."""
    document = homes.get("/openapi.json").json()
    item = document["components"]["schemas"]["HouseRequest"]["properties"]["instances"]["items"]["anyOf"][0]
    properties = {name: {key: each.get(key) for key in ("type", "enum")} for name, each in item["properties"].items()}
    assert properties["age"]["type"] == ["number", "null"]
    assert properties["rooms"]["type"] == "integer"
    assert properties["garden"]["type"] == "boolean"
    assert properties["city"] == {"type": "string", "enum": columns.CITIES}
    assert item["properties"]["rooms"]["default"] == 3
    assert item["required"] == ["garden", "city", "since"]
    for name in ("house", *(build().name for build in columns.OTHERS)):
        path = document["paths"][f"/v1/models/{name}:predict"]["post"]
        example = path["requestBody"]["content"]["application/json"]["example"]
        answer = homes.post(f"/v1/models/{name}:predict", json=example)
        assert answer.status_code == 200, answer.text
        shown = path["responses"]["200"]["content"]["application/json"].get("example", answer.json())
        assert answer.json() == shown
        infer = document["paths"][f"/v2/models/{name}/infer"]["post"]["requestBody"]["content"]["application/json"]
        assert homes.post(f"/v2/models/{name}/infer", json=infer["example"]).status_code == 200


def test_text_in_class_out(homes: Server) -> None:
    """A text column, and a label with its probabilities."""
    found = ask(homes, "spam", [{"text": "win"}, ["hello"]])
    assert [(each["label"], each["prediction"]) for each in found] == [("spam", 1), ("ham", 0)]
    assert found[0]["probability"] == 0.9


def test_several_values_have_names(homes: Server) -> None:
    """A regression with several targets answers each by its name."""
    assert ask(homes, "box", [[1, 2]]) == [{"prediction": {"width": 1.0, "height": 2.0}}]


def test_each_label_has_its_threshold(homes: Server) -> None:
    """A multilabel model says which labels apply, by their own thresholds or the request's."""
    rows = [[3, -3, 2]]
    (own,), (low,) = ask(homes, "tags", rows), ask(homes, "tags", rows, threshold=0.01)
    assert (own["prediction"], own["labels"]) == ([1, 0, 0], ["a"])
    assert (low["prediction"], low["labels"]) == ([1, 1, 1], ["a", "b", "c"])
    assert own["probabilities"] == pytest.approx([0.9526, 0.0474, 0.8808], abs=1e-4)


def test_interval_stands_beside_its_value(homes: Server) -> None:
    """Three outputs of the graph are a value and an interval around it."""
    assert ask(homes, "forecast", [[20]]) == [{"prediction": 20.0, "interval": [19.0, 21.0]}]


def test_embedding_is_a_list_or_base64(homes: Server) -> None:
    """A vector comes as numbers, or as the bytes of its float32."""
    assert ask(homes, "embedder", [[1, 2, 3, 4]]) == [{"embedding": [1.0, 2.0, 3.0, 4.0]}]
    (found,) = ask(homes, "embedder", [[1, 2, 3, 4]], encoding="base64")
    assert np.frombuffer(base64.b64decode(found["embedding"]), "<f4").tolist() == [1, 2, 3, 4]
    refused = homes.predict("embedder", [[1, 2, 3, 4]], encoding="hex")
    assert (refused.status_code, refused.json()["error"]) == (400, "parameters.encoding is neither list nor base64")


def test_named_outputs_keep_type_and_shape(homes: Server) -> None:
    """Each output comes by its name, whatever its datatype; /v2 has them as tensors."""
    first = {"corners": [[1.0, 2.0], [3.0, 4.0]], "total": 10, "positive": True, "text": "10"}
    second = {"corners": [[0.0, 0.0], [0.0, -1.0]], "total": -1, "positive": False, "text": "-1"}
    assert ask(homes, "detector", [[1, 2, 3, 4], [0, 0, 0, -1]]) == [{"outputs": first}, {"outputs": second}]
    outputs = homes.get("/v2/models/detector").json()["outputs"]
    assert [(each["name"], each["datatype"], each["shape"]) for each in outputs] == [
        ("corners", "FP32", [-1, 2, 2]),
        ("total", "INT64", [-1]),
        ("positive", "BOOL", [-1]),
        ("text", "BYTES", [-1]),
    ]


def test_card_has_golden_samples_by_column(homes: Server) -> None:
    """The page is given the values that a golden sample was made of, null included."""
    card = homes.get("/v1/models/house/card").json()
    assert card["golden"]["inputs"][1] == {
        "age": None, "rooms": 4, "garden": False, "city": "Bonn", "remark": None, "since": "2024-10-04T12:00:00+00:00",
    }  # fmt: skip


def test_damaged_golden_file_is_refused(tmp_path: Path) -> None:
    """The file of golden samples is verified by its digest, and what it expects is what the graph must give."""
    folder = columns.write_house(tmp_path)
    content = bytearray((folder / "golden.npz").read_bytes())
    content[100] ^= 1
    (folder / "golden.npz").write_bytes(content)
    with Server(tmp_path, "--workers", "1") as server:
        assert "golden.npz has sha256" in server.get("/health/ready").json()["error"]


def test_every_answer_is_as_documented(homes: Server) -> None:
    """Requests drawn from the OpenAPI document are answered as it says, good ones and bad ones."""
    if homes.get("/v1/models/house").json()["placement"] == "engine":
        pytest.skip("the document and the checks are the same, and once is slow enough")
    answered = fuzz(homes.url, examples=2, seed=3)
    assert answered[200] > 20
    assert answered[400] > 10
