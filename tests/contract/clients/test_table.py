"""The table of clients in docs/protocol.md names a test for each row, and every test of a client has a row."""

import re
from pathlib import Path

from tests.servers import ROOT

HERE = Path(__file__).parent
_TEST = re.compile(r"^\|.*\| `([\w/]+\.py)` \|$", re.MULTILINE)


def test_every_row_has_a_test_and_every_test_a_row() -> None:
    """Names without a folder are those of this one."""
    table = (ROOT / "docs" / "protocol.md").read_text().partition("## Clients")[2].partition("\n## ")[0]
    named = _TEST.findall(table)
    assert len(named) == table.count("\n|") - 2  # its head has two lines
    assert all((HERE / name if "/" not in name else ROOT / name).is_file() for name in named)
    assert {path.name for path in HERE.glob("test_*.py")} - {Path(__file__).name} == {
        name for name in named if "/" not in name
    }
