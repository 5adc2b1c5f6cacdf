"""The playground when things change or are missing, and with more than fits: in a real browser."""

import base64
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests import fakes
from tests.contract import test_playground
from tests.contract.test_playground import SEVEN, Open, axe, draw, expect_label, pixels, playwright
from tests.servers import Server
from tests.wire import wait_until

pytestmark = test_playground.pytestmark
browser, open_page, shipped = test_playground.browser, test_playground.open_page, test_playground.shipped
TIMEOUT = 1000 * test_playground.SECONDS


def affine(name: str, features: list[str], labels: list[str], seed: int = 0) -> fakes.FakeModel:
    """Return a classifier of some features into any number of labels, with random weights."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(len(features), len(labels))).astype(np.float32)
    return replace(
        fakes.compass(),
        name=name,
        contents=fakes.build_affine(weights, np.zeros(len(labels), np.float32), "Softmax"),
        input=fakes.tabular(*features),
        output={"kind": "probabilities", "labels": labels},
        more={},
    )


def with_ranges(fake: fakes.FakeModel) -> fakes.FakeModel:
    """Return the model with a range of -1 to 1 for every feature."""
    features = [feature | {"minimum": -1, "maximum": 1} for feature in fake.input["features"]]
    return replace(fake, input=fake.input | {"features": features})


def test_key_dialog_that_was_left_can_be_opened_again(open_page: Open, models_dir: Path) -> None:
    """Escape, twice, leaves a sentence and a button that asks again."""
    with Server(models_dir, "--workers", "1", "--api-key", "right") as server:
        page = open_page(f"{server.url}/#doubler", ready="dialog[open]")
        page.keyboard.press("Escape")
        page.keyboard.press("Escape")
        playwright.expect(page.locator("main .problem")).to_have_text("This service needs an API key.", timeout=TIMEOUT)
        for button in ("Try again", "API key"):
            page.get_by_role("button", name=button).click()
            page.wait_for_selector("dialog[open]")
            page.keyboard.press("Escape")
            playwright.expect(page.locator("dialog")).to_have_count(0)
        page.get_by_role("button", name="API key").click()
        page.locator("#key-input").fill("right")
        page.get_by_role("button", name="Use this key").click()
        playwright.expect(page.locator("h1")).to_have_text("Twice as long", timeout=TIMEOUT)


def test_lost_connection_is_told_and_recovers(open_page: Open, shipped: Server) -> None:
    """While nothing answers, a banner says so and the old answer is dimmed; afterwards the page asks by itself."""
    page = open_page(f"{shipped.url}/#linear")
    page.wait_for_selector(".latency:not(:empty)")
    before = page.locator(".headline").inner_text()
    page.context.set_offline(True)
    page.locator("#feature-0").fill("3")
    playwright.expect(page.locator("#banner")).to_have_text("Connection lost, retrying…", timeout=TIMEOUT)
    page.wait_for_selector(".result.stale")
    assert page.locator(".latency").inner_text() == ""
    assert page.locator(".headline").inner_text() == before
    page.context.set_offline(False)
    playwright.expect(page.locator("#banner")).to_have_text("", timeout=TIMEOUT)
    playwright.expect(page.locator(".headline")).not_to_have_text(before, timeout=TIMEOUT)
    playwright.expect(page.locator(".result.stale")).to_have_count(0)


def test_nothing_is_made_up_where_ranges_are_unknown(open_page: Open, empty_dir: Path) -> None:
    """Without ranges there are empty number fields and no answer, until every number is there."""
    fakes.write_version(empty_dir, affine("plain", ["a", "b"], ["x", "y", "z"]))
    with Server(empty_dir, "--workers", "1") as server:
        page = open_page(f"{server.url}/#plain")
        assert page.locator("input[type=range]").count() == 0
        playwright.expect(page.locator(".detail")).to_have_text("Enter a number for a, b.")
        expect_label(page, "?")
        page.get_by_label("a", exact=True).fill("1")
        playwright.expect(page.locator(".detail")).to_have_text("Enter a number for b.")
        page.get_by_label("b", exact=True).fill("1")
        page.wait_for_selector(".latency:not(:empty)")
        assert not page.locator(".chart:visible").count()


def test_map_of_ten_classes_has_ten_colours_and_straight_boundaries(open_page: Open, empty_dir: Path) -> None:
    """The legend's colours are distinct and those of the map; between two classes the boundary is a line."""
    labels = [f"class {index}" for index in range(10)]
    fakes.write_version(empty_dir, with_ranges(affine("ten", ["a", "b"], labels, seed=3)))
    steep = fakes.build_affine(np.array([[30], [20]], np.float32), np.zeros(1, np.float32), "Sigmoid")
    binary = replace(with_ranges(affine("two", ["a", "b"], ["no", "yes"])), task="binary", contents=steep)
    fakes.write_version(empty_dir, replace(binary, output={"kind": "probability", "labels": ["no", "yes"]}))
    with Server(empty_dir, "--workers", "1") as server:
        page = open_page(f"{server.url}/#ten", ready=".legend li")
        shown = page.locator(".legend li").all_inner_texts()
        colours = page.locator(".swatch").evaluate_all("all => all.map((one) => getComputedStyle(one).backgroundColor)")
        assert len(shown) == len(set(colours)) > 3
        page.goto(f"{server.url}/#two")
        page.wait_for_selector("canvas.map")
        side = 320
        find = f"""canvas => {{
            const {{data}} = canvas.getContext("2d").getImageData(0, 0, {side}, {side});
            const at = (x, y) => data[4 * (y * {side} + x)] > data[4 * (y * {side} + x) + 2];
            return [80, 120, 160, 200, 240].map((y) => [...Array({side}).keys()].find((x) => at(x, y) !== at(0, y)));
        }}"""
        wait_until(lambda: None not in page.locator("canvas.map").evaluate(find))
        crossings = page.locator("canvas.map").evaluate(find)
    steps = np.diff(crossings)
    assert np.abs(steps - steps.mean()).max() <= 2, crossings


