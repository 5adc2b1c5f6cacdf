"""Tests of service.api.v2.operations, on the application without a server."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from starlette.types import Receive, Scope, Send

from service.api.v2.operations import EXTENSIONS
from service.app import create_app
from service.settings import Settings
from tests import fakes
from tests.asgi import Client

TOKEN = "the-token-of-the-command-line"
OURS = [("X-API-Key", TOKEN)]


@pytest.fixture
def client(empty_dir: Path) -> Iterator[Client]:
    """An application on one good model with two versions, one of them broken, and one broken model."""
    fakes.write_version(empty_dir, fakes.doubler())
    (fakes.write_version(empty_dir, fakes.doubler(version=2)) / "model.pt").unlink()
    fakes.write_version(empty_dir, fakes.liar())
    client = Client(create_app(Settings(models_dir=empty_dir, device="cpu", backend="onnx"), token=TOKEN))
    yield client
    client.close()


def get(client: Client, path: str) -> Any:
    """Return the body of a GET that is answered 200."""
    answer = client.request("GET", path)
    assert answer.status == 200, answer.body
    return answer.json()


def test_server_says_what_it_can(client: Client) -> None:
    """Name, version and extensions, with and without the slash; what is not there is not advertised."""
    assert get(client, "/v2") == get(client, "/v2/")
    server = get(client, "/v2")
    assert sorted(server) == ["extensions", "name", "version"]
    assert server["extensions"] == list(EXTENSIONS)
    assert not any("shared_memory" in name or "sequence" in name or "trace" in name for name in EXTENSIONS)


def test_index_has_every_version_and_why_not(client: Client) -> None:
    """The index lists what serves and what does not with the reason; `ready` leaves the latter out."""
    answer = client.request("POST", "/v2/repository/index")
    rows = {(row["name"], row["version"]): row for row in answer.json()}
    assert {key: row["state"] for key, row in rows.items()} == {
        ("doubler", "1"): "READY",
        ("doubler", "2"): "UNAVAILABLE",
        ("liar", "1"): "UNAVAILABLE",
    }
    assert rows["doubler", "1"] == {
        "name": "doubler", "version": "1", "state": "READY", "reason": "", "latest": True,
    }  # fmt: skip
    assert not rows["doubler", "2"].keys() & {"latest", "labels"}
    assert rows["doubler", "2"]["reason"].startswith("model.pt cannot be read")
    only = client.request("POST", "/v2/repository/index", b'{"ready": true}').json()
    assert [(row["name"], row["version"]) for row in only] == [("doubler", "1")]
    assert client.request("POST", "/v2/repository/index", b' {"ready": false} ').json() == answer.json()


@pytest.mark.parametrize("body", [b"[]", b"{", b'{"ready": 1}', b"[" * 60_000, b'{"a":' * 10_000, b"\xff", b"null"])
def test_malformed_index_is_refused(body: bytes, client: Client) -> None:
    """A body that is no object, or nested without end, is a 400 with one sentence."""
    answer = client.request("POST", "/v2/repository/index", body)
    assert (answer.status, list(answer.json())) == (400, ["error"])


def test_reason_is_in_the_metadata(client: Client) -> None:
    """A version that is not served has its reason in the metadata of the model too; all properties are strings."""
    properties = get(client, "/v2/models/doubler")["properties"]
    assert properties["refused_2"].startswith("model.pt cannot be read")
    assert all(isinstance(value, str) for value in properties.values())


def test_readiness_of_one_model(client: Client) -> None:
    """A model or version that serves is ready; one that is broken is 503, one that is not there 404."""
    assert get(client, "/v2/models/doubler/ready") == {"name": "doubler", "ready": True}
    assert get(client, "/v2/models/doubler/versions/1/ready")["ready"] is True
    for path, status in (("doubler/versions/2", 503), ("liar", 503), ("nosuch", 404), ("doubler/versions/3", 404)):
        answer = client.request("GET", f"/v2/models/{path}/ready")
        assert (answer.status, list(answer.json())) == (status, ["error"])


def test_statistics_and_configuration(client: Client) -> None:
    """The keys that load generators read are there, of one version, one model, or all."""
    config = get(client, "/v2/models/doubler/config")
    assert config["max_batch_size"] == 64
    assert config["input"] == [{"name": "inputs", "data_type": "TYPE_FP32", "dims": [1]}]
    scalar = {"name": "prediction", "data_type": "TYPE_FP32", "dims": [1], "reshape": {"shape": []}}
    assert config["output"] == [{"name": "outputs", "data_type": "TYPE_FP32", "dims": [1]}, scalar]
    for path in ("/v2/models/stats", "/v2/models/doubler/stats", "/v2/models/doubler/versions/1/stats"):
        (row,) = get(client, path)["model_stats"]
        assert (row["name"], row["version"]) == ("doubler", "1")
        for name in ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output"):
            assert set(row["inference_stats"][name]) == {"count", "ns"}


@pytest.mark.parametrize(
    "parameters",
    ['{"config": "{}"}', '{"file:1/model.onnx": "AAAA"}', '{"file:": 1, "x": 2}', "[]", "null", '"config"'],
)
@pytest.mark.parametrize("action", ["load", "unload", "rollback"])
def test_nothing_is_written_through_load(action: str, parameters: str, client: Client, empty_dir: Path) -> None:
    """Files and configuration are refused, whatever the call, and nothing in the folder changes."""
    before = sorted(empty_dir.rglob("*"))
    body = f'{{"parameters": {parameters}}}'.encode()
    answer = client.request("POST", f"/v2/repository/models/doubler/{action}", body, OURS)
    assert (answer.status, list(answer.json())) == (400, ["error"])
    assert sorted(empty_dir.rglob("*")) == before


@pytest.mark.parametrize("name", ["nosuch", "..", "%2e%2e", "...", ".hidden", "doubler%2F1", "README.md"])
@pytest.mark.parametrize("action", ["load", "unload", "rollback"])
def test_only_models_of_the_folder_can_be_changed(action: str, name: str, client: Client) -> None:
    """A name that is no model's leads nowhere."""
    assert client.request("POST", f"/v2/repository/models/{name}/{action}", headers=OURS).status == 404


