"""Pictures over real HTTP: bytes, forms and base64, for models that take pictures and for those that do not."""

import base64
import io
import math
import select
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from benchmarks.strokes import draw_all
from tests import fakes
from tests.servers import Server
from tests.wire import build_request, open_wires

PATH = "/v1/models/canvas:predict"


def encode(picture: Image.Image, kind: str = "PNG") -> bytes:
    """Return a picture's file."""
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def digits() -> list[bytes]:
    """One drawing of each digit, as PNG."""
    return [encode(drawing) for _, drawing in draw_all(seed=3, each=1)]


def pack(content: bytes) -> dict[str, str]:
    """Return an instance with a picture in it."""
    return {"b64": base64.b64encode(content).decode()}


def see(server: Server, content: bytes) -> Any:
    """Return the numbers that a model is given for a picture."""
    answer = server.post("/v1/models/canvas:preview", data=content, headers={"Content-Type": "image/png"})
    assert answer.status_code == 200, answer.text
    return answer.json()["instances"][0]


def test_bytes_form_and_base64_are_one_picture(server: Server, digits: list[bytes]) -> None:
    """The same file sent in each of the ways, or as the numbers it becomes, gets the same predictions."""
    answers = [
        server.post(PATH, data=digits[7], headers={"Content-Type": "image/png"}),
        server.post(PATH, data=digits[7], headers={"Content-Type": "IMAGE/png; q=1"}),
        server.post(PATH, files={"picture": ("7.png", digits[7], "image/png")}),
        server.predict("canvas", [pack(digits[7])]),
        server.predict("canvas", [see(server, digits[7])]),
        server.post(
            PATH, data=f'{{"instances": [{{"\\u0062\\u00364": "{pack(digits[7])["b64"]}"}}]}}'.encode(),
            headers={"Content-Type": "application/json"},
        ),
    ]  # fmt: skip
    assert [answer.status_code for answer in answers] == [200] * 6, [answer.text for answer in answers]
    wanted = answers[0].json()["predictions"][0]["probabilities"]
    for answer in answers:
        assert np.allclose(answer.json()["predictions"][0]["probabilities"], wanted, atol=1e-5)


def test_several_at_once_keep_their_order(server: Server, digits: list[bytes]) -> None:
    """A form of ten files, and a list that mixes pictures with numbers, are answered in order."""
    alone = [server.predict("canvas", [pack(file)]).json()["predictions"][0]["label"] for file in digits]
    files = [("files", (f"{index}.png", file, "image/png")) for index, file in enumerate(digits)]
    form = server.post(PATH, files=files)
    assert [each["label"] for each in form.json()["predictions"]] == alone
    mixed = server.predict("canvas", [pack(digits[1]), see(server, digits[2]), pack(digits[3])])
    assert [each["label"] for each in mixed.json()["predictions"]] == alone[1:4]


def test_a_form_may_carry_parameters(server: Server, digits: list[bytes]) -> None:
    """A part named parameters is read as in JSON, and refused as there."""
    form = {"picture": ("7.png", digits[7], "image/png")}
    best = server.post(PATH, files=form, data={"parameters": '{"top_k": 3}'}).json()["predictions"][0]["top_k"]
    assert len(best) == 3
    refused = server.post(PATH, files=form, data={"parameters": '{"threshold": 0.5}'})
    assert (refused.status_code, "threshold" in refused.json()["error"]) == (400, True)


def test_form_that_is_described_works_as_offered(server: Server, digits: list[bytes]) -> None:
    """The parameters that the document offers are taken, an empty field is none, and a refusal names the field."""
    post = server.get("/openapi.json").json()["paths"][PATH]["post"]
    offered = post["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]["parameters"]["example"]
    form = {"files": ("7.png", digits[7], "image/png")}
    for text, best in ((offered, 2), ("", 0), (" ", 0)):
        answer = server.post(PATH, files=form, data={"parameters": text})
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["predictions"][0].get("top_k", [])) == best
    for text, words in (("string", "the form's field parameters is not JSON"), ("[]", "parameters is a list")):
        refused = server.post(PATH, files=form, data={"parameters": text})
        assert (refused.status_code, words in refused.json()["error"]) == (400, True), refused.text


def test_preview_is_what_the_model_is_given(server: Server) -> None:
    """Pictures come back as numbers of the input's shape, numbers as they are; errors are those of predict."""
    blank = encode(Image.new("RGB", (40, 50), (255, 255, 255)))
    assert see(server, blank) == [0] * 784
    rows = server.post("/v1/models/coin/versions/1:preview", json={"instances": [{"b": 2, "a": 1}]})
    assert rows.json() == {"model": "coin", "version": 1, "instances": [[1, 2]]}
    for path, status in (("/v1/models/nosuch:preview", 404), ("/v1/models/coin:preview", 400)):
        answer = server.post(path, json={"instances": []})
        assert (answer.status_code, list(answer.json())) == (status, ["error"])
    answer = server.get("/v1/models/coin:preview")
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")


