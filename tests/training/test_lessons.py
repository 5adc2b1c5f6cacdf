"""The pages of lessons: their code gives what they print, they name what exists, and both languages agree."""

import doctest
import importlib
import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
ENGLISH, CHINESE = ((DOCS / name).read_text() for name in ("lessons.md", "lessons.zh.md"))


def find_blocks(page: str) -> list[str]:
    """Return the Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def test_code_prints_what_the_page_says() -> None:
    """All blocks, run in order in one session, give what stands below them."""
    session = doctest.DocTestParser().get_doctest("".join(find_blocks(ENGLISH)), {}, "lessons", None, 0)
    assert len(session.examples) > 20
    report: list[str] = []
    assert doctest.DocTestRunner().run(session, out=report.append).failed == 0, "".join(report)


def test_languages_have_the_same_code_and_figures() -> None:
    """A figure or a line of code that is changed in one language is changed in the other."""
    assert find_blocks(CHINESE) == find_blocks(ENGLISH)
    english, chinese = (re.findall(r"^\|.*\d.*\|$", page, re.MULTILINE) for page in (ENGLISH, CHINESE))
    assert english
    assert english == chinese


def test_named_functions_exist() -> None:
    """Each function of the table is in the file that the table names."""
    named = re.findall(r"`training/(\w+)\.py`: ((?:`\w+`(?:, )?)+)", ENGLISH)
    assert len(named) > 5
    for module, functions in named:
        for function in re.findall(r"\w+", functions):
            assert callable(getattr(importlib.import_module(f"training.{module}"), function)), function
    assert re.findall(r"`training/.*", CHINESE) == re.findall(r"`training/.*", ENGLISH)
