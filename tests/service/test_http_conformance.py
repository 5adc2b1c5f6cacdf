"""Tests of service.http without sockets: the cases of `tests.conformance`, as a whole and cut in pieces of each size.

`tests/contract/test_conformance.py` runs them over real connections.
"""

import re

import pytest

from tests.conformance.case import HALF_CLOSE, Case
from tests.conformance.cases import CASES
from tests.conformance.runner import Outcome, judge
from tests.contract.test_conformance import ALLOWED
from tests.fuzz.connection import converse

_STATUS = re.compile(r"HTTP/1\.1 (\d{3}) ")
_ENDS = {"closed": "", "usable": "+", "waiting": "~"}
PIECES = (0, 1, 2, 3, 5, 7, 11, 50)  # bytes in each; 0: all at once


def run(case: Case, size: int) -> Outcome:
    """Return what comes of a case."""
    segments = (case.sent,) if isinstance(case.sent, str) else case.sent
    pieces: list[bytes] = []
    for sent in (segment.encode("latin-1") for segment in segments if segment != HALF_CLOSE):
        step = (size if len(sent) < 2000 else 200 * size) or len(sent)
        pieces += [sent[start : start + step] for start in range(0, len(sent), step)]
    written, end = converse(pieces, HALF_CLOSE in segments)
    text = written.decode("latin-1")
    return Outcome(",".join(_STATUS.findall(text)) + _ENDS[end] or "-", written)


@pytest.mark.parametrize("size", PIECES)
def test_every_case_is_answered_best(size: int) -> None:
    """However the bytes are cut, every case is answered as the rules ask."""
    cases = [case for case in CASES if case.name not in ALLOWED]
    outcomes = {case.name: run(case, size) for case in cases}
    wrong = {case.name: outcomes[case.name].text for case in cases if judge(case, outcomes[case.name]) != "best"}
    assert not wrong
