"""The playground's form for typed columns, and what it shows of each kind of output, in a real browser."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests import columns
from tests.contract import test_playground
from tests.contract.test_playground import Open, Page, playwright
from tests.servers import Server

pytestmark = test_playground.pytestmark
browser, open_page = test_playground.browser, test_playground.open_page


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with every model of `tests.columns`."""
    root = tmp_path_factory.mktemp("columns")
    columns.write_all(root)
    with Server(root, "--workers", "1") as server:
        yield server


def expect_text(page: Page, selector: str, text: str) -> None:
    """Wait until an element has a text."""
    playwright.expect(page.locator(selector)).to_have_text(text, timeout=1000 * test_playground.SECONDS)


def expect_value(page: Page, name: str, text: str) -> None:
    """Wait until the table of values has one by name."""
    row = page.locator(".facts-list > div").filter(has=page.locator("dt", has_text=name)).locator("dd")
    playwright.expect(row).to_have_text(text, timeout=1000 * test_playground.SECONDS)


def test_every_type_of_column_has_its_field(open_page: Open, homes: Server) -> None:
    """A slider, a switch, a drop-down, a text and a date, and whether there is none; each changes the answer."""
    page = open_page(f"{homes.url}/#house", ready=".latency:not(:empty)")
    expect_value(page, "age", "31.5 years")
    page.get_by_label("age, slider").fill("90")
    expect_value(page, "age", "90 years")
    page.get_by_label("none", exact=True).first.check()
    expect_value(page, "age", "-1 years")
    page.get_by_role("switch", name="garden").uncheck()
    expect_value(page, "garden", "0")
    page.get_by_label("city", exact=True).select_option("Oslo")
    expect_value(page, "city", "2")
    page.get_by_label("remark", exact=True).fill("something else")
    expect_value(page, "remark", "0")
    page.get_by_label("since", exact=True).fill("1970-01-11T00:00")
    expect_value(page, "since", "10")
    page.get_by_role("button", name="Sample: age none").click()
    expect_value(page, "city", "6")
    assert page.get_by_label("rooms", exact=True).input_value() == "4"


@pytest.mark.parametrize(
    ("model", "headline", "detail"),
    [
        ("spam", "ham", "with probability 80.0 %"),
        ("box", "0.5 m, 0.5 m", "width, height"),
        ("tags", "a, b", "of 3 labels"),
        ("forecast", "0.5 °C", "prediction; -0.5 to 1.5 °C, in 80 % of cases"),
        ("embedder", "4 numbers", "of length 1"),
        ("detector", "4 outputs", "corners, total, positive, text"),
    ],
)
def test_each_kind_of_output_is_shown(open_page: Open, homes: Server, model: str, headline: str, detail: str) -> None:
    """The answer stands there in words."""
    page: Any = open_page(f"{homes.url}/#{model}")
    for field in page.locator(".features input[type=number]").all():  # empty where no range is known
        if not field.input_value():
            field.fill("0.5")
    page.wait_for_selector(".latency:not(:empty)")
    expect_text(page, ".headline", headline)
    expect_text(page, ".detail", detail)
    assert not page.locator(".problem:visible").count()
