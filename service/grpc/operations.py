"""All but infer: each call is answered by the path under `/v2` that does the same, so that one place decides.

Keys, errors, metrics and the access log are therefore those of HTTP.
"""

from collections.abc import Callable
from http import HTTPStatus
from typing import Any, NamedTuple

import orjson
from starlette.types import Message, Scope

from service.api.headers import Headers
from service.app import Application
from service.errors import InvalidRequestError, NotFoundError

Fields = dict[str, Any]


class Operation(NamedTuple):
    """How a call is answered: by the path that `choose_path` gives, and `read` makes its message of what that says.

    A call that only asks whether something is `ready` is answered where it is not, too. One with a `body` is a POST.
    """

    choose_path: Callable[[Any], str]
    read: Callable[[Any], Fields] = dict
    asks: bool = False
    body: Callable[[Any], Fields] | None = None


class OperationFailedError(Exception):
    """The path answered with a status other than 200, and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def _name_model(name: str, version: str = "") -> str:
    """Return the path of a model.

    Raises:
        InvalidRequestError: no model is named.
        NotFoundError: the name would be another path.
    """
    if not name:
        raise InvalidRequestError("the request names no model")
    if "/" in name + version:
        raise NotFoundError(f"Request for unknown model: '{name[:60]}' is not found; no name has a slash")
    return f"/v2/models/{name}/versions/{version}" if version else f"/v2/models/{name}"


def _change(action: str) -> Callable[[Any], str]:
    def choose_path(message: Any) -> str:  # noqa: ANN401 - made at run time
        name = message.model_name or message.repository_name  # where KServe sends it
        return f"/v2/repository/{_name_model(name).removeprefix('/v2/')}/{action}"

    return choose_path


def _read_parameters(message: Any) -> Fields:  # noqa: ANN401 - made at run time
    return {"parameters": dict.fromkeys(message.parameters)}  # their names: none has a meaning here, some are refused


OPERATIONS = {
    "ServerLive": Operation(lambda _: "/v2/health/live"),
    "ServerReady": Operation(lambda _: "/v2/health/ready", asks=True),
    "ServerMetadata": Operation(lambda _: "/v2"),
    "ModelReady": Operation(lambda message: _name_model(message.name, message.version) + "/ready", asks=True),
    "ModelMetadata": Operation(lambda message: _name_model(message.name, message.version)),
    "ModelConfig": Operation(
        lambda message: _name_model(message.name, message.version) + "/config", lambda found: {"config": found}
    ),
    "ModelStatistics": Operation(
        lambda message: (_name_model(message.name, message.version) if message.name else "/v2/models") + "/stats"
    ),
    "RepositoryIndex": Operation(
        lambda _: "/v2/repository/index", lambda rows: {"models": rows}, body=lambda message: {"ready": message.ready}
    ),
    "RepositoryModelLoad": Operation(
        _change("load"), lambda found: {"model_name": found["name"], "isLoaded": True}, body=_read_parameters
    ),
    "RepositoryModelUnload": Operation(
        _change("unload"), lambda found: {"model_name": found["name"], "isUnloaded": True}, body=_read_parameters
    ),
}


async def operate(app: Application, operation: Operation, message: Any, headers: Headers) -> Fields:  # noqa: ANN401
    """Return the fields of a call's answer.

    Args:
        app: answers the path.
        operation: the call.
        message: its request.
        headers: the metadata that matter, as header fields.

    Raises:
        OperationFailedError: the path answered with another status than 200.
        RequestError: the request names no model.
    """
    body = b"" if operation.body is None else orjson.dumps(operation.body(message))
    sent: list[Message] = []
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "2",
        "method": "GET" if operation.body is None else "POST",
        "scheme": "http",
        "path": operation.choose_path(message),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
    }

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(part: Message) -> None:
        sent.append(part)

    await app(scope, receive, send)
    status, answer = sent[0]["status"], orjson.loads(b"".join(part.get("body", b"") for part in sent))
    if status == HTTPStatus.OK:
        return operation.read(answer)
    if operation.asks and status in (HTTPStatus.NOT_FOUND, HTTPStatus.SERVICE_UNAVAILABLE):
        return {"ready": False}
    raise OperationFailedError(status, answer["error"])
