"""Requests drawn from `/openapi.json` by schemathesis (https://schemathesis.readthedocs.io), good ones and bad ones.

Each answer must be documented: its status, its content type and its body; and none may be a 5xx.
"""

import logging
from collections import Counter
from contextlib import suppress
from typing import Any

import hypothesis
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
SECONDS = 20.0
INTERNAL_ERROR = 500
HUGE = 1e30


def fuzz(url: str, examples: int, seed: int) -> Counter[int]:
    """Send drawn requests to every operation and return how many answers had which status.

    Args:
        url: of a running service.
        examples: requests for each operation and way of drawing them.
        seed: the same draws the same requests.

    Raises:
        Exception: schemathesis' own, for an answer that is not as documented, with the request to repeat it.
    """
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it warns of connections that a 413 has closed
    answered: Counter[int] = Counter()
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    for found in schema.get_all_operations():
        operation: Any = found.ok()  # type: ignore[union-attr]  # an invalid description raises
        for mode in schemathesis.GenerationMode:
            _fuzz_operation(operation, mode, url, examples, seed, answered)
    return answered


def has_huge_number(value: Any) -> bool:
    """Tell whether a body has a number with which float32 arithmetic may overflow."""
    if isinstance(value, dict):
        return any(map(has_huge_number, value.values()))
    if isinstance(value, list):
        return any(map(has_huge_number, value))
    return isinstance(value, int | float) and abs(value) > HUGE


def _fuzz_operation(
    operation: Any,
    mode: schemathesis.GenerationMode,
    url: str,
    examples: int,
    seed: int,
    answered: Counter[int],
) -> None:
    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def send(case: schemathesis.Case[Any]) -> None:
        answer = case.call(base_url=url, timeout=SECONDS)
        answered[answer.status_code] += 1
        if answer.status_code == INTERNAL_ERROR and has_huge_number(case.body):
            return  # a graph that overflows gives no finite number, and that is a 500
        case.validate_response(answer, checks=CHECKS)

    with suppress(hypothesis.errors.Unsatisfiable):  # an operation without parameters has nothing to get wrong
        send()
