"""docs/security.md says which test holds each promise: those tests must be there, and its figures must add up."""

import re

from tests.conformance.cases import GROUPS
from tests.servers import ROOT

PAGE = (ROOT / "docs" / "security.md").read_text()


def test_named_tests_are_there() -> None:
    """Every file of tests, and every test in it, that the page names."""
    texts: dict[str, str] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):  # some have the same name in two folders
        texts[path.name] = texts.get(path.name, "") + path.read_text()
    named = re.findall(r"`(?:tests/\w+/)?(test_\w+\.py|…)(?:::(test_\w+))?`", PAGE)
    assert len(named) > 30
    last = ""
    for file, test in named:
        last = last if file == "…" else file
        assert last in texts, f"there is no {last}"
        assert not test or f"def {test}(" in texts[last], f"there is no {test} in {last}"


def test_table_counts_the_cases() -> None:
    """The three verdicts of each server add up to the cases of each group; this service gets none wrong."""
    rows = re.findall(r"^\| ([^|]+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", PAGE, re.MULTILINE)
    assert rows[0][0] == "this service"
    assert (rows[0][3], rows[0][6]) == ("0", "0")
    for row in rows:
        counts = [int(cell) for cell in row[1:]]
        assert [sum(counts[:3]), sum(counts[3:])] == [len(cases) for cases in GROUPS.values()]