def test_curves_of_several_labels_have_a_legend(open_page: Open, empty_dir: Path) -> None:
    """A curve for each label, and its name beside its colour."""
    fakes.write_version(empty_dir, with_ranges(affine("three", ["a"], ["x", "y", "z"])))
    with Server(empty_dir, "--workers", "1") as server:
        page = open_page(f"{server.url}/#three", ready="svg.curve path.line")
        assert page.locator(".legend li").all_inner_texts() == ["x", "y", "z"]


@pytest.mark.parametrize("width", [360, 1024, 1600])
def test_many_models_and_features_fit(width: int, open_page: Open, empty_dir: Path) -> None:
    """60 models can be filtered, and 30 features with long labels keep the answer in view."""
    names = [f"a feature with quite a long name {index}" for index in range(30)]
    long = "a label that is much longer than anybody would like it to be"
    fakes.write_version(empty_dir, with_ranges(affine("wide", names, [f"{long}, {index}" for index in range(3)])))
    for index in range(60):
        fakes.write_version(empty_dir, replace(fakes.doubler(), name=f"model-{index}"))
    with Server(empty_dir, "--workers", "1") as server:
        page = open_page(f"{server.url}/#wide", width)
        page.wait_for_selector(".latency:not(:empty)")
        page.get_by_label("Filter models").fill("model-5")
        assert page.locator("nav li:visible").count() == 11
        page.locator("#feature-29").scroll_into_view_if_needed()
        assert any(
            page.locator(each).evaluate(
                "element => { const box = element.getBoundingClientRect(); return box.height && box.bottom > 0"
                " && box.top < innerHeight }"
            )
            for each in (".headline", ".peek")
        )
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        assert page.locator("nav").evaluate("nav => nav.offsetHeight") <= 900
        found = axe.Axe().run(page).response["violations"]
        assert not [(each["id"], each["nodes"][0]["html"]) for each in found]


@pytest.mark.parametrize(("hash_", "name"), [("#none", "none"), ("#%", "%"), ("#linear%2F1", None)])
def test_unknown_model_is_said_to_be_unknown(hash_: str, name: str | None, open_page: Open, shipped: Server) -> None:
    """An address of no model says so and lists those that there are; an escaped one is understood."""
    page = open_page(f"{shipped.url}/{hash_}", ready="main .problem" if name else "h1")
    if name:
        assert page.locator("main .problem").inner_text() == f"There is no model “{name}”."
        page.get_by_role("link", name="Linear regression linear", exact=True).click()
    playwright.expect(page.locator("h1")).to_have_text("Linear regression", timeout=TIMEOUT)


def test_new_model_and_version_come_without_reload(open_page: Open, empty_dir: Path) -> None:
    """A model that the service has just loaded is in the list, and a model's new version is shown."""
    fakes.write_version(empty_dir, fakes.doubler())
    with Server(empty_dir, "--workers", "1", "--reload-interval", "0.2") as server:
        page = open_page(f"{server.url}/#doubler")
        fakes.write_version(empty_dir, fakes.coin())
        playwright.expect(page.locator("nav li")).to_have_count(2, timeout=2 * TIMEOUT)
        fakes.write_version(empty_dir, fakes.doubler(version=2))
        playwright.expect(page.locator(".facts")).to_contain_text("version 2", timeout=2 * TIMEOUT)
        assert server.log().count("/playground/revision") == 0


