"""HTTP/1.1 by the byte: every case of `tests.conformance` is answered best, sent as a whole and byte by byte."""

import asyncio
from collections.abc import Iterator

import pytest

from tests.conformance.cases import CASES
from tests.conformance.runner import judge, run_cases
from tests.conformance.servers import run_ours

SECONDS = 20.0  # without a byte; what is incomplete is given up before by the server
ALLOWED = {  # by the rules, and no better answer is worth its cost
    "expect-unknown": "417 is a MAY; the expectation is ignored, as by every server compared",
    "request-line-two-spaces": "a MAY; llhttp takes several spaces, and no bytes are read in two ways by it",
    "request-line-two-spaces-behind": "as above",
    "close-then-get": "only bytewise: what a client sends behind its last request may cost it the answer (TCP resets)",
    "close-with-body-then-get": "as above",
    "http-1.0-then-get": "as above",
    "target-asterisk-options": "there is nothing to say of the server as a whole, so 400",
}


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a server whose timeouts are short."""
    with run_ours(tmp_path_factory.mktemp("conformance") / "models") as running:
        yield running


@pytest.mark.parametrize("bytewise", [False, True], ids=["whole", "bytewise"])
def test_every_case_is_answered_best(port: int, bytewise: bool) -> None:
    """No case is answered otherwise than the rules ask, and only those listed above otherwise than they advise."""
    outcomes = asyncio.run(run_cases(port, CASES, SECONDS, bytewise))
    verdicts = {case.name: judge(case, outcomes[case.name]) for case in CASES}
    found = {
        name: outcomes[name].text for name, verdict in verdicts.items() if verdict != "best" and name not in ALLOWED
    }
    assert not found
    assert "wrong" not in verdicts.values()
