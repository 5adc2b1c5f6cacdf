"""Tests of service.api.responses."""

import json
import logging

import pytest
from starlette.exceptions import HTTPException

from service.api.responses import as_service_error, encode_error, error_headers, explain
from service.errors import (
    InferenceError,
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
    UnauthorizedError,
    UnavailableError,
)


def test_failures_of_the_service_itself_tell_no_internals(caplog: pytest.LogCaptureFixture) -> None:
    """A 500's sentence is fixed; what happened goes to the log, under the request's id."""
    with caplog.at_level(logging.ERROR, "service"):
        found = as_service_error(RuntimeError("secret path"), b"id-1")
    assert found.status == 500
    assert json.loads(encode_error(found)) == {"error": "the model failed to answer this request"}
    assert b"secret" not in encode_error(InferenceError("secret path"))
    assert "id-1" in caplog.text
    assert "secret path" in caplog.text


def test_failures_of_the_caller_keep_their_sentence_and_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A 4xx says what is wrong, and is no business of the log."""
    error = InvalidRequestError('instances[0] is "x"')
    with caplog.at_level(logging.DEBUG, "service"):
        assert as_service_error(error, b"id-1") is error
    assert json.loads(encode_error(error)) == {"error": 'instances[0] is "x"'}
    assert not caplog.records


def test_statuses_bring_the_header_fields_of_rfc_9110() -> None:
    """405 has Allow, 401 WWW-Authenticate, 503 Retry-After; others none."""
    assert error_headers(MethodNotAllowedError("no", allow="GET, HEAD")) == [(b"allow", b"GET, HEAD")]
    assert error_headers(UnauthorizedError("no")) == [(b"www-authenticate", b"Bearer")]
    assert error_headers(UnavailableError("no")) == [(b"retry-after", b"1")]
    assert error_headers(InvalidRequestError("no")) == []


def test_action_that_models_do_not_have_is_not_found() -> None:
    """The route of models takes it for a name, and would say that it answers GET, which it does not."""
    found = explain("POST", "/v1/models/house:explain", HTTPException(405, headers={"Allow": "GET, HEAD"}))
    assert isinstance(found, NotFoundError)
    assert str(found) == "there is nothing at /v1/models/house:explain; models below /v1 have :predict and :preview"
    assert isinstance(explain("POST", "/v1/models/house", HTTPException(405)), MethodNotAllowedError)
