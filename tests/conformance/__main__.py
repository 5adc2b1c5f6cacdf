"""`python -m tests.conformance`: the cases against this service and every other server installed here, side by side.

Those are uvicorn, hypercorn and granian where they are on the PATH, and nginx and HAProxy in front of uvicorn.
"""

import argparse
import asyncio
import sys
from collections import Counter

from tests.conformance.case import Case
from tests.conformance.cases import CASES, GROUPS
from tests.conformance.runner import Outcome, judge, run_cases
from tests.conformance.servers import list_installed, run_server

_MARKS = {"best": "", "allowed": " (allowed)", "wrong": " (wrong)"}


def main() -> int:
    """Print a table of counts and one of the rows in which servers differ; return 1 if this service is at fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("--server", action="append", choices=list_installed(), help="only this one; may be repeated")
    parser.add_argument("--bytewise", action="store_true", help="send each byte by itself")
    parser.add_argument("--case", help="only this one, with what came back")
    flags = parser.parse_args()
    cases = [case for case in CASES if flags.case in (None, case.name)]
    found: dict[str, dict[str, Outcome]] = {}
    for name in flags.server or list_installed():
        with run_server(name) as port:
            found[name] = asyncio.run(run_cases(port, cases, 2.0, flags.bytewise))
        if flags.case:
            print(name, *found[name].values())
    print_counts(found, GROUPS if len(cases) > 1 else {"it": cases})
    print_differences(found, cases)
    first, *_ = found
    return int(any(judge(case, found[first][case.name]) != "best" for case in cases))


def print_counts(found: dict[str, dict[str, Outcome]], groups: dict[str, list[Case]]) -> None:
    """Print how many cases each server answers best, as the rules allow, and wrong."""
    print("| server |", " | ".join(f"{group}: best | allowed | wrong" for group in groups), "|")
    print("|---" * (1 + 3 * len(groups)) + "|")
    for name, outcomes in found.items():
        cells = []
        for cases in groups.values():
            counts = Counter(judge(case, outcomes[case.name]) for case in cases)
            cells += [str(counts[verdict]) for verdict in _MARKS]
        print("|", " | ".join([name, *cells]), "|")


def print_differences(found: dict[str, dict[str, Outcome]], cases: list[Case]) -> None:
    """Print the outcomes of the cases that not every server answers best."""
    print("\n| case | rule | best |", " | ".join(found), "|")
    print("|---" * (3 + len(found)) + "|")
    for case in cases:
        verdicts = {name: judge(case, outcomes[case.name]) for name, outcomes in found.items()}
        if set(verdicts.values()) != {"best"}:
            cells = [_shorten(found[name][case.name].text) + _MARKS[verdict] for name, verdict in verdicts.items()]
            print("|", " | ".join([case.name, case.rule, case.best, *cells]), "|")


def _shorten(text: str) -> str:
    return text if len(text) < 24 else f"{text[:8]}…{text[-8:]}"


if __name__ == "__main__":
    sys.exit(main())