def test_drawing_is_kept_for_the_next_model(open_page: Open, shipped: Server) -> None:
    """What was drawn for one digit model is there, and answered, for another, and compared over all of them."""
    page = open_page(f"{shipped.url}/#mnist")
    draw(page, SEVEN)
    expect_label(page, "7")
    rows = page.locator(".compare tbody tr")
    playwright.expect(rows.locator(".compare-big")).to_have_text(["7"] * rows.count(), timeout=TIMEOUT)
    assert rows.count() >= 3
    drawn = pixels(page, "canvas.pad")
    rows.get_by_role("link").first.click()
    playwright.expect(page.locator("h1")).not_to_have_text("Handwritten digits", timeout=TIMEOUT)
    expect_label(page, "7")
    assert pixels(page, "canvas.pad") == drawn


def test_page_opens_on_an_answered_sample(open_page: Open, shipped: Server) -> None:
    """Without an address of a model, the most accurate digit model reads a sample; drawing begins on clean paper."""
    page = open_page(shipped.url)
    best = max(
        (each for each in shipped.get("/v1/models").json()["models"] if each["input"]["kind"] == "image"),
        key=lambda each: float(each["metrics"]["accuracy"]),
    )
    assert page.locator("h1").inner_text() == best["title"]
    expect_label(page, "7")
    assert page.locator(".sample").count() == 10
    for digit in range(10):
        page.get_by_role("button", name=f"Sample {digit + 1}", exact=True).click()
        expect_label(page, str(digit))
    draw(page, SEVEN)
    expect_label(page, "7")
    playwright.expect(page.locator("#wire-text")).to_contain_text("-T 'drawing.png'")
    assert len(page.locator("#wire-text").inner_text()) < 160


def test_drawn_digit_writes_few_lines_of_log(open_page: Open, models_dir: Path) -> None:
    """A stroke of two seconds is a prediction a few times a second, not at every move of the mouse."""
    with Server(models_dir, "--workers", "1", "--device", "cpu") as server:
        page = open_page(f"{server.url}/#canvas")
        before = server.log().count("POST")
        box = page.locator("canvas.pad").bounding_box()
        page.mouse.move(box["x"] + 20, box["y"] + 20)
        page.mouse.down()
        for step in range(100):
            page.mouse.move(box["x"] + 20 + step, box["y"] + 20 + step)
            page.wait_for_timeout(15)
        page.mouse.up()
        page.wait_for_timeout(500)
        seconds = page.evaluate("performance.now()") / 1000
        assert 2 < server.log().count("POST") - before < 10 + 8 * seconds


def test_part_of_a_photo_can_be_cut_out(open_page: Open, shipped: Server, tmp_path: Path) -> None:
    """Of a page with a 7 in its left half and something else in the right, the box around the 7 is read."""
    page = open_page(f"{shipped.url}/#mnist")
    left = [[(x / 2, y / 2 + 0.25) for x, y in SEVEN[0]]]
    scrawl = [[(0.6, 0.1), (0.95, 0.9), (0.95, 0.1), (0.6, 0.9)], [(0.6, 0.5), (0.95, 0.5)]]
    draw(page, left + scrawl)
    page.wait_for_selector(".latency:not(:empty)")
    (tmp_path / "page.png").write_bytes(base64.b64decode(pixels(page, "canvas.pad").partition(",")[2]))
    page.locator("#file-input").set_input_files(tmp_path / "page.png")
    page.get_by_role("button", name="Crop").click()
    box = page.locator("canvas.pad").bounding_box()
    page.mouse.move(box["x"] + 0.02 * box["width"], box["y"] + 0.2 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.8 * box["height"], steps=4)
    page.mouse.up()
    expect_label(page, "7")
    playwright.expect(page.locator("#wire-text")).to_contain_text("crop.png")


def test_docs_of_many_models_are_opened_one_at_a_time(open_page: Open, empty_dir: Path) -> None:
    """Of 40 models, one is described, and another after it is picked."""
    for index in range(40):
        fakes.write_version(empty_dir, replace(fakes.doubler(), name=f"model-{index:02}"))
    with Server(empty_dir, "--workers", "1") as server:
        page = open_page(f"{server.url}/docs", ready=".opblock")
        assert not re.search("model-07", page.locator("#ui").inner_text())
        page.get_by_label("Model (of 40)").fill("model-07")
        page.get_by_label("Model (of 40)").press("Enter")
        playwright.expect(page.locator("#ui")).to_contain_text("model-07", timeout=TIMEOUT)