def test_colour_pictures_are_previewed_as_they_are_predicted(empty_dir: Path) -> None:
    """A model with channels first is given the red plane, then the green, then the blue, and `:preview` shows it."""
    fakes.write_version(empty_dir, fakes.traffic_light())
    picture = Image.new("RGB", (8, 6), (0, 255, 51))
    picture.putpixel((3, 1), (255, 0, 0))
    headers = {"Content-Type": "image/png"}
    with Server(empty_dir, "--workers", "1", "--device", "cpu") as server:
        predicted = server.post("/v1/models/traffic-light:predict", data=encode(picture), headers=headers)
        assert predicted.json()["predictions"][0]["label"] == "green"
        seen = server.post("/v1/models/traffic-light:preview", data=encode(picture), headers=headers)
        assert seen.status_code == 200, seen.text
        planes = np.moveaxis(np.asarray(picture), 2, 0) / 255
        assert np.allclose(seen.json()["instances"][0], planes)
        again = server.predict("traffic-light", seen.json()["instances"])
    assert again.json()["predictions"] == predicted.json()["predictions"]


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_unreadable_pictures_are_400(content: bytes, server: Server) -> None:
    """Whatever is wrong with a picture, its sender gets one sentence, in every way of sending."""
    for answer in (
        server.post(PATH, data=content, headers={"Content-Type": "image/png"}),
        server.post(PATH, files={"picture": ("x.png", content or b" ", "image/png")}),
        server.predict("canvas", [pack(content)]),
    ):
        assert answer.status_code == 400, answer.text
        assert list(answer.json()) == ["error"]


def test_bombs_and_cut_files_are_400(server: Server, digits: list[bytes]) -> None:
    """A picture of 400 million pixels in a small file, or half a file, is refused, and the next one is answered."""
    for hostile in (encode(Image.new("1", (20_000, 20_000))), digits[0][: len(digits[0]) // 2]):
        answer = server.post(PATH, data=hostile, headers={"Content-Type": "image/png"})
        assert answer.status_code == 400
        assert server.predict("canvas", [pack(digits[0])]).status_code == 200


@pytest.mark.parametrize(
    ("instance", "words"),
    [
        ({"b64": 5}, "instances[0].b64 is a number"),
        ({"b64": "@@@@"}, "not base64"),
        ({"b64": "data:image/png;base64,AAAA"}, "not base64"),
        ({"b64": "AAAA", "kind": "png"}, "unknown field 'kind'"),
        ({}, "instances[0].b64 is not there"),
    ],
)
def test_malformed_base64_instances_are_400(instance: dict[str, Any], words: str, server: Server) -> None:
    """The sentence says which instance and what is wrong."""
    answer = server.predict("canvas", [instance])
    assert (answer.status_code, words in answer.json()["error"]) == (400, True), answer.text


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "multipart/form-data; boundary=b"),
        (b"--b\r\n", "multipart/form-data; boundary=b"),
        (b"--b\r\nno blank line\r\n--b--\r\n", "multipart/form-data; boundary=b"),
        (b"--b\r\n" + b"a: b\r\n" * 10**6 + b"\r\n1\r\n--b--\r\n", "multipart/form-data; boundary=b"),
        (b"--b--\r\n", "multipart/form-data" + ";" * 10**4 + " boundary=b"),
        (b"--b--\r\n", "multipart/form-data; boundary=b"),
        (b"--b--\r\n", "multipart/form-data"),
        (b"--b\r\n\r\n" * 2000 + b"--b--", "multipart/form-data; boundary=b"),
        (b"--b--\r\n", "multipart/form-data; boundary*=utf-8''%E2%82%AC"),
    ],
)
def test_malformed_forms_are_400(body: bytes, kind: str, server: Server) -> None:
    """A form without boundary, end, files or sense is refused with a sentence."""
    answer = server.post(PATH, data=body, headers={"Content-Type": kind})
    assert (answer.status_code, list(answer.json())) == (400, ["error"]), answer.text


@pytest.mark.parametrize("kind", ["image/png", "multipart/form-data; boundary=b"])
def test_other_models_take_no_pictures(kind: str, server: Server, digits: list[bytes]) -> None:
    """A tabular model refuses pictures with 415, and a picture among its instances with 400."""
    answer = server.post("/v1/models/coin:predict", data=digits[0], headers={"Content-Type": kind})
    assert (answer.status_code, "application/json" in answer.json()["error"]) == (415, True)
    assert server.predict("coin", [pack(digits[0])]).status_code == 400


