"""A typed client of the service: arrays, data frames and pictures in, predictions out. Needs the extra `client`.

    from model_service.client import Client

    with Client("http://127.0.0.1:8000") as client:
        answer = client.predict("logistic-hours", np.array([[2.0], [4.0]]), threshold=0.3)
        answer.column("label")          # array(['pass', 'pass'])
        answer.column("probabilities")  # (2, 2)

`AsyncClient` is the same with `await`. Requests that are refused for want of room (429, 503), or that find no service,
are sent again after the time that Retry-After asks for.
"""

import asyncio
import base64
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx
import numpy as np
from numpy.typing import NDArray

Instances = Any  # an array, a data frame, or a list of rows, objects, paths or bytes of pictures
_AGAIN = (429, 503)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 30.0  # seconds; the pause doubles where nothing says how long it is to be


class CallError(Exception):
    """A call that failed; the text is the service's own sentence.

    Attributes:
        status: The HTTP status, or 0 if there was no response.
    """

    def __init__(self, sentence: str, status: int = 0) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class Answer:
    """Predictions in the order of the instances.

    Attributes:
        model: The model's name.
        version: The version that answered.
        predictions: One object for each instance; its fields depend on the model's task, see docs/api.md.
    """

    model: str
    version: int
    predictions: list[dict[str, Any]]

    def column(self, name: str) -> NDArray[Any]:
        """Return one field of every prediction, such as `label`, (N,), or `probabilities`, (N, classes)."""
        return np.array([prediction[name] for prediction in self.predictions])

    def to_frame(self) -> Any:  # noqa: ANN401 - pandas is not imported for its type
        """Return the predictions as a pandas data frame, a row for each instance."""
        import pandas as pd  # noqa: PLC0415 - only this needs it

        return pd.DataFrame(self.predictions)


def encode_instances(instances: Instances) -> list[Any]:
    """Return instances as JSON has them: missing values as null, times in ISO 8601, pictures as base64."""
    if hasattr(instances, "to_dict"):
        instances = instances.to_dict("records")
    return [_encode(instance) for instance in instances]


def _encode(value: Any) -> Any:  # noqa: ANN401 - whatever the caller has
    if isinstance(value, Path):
        value = value.read_bytes()
    if isinstance(value, bytes):
        return {"b64": base64.b64encode(value).decode()}
    if isinstance(value, Mapping):
        return {str(name): _encode(each) for name, each in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _encode(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_encode(each) for each in value]
    if value != value:  # noqa: PLR0124 - NaN and NaT, and nothing else
        return None
    return value.isoformat() if hasattr(value, "isoformat") else value


class _Calls:
    """What both clients share: how a call is written, read, and sent again."""

    def __init__(
        self, url: str = "http://127.0.0.1:8000", *, api_key: str = "", timeout: float = 30.0, retries: int = 3
    ) -> None:
        """Prepare a client.

        Args:
            url: Where the service is, with a path if a proxy adds one.
            api_key: Sent with each call, if not empty.
            timeout: Seconds for one attempt, which the service is told as well.
            retries: Further attempts if the service has no room or does not answer.
        """
        self._retries = retries
        headers = {"Content-Type": "application/json", "X-Request-Timeout": f"{timeout:g}"}
        headers |= {"X-API-Key": api_key} if api_key else {}
        self._options: dict[str, Any] = {"base_url": url.rstrip("/") + "/", "headers": headers, "timeout": timeout}

    def _write(
        self, model: str, instances: Instances, version: int | None, parameters: dict[str, Any]
    ) -> tuple[str, bytes]:
        path = f"v1/models/{quote(model, safe='')}" + (f"/versions/{version}" if version else "")
        body = {"instances": encode_instances(instances)} | ({"parameters": parameters} if parameters else {})
        return f"{path}:predict", json.dumps(body).encode()

    def _choose_pause(self, attempt: int, response: httpx.Response | None) -> float | None:
        """Return the seconds until the next attempt, or None if there is to be none."""
        if attempt >= self._retries or (response is not None and response.status_code not in _AGAIN):
            return None
        told = response.headers.get("Retry-After", "") if response is not None else ""
        pause = _FIRST_PAUSE * 2.0**attempt
        if told.isdecimal():
            pause = float(told)
        elif told:
            pause = max(0.0, parsedate_to_datetime(told).timestamp() - time.time())
        return min(pause, _LONGEST_PAUSE)

    @staticmethod
    def _read(response: httpx.Response) -> Any:  # noqa: ANN401 - decoded JSON
        if response.is_success:
            return response.json()
        try:
            sentence = str(response.json()["error"])
        except (ValueError, LookupError, TypeError):  # something in front of the service answered
            sentence = f"{response.url} answers {response.status_code} {response.reason_phrase}"
        raise CallError(sentence, response.status_code)


class Client(_Calls):
    """Calls the service; use it as a context manager, or `close` it. Threads may share one."""

    def __init__(self, *given: Any, **more: Any) -> None:  # noqa: ANN401 - those of `_Calls`
        super().__init__(*given, **more)
        self._http = httpx.Client(**self._options)

    def predict(
        self, model: str, instances: Instances, *, version: int | None = None, **parameters: float | str
    ) -> Answer:
        """Return predictions of a model's latest version, or of `version`; parameters are such as `top_k`.

        Raises:
            CallError: The service refused the request, or did not answer it after all attempts.
        """
        path, body = self._write(model, instances, version, parameters)
        return Answer(**self._call("POST", path, body))

    def models(self) -> list[dict[str, Any]]:
        """Return the description of every model."""
        found: list[dict[str, Any]] = self._call("GET", "v1/models")["models"]
        return found

    def _call(self, method: str, path: str, body: bytes | None = None) -> Any:  # noqa: ANN401 - decoded JSON
        attempt = 0
        while True:
            response, failure = None, ""
            try:
                response = self._http.request(method, path, content=body)
            except httpx.TransportError as error:
                failure = f"no service answers at {self._http.base_url}: {error}"
            pause = self._choose_pause(attempt, response)
            if pause is None:
                if response is None:
                    raise CallError(failure)
                return self._read(response)
            time.sleep(pause)
            attempt += 1

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient(_Calls):
    """As `Client`, for asyncio."""

    def __init__(self, *given: Any, **more: Any) -> None:  # noqa: ANN401 - those of `_Calls`
        super().__init__(*given, **more)
        self._http = httpx.AsyncClient(**self._options)

    async def predict(
        self, model: str, instances: Instances, *, version: int | None = None, **parameters: float | str
    ) -> Answer:
        """Return predictions; see `Client.predict`."""
        path, body = self._write(model, instances, version, parameters)
        return Answer(**await self._call("POST", path, body))

    async def models(self) -> list[dict[str, Any]]:
        """Return the description of every model."""
        found: list[dict[str, Any]] = (await self._call("GET", "v1/models"))["models"]
        return found

    async def _call(self, method: str, path: str, body: bytes | None = None) -> Any:  # noqa: ANN401 - decoded JSON
        attempt = 0
        while True:
            response, failure = None, ""
            try:
                response = await self._http.request(method, path, content=body)
            except httpx.TransportError as error:
                failure = f"no service answers at {self._http.base_url}: {error}"
            pause = self._choose_pause(attempt, response)
            if pause is None:
                if response is None:
                    raise CallError(failure)
                return self._read(response)
            await asyncio.sleep(pause)
            attempt += 1

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