@pytest.mark.parametrize("key", [None, "", "wrong", TOKEN[:-1]])
@pytest.mark.parametrize("more", [[], [("X-Forwarded-For", "127.0.0.1")], [("Via", "1.1 proxy")]])
def test_without_a_key_only_the_command_line_may_change(
    key: str | None, more: list[tuple[str, str]], client: Client
) -> None:
    """A loopback address proves nothing, as a proxy on the machine has it too; the command line's token does."""
    headers = [*([] if key is None else [("X-API-Key", key)]), *more]
    for action in ("load", "unload", "rollback"):
        answer = client.request("POST", f"/v2/repository/models/doubler/{action}", headers=headers)
        assert answer.status == 401
        assert answer.json()["error"].startswith("only the command line may change what is served")
    assert get(client, "/v2/models/doubler/ready")["ready"] is True
    assert client.request("POST", "/v2/repository/models/nosuch/load", headers=OURS).status == 404
    assert client.request("POST", "/v2/repository/models/doubler/nosuch", headers=headers).status == 404


def test_without_a_token_nothing_may_change(empty_dir: Path) -> None:
    """On a host that gives the application no token, as Ray Serve, an empty key is no key."""
    fakes.write_version(empty_dir, fakes.doubler())
    client = Client(create_app(Settings(models_dir=empty_dir, device="cpu", backend="onnx")))
    for headers in ([], [("X-API-Key", "")]):
        assert client.request("POST", "/v2/repository/models/doubler/unload", headers=headers).status == 401
    client.close()