def test_unknown_field_of_a_form_is_named(server: Server, digits: list[bytes]) -> None:
    """A field that is neither a file nor known is 400 and not a picture; `files` may come without a file's name."""
    picture = {"picture": ("7.png", digits[7], "image/png")}
    answer = server.post(PATH, files=picture, data={"parameter": '{"top_k": 3}'})
    words = "the form has an unknown field 'parameter'; send files, and parameters as JSON"
    assert (answer.status_code, answer.json()["error"]) == (400, words)
    bare = b'--b\r\nContent-Disposition: form-data; name="files"\r\n\r\n%b\r\n--b--\r\n' % digits[7]
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    assert server.post(PATH, data=bare, headers=kind).json() == server.post(PATH, files=picture).json()


def test_pictures_as_base64_in_tensors(server: Server, digits: list[bytes]) -> None:
    """The tensor API takes pictures as BYTES: base64 in JSON, files or base64 as binary data, in [N] or [N, 1]."""
    wanted = server.predict("canvas", [pack(file) for file in digits[:2]]).json()["predictions"]
    encoded = [pack(file)["b64"] for file in digits[:2]]
    for shape, name in (([2], "inputs"), ([2, 1], "picture")):
        tensor = {"name": name, "shape": shape, "datatype": "BYTES", "data": encoded}
        asked = {"inputs": [tensor], "outputs": [{"name": "label"}]}
        answer = server.post("/v2/models/canvas/infer", json=asked)
        assert answer.json()["outputs"][0]["data"] == [each["label"] for each in wanted], answer.text
    for shape, sentence in (([2, 2], "have shape [N]"), ([1], "picture 0 is not a PNG")):
        tensor = {"name": "inputs", "shape": shape, "datatype": "BYTES", "data": ["AAAA"] * math.prod(shape)}
        refused = server.post("/v2/models/canvas/infer", json={"inputs": [tensor]})
        assert (refused.status_code, sentence in refused.json()["error"]) == (400, True), refused.text


def test_openapi_describes_every_way(server: Server) -> None:
    """An image model's operation has JSON, pictures and forms; a tabular model's has JSON alone."""
    paths = server.get("/openapi.json").json()["paths"]
    content = paths[PATH]["post"]["requestBody"]["content"]
    wanted = ["application/json", "image/png", "image/jpeg", "image/webp", "image/bmp", "multipart/form-data"]
    assert list(content) == wanted
    assert list(paths["/v1/models/coin:predict"]["post"]["requestBody"]["content"]) == wanted[:1]
    assert "/v1/models/canvas:preview" in paths


def test_hairline_is_a_digit(published: Path) -> None:
    """A 7 of one pixel's width on a large sheet is answered, and is read."""
    sheet = Image.new("L", (1000, 1000), 255)
    ImageDraw.Draw(sheet).line([(250, 200), (750, 200), (450, 850)], fill=0)
    with Server(published, "--workers", "1", "--device", "cpu") as server:
        answer = server.predict("mnist", [pack(encode(sheet))])
    assert (answer.status_code, answer.json()["predictions"][0]["label"]) == (200, "7")


def test_many_large_pictures_are_read_in_turn_and_in_time(models_dir: Path) -> None:
    """Twelve small files of 31 million pixels each take a worker little memory; who waits ends by the deadline."""
    bomb = encode(Image.fromarray(np.zeros((5600, 5600), np.uint16)))
    assert len(bomb) < 10**5
    fields = ("Content-Type: image/png", "X-Request-Timeout: 2")
    asked = [build_request(PATH, bomb, *fields), build_request(f"{PATH[:-8]}:preview", bomb, *fields)] * 6
    with Server(models_dir, "--workers", "1") as server, open_wires(server.url, len(asked)) as wires:
        (worker,) = server.workers()
        server.predict("canvas", [pack(encode(Image.new("L", (9, 9))))])  # Pillow is imported
        before, most, began = worker.memory_info().rss, 0, time.monotonic()
        for wire, request in zip(wires, asked, strict=True):
            wire.send(request)
        waiting = {wire.socket: wire for wire in wires}
        while waiting:
            for each in select.select(list(waiting), [], [], 0.01)[0]:
                assert waiting.pop(each).read().status in (200, 504)
            most = max(most, worker.memory_info().rss)
        assert time.monotonic() - began < 6
        assert most - before < 250 * 2**20
        assert server.predict("canvas", [[0] * 784]).status_code == 200


def test_digits_that_a_person_draws_are_read(published: Path) -> None:
    """Of 50 drawings, the published digit model reads at least 47 right, over HTTP."""
    drawings = draw_all(seed=5, each=5)
    with Server(published, "--workers", "1", "--device", "cpu") as server:
        answer = server.predict("mnist", [pack(encode(drawing)) for _, drawing in drawings])
    labels = [each["label"] for each in answer.json()["predictions"]]
    assert sum(label == str(digit) for label, (digit, _) in zip(labels, drawings, strict=True)) >= 47