def test_token_is_a_key_where_callers_need_one(empty_dir: Path) -> None:
    """The command line needs no other key; the token is none for predictions, and none where an admin key is set."""
    fakes.write_version(empty_dir, fakes.doubler())
    settings = Settings(models_dir=empty_dir, device="cpu", backend="onnx", api_key="caller")
    client = Client(create_app(settings, token=TOKEN))
    assert client.request("POST", "/v2/repository/index", headers=OURS).status == 200
    assert client.request("POST", "/v2/repository/models/nosuch/load", headers=OURS).status == 404
    assert client.request("POST", "/v1/models/doubler:predict", b"{}", OURS).status == 401
    assert client.request("POST", "/v2/repository/models/doubler/load", headers=[("X-API-Key", "caller")]).status == 401
    client.close()
    client = Client(create_app(settings.model_copy(update={"admin_key": "admin"}), token=TOKEN))
    assert client.request("POST", "/v2/repository/models/doubler/load", headers=OURS).status == 401
    client.close()


@pytest.mark.parametrize(
    "path",
    [
        "/v2/repositor%79/models/nosuch/unload",
        "/v2/repositor%79/index",
        "/v2%2Frepository/models/nosuch/unload",
        "/v2%2frepository%2findex",
        "/%6Detrics",
        "/v1/model%73",
        "/v2/models/doubler%2Fready",
        "/v2/repository/models/nosuch/unl%6fad",
    ],
)
def test_encoded_path_is_not_another(path: str, client: Client) -> None:
    """A path that a proxy's rule takes for another, as it does not decode it, is a 404 also for the command line."""
    method = "POST" if "repository" in unquote(path) else "GET"

    async def encoded(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "path": unquote(path)}, receive, send)

    assert client.request(method, unquote(path), headers=OURS).status in (200, 404)
    app, client.app = client.app, encoded
    answer = client.request(method, path, headers=OURS)
    assert answer.status == 404
    assert "percent-encoded" in answer.json()["error"]


@pytest.mark.parametrize(("key", "status"), [(None, 401), ("caller", 401), ("wrong", 401), ("", 401), ("admin", 404)])
def test_admin_key_is_another(key: str | None, status: int, empty_dir: Path) -> None:
    """With an admin key set, a caller's key does not change what is served; the admin key does all."""
    fakes.write_version(empty_dir, fakes.doubler())
    settings = Settings(models_dir=empty_dir, device="cpu", backend="onnx", api_key="caller, other", admin_key="admin")
    client = Client(create_app(settings))
    headers = [] if key is None else [("X-API-Key", key)]
    assert client.request("POST", "/v2/repository/models/nosuch/load", headers=headers).status == status
    answer = client.request("POST", "/v2/repository/index", headers=headers)
    assert answer.status == (200 if key in ("caller", "admin") else 401)
    client.close()


def test_labels_name_versions(empty_dir: Path) -> None:
    """A label is a version's other name; one whose version does not serve says so."""
    for version in (1, 2):
        fakes.write_version(empty_dir, fakes.doubler(version=version))
    shutil.rmtree(empty_dir / "doubler" / "2")
    (fakes.write_version(empty_dir, fakes.doubler(version=2)) / "model.onnx").write_bytes(b"")
    labels = '{"labels": {"stable": 1, "canary": 2, "next": 3}}'
    (empty_dir / "doubler" / "settings.json").write_text(labels)
    client = Client(create_app(Settings(models_dir=empty_dir, device="cpu")))
    assert get(client, "/v2/models/doubler/versions/stable/ready")["ready"] is True
    body = b'{"instances": [[2]]}'
    assert client.request("POST", "/v1/models/doubler/labels/stable:predict", body).json()["version"] == 1
    for label, status in (("canary", 503), ("next", 404), ("other", 404)):
        answer = client.request("POST", f"/v1/models/doubler/labels/{label}:predict", body)
        assert answer.status == status, answer.body
    client.close()
