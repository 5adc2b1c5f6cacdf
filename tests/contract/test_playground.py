"""The playground in a real browser: Debian's chromium, driven by Playwright."""

import base64
import io
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from onnx import helper
from PIL import Image

from tests import fakes
from tests.prefix import Prefix
from tests.servers import Server
from tests.wire import wait_until

playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright, of the dev extra")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="they need axe-playwright-python")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium; apt-get install chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
SECONDS = 15
SEVEN = [[(0.25, 0.2), (0.72, 0.2), (0.6, 0.45), (0.42, 0.85)]]
ONE = [[(0.5, 0.15), (0.5, 0.85)]]
ZERO = [
    [
        (0.5, 0.15),
        (0.3, 0.25),
        (0.24, 0.5),
        (0.3, 0.75),
        (0.5, 0.85),
        (0.7, 0.75),
        (0.76, 0.5),
        (0.7, 0.25),
        (0.5, 0.15),
    ]
]
Page = Any
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One browser for this module."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shipped(published: Path) -> Iterator[Server]:
    """A server on the models that the registry ships."""
    with Server(published, "--workers", "1", "--device", "cpu") as running:
        yield running


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Open a page of its own; at the end, the page has raised no error and broken no rule of its policy."""
    contexts, problems = [], []

    def open_at(url: str, width: int = 1600, scheme: str = "light", ready: str = ".headline") -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, has_touch=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(1000 * SECONDS)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if "Policy" in message.text else None)
        page.goto(url)
        page.wait_for_selector(ready)
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert not problems


def draw(page: Page, strokes: list[list[tuple[float, float]]]) -> None:
    """Draw strokes on the pad, in parts of its sides, with the mouse."""
    box = page.locator("canvas.pad").bounding_box()
    for stroke in strokes:
        places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in stroke]
        page.mouse.move(*places[0])
        page.mouse.down()
        for place in places[1:]:
            page.mouse.move(*place, steps=6)
        page.mouse.up()


def expect_label(page: Page, label: str) -> None:
    """Wait until the headline says a label."""
    playwright.expect(page.locator(".headline")).to_have_text(label, timeout=1000 * SECONDS)


def wait_for(page: Page, predicate: str, argument: object = None) -> None:
    """Wait until a function is true in the page.

    Playwright's own `wait_for_function` asks again by `eval`, which the page's Content-Security-Policy forbids.
    """
    wait_until(lambda: page.evaluate(predicate, argument))


def pixels(page: Page, selector: str) -> str:
    """Return what a canvas shows, as text that can be compared."""
    return str(page.locator(selector).evaluate("canvas => canvas.toDataURL()"))


def is_other(page: Page, before: str) -> bool:
    """Tell whether the canvas of what the model saw has changed."""
    return pixels(page, "canvas.saw") != before


def set_slider(page: Page, selector: str, value: float) -> None:
    """Move a slider as its user would: set and tell."""
    page.locator(selector).evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input', {bubbles: true})) }", value
    )


def test_drawn_digits_are_read(open_page: Open, shipped: Server) -> None:
    """A 7, a 1 and a 0 drawn with real pointer events are labelled so, with bars, what the model saw, and latency."""
    page = open_page(f"{shipped.url}/#mnist")
    for strokes, label in ((SEVEN, "7"), (ONE, "1"), (ZERO, "0")):
        page.get_by_role("button", name="Clear").click()
        expect_label(page, "?")
        blank = pixels(page, "canvas.saw")
        draw(page, strokes)
        expect_label(page, label)
        assert page.locator(".bars li").count() == 10
        assert page.locator(".bars li.chosen").get_attribute("data-label") == label
        wait_until(partial(is_other, page, blank))
        assert "ms" in page.locator(".latency").inner_text()


def test_undo_takes_back_a_stroke(open_page: Open, shipped: Server) -> None:
    """A 7 with a line through its foot becomes the 7 again; undone once more, the pad is empty."""
    page = open_page(f"{shipped.url}/#mnist")
    draw(page, SEVEN)
    expect_label(page, "7")
    page.wait_for_timeout(300)
    seven = pixels(page, "canvas.pad")
    draw(page, [[(0.1, 0.9), (0.9, 0.9)]])
    assert pixels(page, "canvas.pad") != seven
    page.get_by_role("button", name="Undo").click()
    assert pixels(page, "canvas.pad") == seven
    expect_label(page, "7")
    page.keyboard.press("Control+z")
    expect_label(page, "?")


def test_pad_is_drawn_on_by_keys(open_page: Open, shipped: Server) -> None:
    """With the arrow keys and the space bar alone, a 1 can be drawn."""
    page = open_page(f"{shipped.url}/#mnist")
    page.locator("canvas.pad").focus()
    page.keyboard.press("Space")
    for _ in range(14):
        page.keyboard.press("ArrowDown")
    expect_label(page, "1")


def test_samples_files_and_drops_are_read(open_page: Open, shipped: Server, tmp_path: Path) -> None:
    """The fourth sample is a 3; a photo of a 7, chosen, dropped or pasted, gives a 7."""
    page = open_page(f"{shipped.url}/#mnist")
    page.get_by_role("button", name="Sample 4").click()
    expect_label(page, "3")
    draw(page, SEVEN)
    page.get_by_role("button", name="Clear").click()
    draw(page, SEVEN)
    expect_label(page, "7")
    page.wait_for_timeout(300)
    file = tmp_path / "seven.png"
    file.write_bytes(base64.b64decode(pixels(page, "canvas.pad").partition(",")[2]))
    send = """([kind, data]) => {
        const transfer = new DataTransfer();
        const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
        transfer.items.add(new File([bytes], "seven.png", {type: "image/png"}));
        const event = kind === "drop"
            ? new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true})
            : new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true});
        document.querySelector(".draw").dispatchEvent(event);
    }"""
    data = base64.b64encode(file.read_bytes()).decode()
    for way in ("choose", "drop", "paste"):
        page.get_by_role("button", name="Clear").click()
        expect_label(page, "?")
        if way == "choose":
            page.locator("#file-input").set_input_files(file)
        else:
            page.evaluate(send, [way, data])
        expect_label(page, "7")
    assert "-T 'seven.png'" in page.locator("#wire-text").inner_text()


def test_colour_picture_is_opened(open_page: Open, empty_dir: Path, tmp_path: Path) -> None:
    """A file opened for a model of colour pictures is predicted on, and shown as the model saw it."""
    fakes.write_version(empty_dir, fakes.traffic_light())
    Image.new("RGB", (8, 6), (0, 204, 51)).save(tmp_path / "go.png")
    with Server(empty_dir, "--workers", "1", "--device", "cpu") as server:
        page = open_page(server.url)
        page.locator("#file-input").set_input_files(tmp_path / "go.png")
        expect_label(page, "green")
        seen = page.locator("canvas.saw").evaluate(
            "canvas => [...canvas.getContext('2d').getImageData(0, 0, 1, 1).data]"
        )
    assert seen == [0, 204, 51, 255]


def test_request_and_answer_are_shown_as_sent(open_page: Open, shipped: Server) -> None:
    """The Python that is shown, run as it stands, prints the answer that is shown; curl names the same address."""
    page = open_page(f"{shipped.url}/#logistic-hours")
    page.get_by_role("button", name="Sample: hours 3").click()
    expect_label(page, "pass")
    curl = page.locator("#wire-text").inner_text()
    assert f"'{shipped.url}/v1/models/logistic-hours:predict'" in curl
    assert """-d '{"instances":[{"hours":3}]}'""" in curl
    page.get_by_role("tab", name="curl").press("ArrowRight")
    code = page.locator("#wire-text").inner_text()
    printed = io.StringIO()
    exec(code, {"print": lambda value: printed.write(str(value))})
    page.get_by_role("tab", name="Answer").click()
    probability = str(eval(printed.getvalue())["predictions"][0]["probability"])
    assert f'"probability": {probability}' in page.locator("#wire-text").inner_text()


def test_slider_moves_prediction_and_curve(open_page: Open, shipped: Server) -> None:
    """Moving a slider changes the number, and the point on the curve; a number outside the range is served too."""
    page = open_page(f"{shipped.url}/#linear")
    page.wait_for_selector("svg.curve path.line")
    before = page.locator(".headline").inner_text(), page.locator("svg.curve circle.point").get_attribute("cx")
    set_slider(page, "#feature-0-slider", 2)
    playwright.expect(page.locator("svg.curve circle.point")).not_to_have_attribute("cx", before[1])
    assert float(page.locator(".headline").inner_text()) > float(before[0])
    page.locator("#feature-0").fill("-20")
    playwright.expect(page.locator("svg.curve circle.point")).to_have_count(0)
    assert float(page.locator(".headline").inner_text()) < -500


def test_threshold_moves_label_and_map(open_page: Open, shipped: Server) -> None:
    """The threshold's slider changes the label and the picture; so does a click on the map."""
    page = open_page(f"{shipped.url}/#logistic-clusters")
    painted = "canvas => canvas.getContext('2d').getImageData(160, 160, 1, 1).data[3] === 255"
    wait_for(page, f"() => ({painted})(document.querySelector('canvas.map'))")
    expect_label(page, "upper right")
    before = pixels(page, "canvas.map")
    set_slider(page, "#threshold", 0.05)
    expect_label(page, "lower left")
    wait_for(page, "before => document.querySelector('canvas.map').toDataURL() !== before", before)
    page.locator("canvas.map").click(position={"x": 300, "y": 10})
    expect_label(page, "upper right")
    assert float(page.locator("#feature-0").input_value()) > 3


@pytest.mark.parametrize("model", ["doubler", "coin", "switch", "compass", "canvas"])
def test_every_kind_of_model_has_a_page(model: str, open_page: Open, server: Server) -> None:
    """From the manifest alone, each task and input has its controls, its picture and its card."""
    page = open_page(f"{server.url}/#{model}")
    described = server.get(f"/v1/models/{model}").json()
    assert page.locator("h1").inner_text() == (described["title"] or model)
    card = page.locator("aside").inner_text()
    assert described["provider"] in card
    assert described["artifacts"]["onnx"]["sha256"] in page.locator("aside").text_content()
    if described["input"]["kind"] == "tabular":
        features = described["input"]["features"]
        ranged = all("minimum" in feature for feature in features)
        assert page.locator("input[type=number]").count() == len(features)
        assert page.locator("input[type=range]:not(#threshold)").count() == (len(features) if ranged else 0)
        if ranged:
            page.wait_for_selector("canvas.map, svg.curve path.line")
    assert not page.locator(".problem:visible").count()


def test_model_of_tensors_alone_is_shown(open_page: Open, empty_dir: Path) -> None:
    """A model whose manifest has no task shows its tensors and its card, and a request that is answered."""
    shape = ("INT64", [-1, 8])
    fakes.write_signature(
        empty_dir, "raw", {"ids": shape}, {"same": shape}, helper.make_node("Identity", ["ids"], ["same"])
    )
    with Server(empty_dir, "--workers", "1") as server:
        page = open_page(server.url, ready="main pre")
        playwright.expect(page.locator("main")).to_contain_text("INT64 [-1, 8]")
        playwright.expect(page.locator("main pre")).to_contain_text("curl")
        curl = page.locator("main pre").inner_text()
        assert f"'{server.url}/v2/models/raw/infer'" in curl
        done = subprocess.run(
            ["bash", "-c", f"{curl} --silent"], capture_output=True, text=True, check=True, timeout=30
        )
    assert json.loads(done.stdout)["outputs"][0]["data"] == [0] * 8


def test_older_version_is_one_choice_away(open_page: Open, server: Server) -> None:
    """Choosing a version shows that version's answers."""
    page = open_page(f"{server.url}/#doubler")
    page.locator("#feature-0").fill("2")
    expect_label(page, "5 m")
    page.get_by_label("Version").select_option("1")
    playwright.expect(page.locator("#wire-text")).to_contain_text("versions/1:predict")
    page.locator("#feature-0").fill("2")
    expect_label(page, "4 m")


def test_training_plots_are_shown(open_page: Open, shipped: Server) -> None:
    """The version's plots are on the card, each with a name."""
    page = open_page(f"{shipped.url}/#mnist")
    plots = shipped.get("/v1/models/mnist/card").json()["plots"]
    wait_for(
        page,
        "count => [...document.querySelectorAll('.plots img')].filter((img) => img.naturalWidth > 99).length === count",
        len(plots),
    )
    assert page.get_by_alt_text("Training plot: loss").count() == 1


def test_failures_are_sentences(open_page: Open, shipped: Server, tmp_path: Path) -> None:
    """What the service says, what is in front of it, and silence are all shown as sentences, and then all is well."""
    page = open_page(f"{shipped.url}/#linear")
    problem = page.locator(".result .problem")
    full = {"status": 503, "json": {"error": "the queue is full; try again in a moment"}}
    for answer, words in (
        (lambda route: route.fulfill(**full), "The queue is full; try again in a moment."),
        (lambda route: route.fulfill(status=502, body="<html>"), "The service answered 502 without saying why."),
        (lambda route: route.abort(), "The service does not answer. Is it still running?"),
    ):
        page.route("**/*:predict", answer)
        set_slider(page, "#feature-0-slider", 1)
        playwright.expect(problem).to_have_text(words)
        page.unroute("**/*:predict")
        set_slider(page, "#feature-0-slider", 2)
        playwright.expect(problem).to_be_hidden()


def test_broken_files_are_refused_with_a_sentence(open_page: Open, shipped: Server, tmp_path: Path) -> None:
    """Half a PNG, and a text, are not predicted on."""
    page = open_page(f"{shipped.url}/#mnist")
    file = io.BytesIO()
    Image.new("L", (99, 99), 255).save(file, "PNG")
    for name, content, words in (
        ("half.png", file.getvalue()[:60], "cut short or broken"),
        ("notes.txt", b"seven", "notes.txt is not a PNG"),
    ):
        (tmp_path / name).write_bytes(content)
        page.locator("#file-input").set_input_files(tmp_path / name)
        playwright.expect(page.locator(".result .problem")).to_contain_text(words)
        expect_label(page, "?")
    draw(page, SEVEN)
    expect_label(page, "7")
    playwright.expect(page.locator(".result .problem")).to_be_hidden()


def test_model_that_does_not_serve_says_why(open_page: Open, empty_dir: Path) -> None:
    """A refused model is listed, with the reason; an empty folder is said to be empty."""
    with Server(empty_dir, "--workers", "1") as server:
        page = open_page(server.url, ready=".empty")
        assert "no model" in page.locator(".empty").inner_text()
    fakes.write_version(empty_dir, fakes.liar())
    with Server(empty_dir, "--workers", "1") as server:
        page = open_page(server.url, ready=".problem")
        assert "misses a golden output" in page.locator("main").inner_text()


def test_key_is_asked_for_and_used(open_page: Open, models_dir: Path) -> None:
    """The page loads without the key, asks for it, says that one is wrong, and works with the right one."""
    with Server(models_dir, "--workers", "1", "--api-key", "right") as server:
        assert server.get("/v1/models").status_code == 401
        page = open_page(f"{server.url}/#coin", ready="dialog[open]")
        for key in ("wrong", "right"):
            page.locator("#key-input").fill(key)
            page.get_by_role("button", name="Use this key").click()
            if key == "wrong":
                playwright.expect(page.locator("#key-reason")).to_contain_text("not valid")
        page.get_by_label("a", exact=True).fill("0.5")
        page.get_by_label("b", exact=True).fill("0.5")
        expect_label(page, "tails")
        assert '-H "X-API-Key: $API_KEY"' in page.locator("#wire-text").inner_text()
        assert "right" not in page.locator("#wire-text").inner_text()


def test_docs_ask_for_the_key_and_use_it(open_page: Open, models_dir: Path) -> None:
    """The docs load without the key, ask for it until it is right, and "Try it out" then sends it."""
    with Server(models_dir, "--workers", "1", "--api-key", "right") as server:
        page = open_page(f"{server.url}/docs", ready="dialog[open]")
        assert not axe.Axe().run(page).response["violations"]
        for key in ("wrong", "right"):
            page.locator("#key-input").fill(key)
            page.get_by_role("button", name="Use this key").click()
            if key == "wrong":
                playwright.expect(page.locator("#key-reason")).to_contain_text("not valid")
        assert '"label": "tails"' in try_out(page, "predict_Coin")
        page.goto(server.url)
        page.get_by_role("link", name="API docs").click()
        assert '"name": "coin"' in try_out(page, "describe_Coin")


def test_docs_work_behind_a_path_prefix(open_page: Open, server: Server) -> None:
    """Behind a proxy that adds a path, the docs read the description and send requests under that path."""
    with Prefix(server.url, "/team/models") as url:
        page = open_page(f"{url}docs", ready=".opblock")
        assert not page.locator("#key-dialog").is_visible()
        assert '"label": "tails"' in try_out(page, "predict_Coin")


def try_out(page: Page, operation: str) -> str:
    """Execute an operation of the docs as it is offered, and return what is shown of the answer."""
    block = page.locator(f".opblock[id$=-{operation}]")
    block.locator(".opblock-summary-control").click()
    block.locator(".try-out__btn").click()
    block.locator(".execute").click()
    return str(block.locator(".live-responses-table tbody").inner_text())


def test_page_works_behind_a_path_prefix(open_page: Open, shipped: Server) -> None:
    """Behind a proxy that adds a path, everything loads and predicts under that path."""
    with Prefix(shipped.url, "/team/models") as url:
        page = open_page(f"{url}#mnist")
        draw(page, SEVEN)
        expect_label(page, "7")
        assert f"{url}v1/models/mnist:predict" in page.locator("#wire-text").inner_text()
        assert page.get_by_role("link", name="API docs").evaluate("link => link.href") == f"{url}docs"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1600])
@pytest.mark.parametrize("model", ["mnist", "logistic-clusters", "logistic-hours"])
def test_page_is_accessible_and_fits(model: str, width: int, scheme: str, open_page: Open, shipped: Server) -> None:
    """At both widths, in both schemes, axe finds no violation, and nothing is wider than the window."""
    page = open_page(f"{shipped.url}/#{model}", width, scheme)
    if model == "mnist":
        draw(page, SEVEN)
        expect_label(page, "7")
    else:
        page.wait_for_selector("canvas.map, svg.curve path.line")
    found = axe.Axe().run(page).response["violations"]
    assert not [(each["id"], each["impact"], each["nodes"][0]["html"]) for each in found]
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def test_dialog_is_accessible(open_page: Open, models_dir: Path) -> None:
    """The question for the key has no violation either."""
    with Server(models_dir, "--workers", "1", "--api-key", "right") as server:
        page = open_page(server.url, ready="dialog[open]")
        assert not axe.Axe().run(page).response["violations"]


def test_page_is_small_and_strict(server: Server) -> None:
    """The page's files are a few tens of kilobytes, all its own, under a policy that allows nothing inline."""
    page = server.get("/", headers={"Accept": "text/html"})
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in page.text.replace("http-equiv", "")
    folder = Path(__file__).parents[2] / "service" / "playground"
    files = list(folder.iterdir())
    assert sum(file.stat().st_size for file in files) < 105_000
    for file in files:
        answer = server.get(f"/playground/{file.name}")
        assert (answer.status_code, answer.content) == (200, file.read_bytes())
        assert answer.headers["Content-Security-Policy"] == policy


@pytest.mark.parametrize(
    "path", ["/playground/../app.py", "/playground/%2e%2e/app.py", "/playground/", "/playground/x"]
)
def test_nothing_else_is_served(path: str, server: Server) -> None:
    """No path leads out of the page's folder, and none lists it."""
    assert server.get(path).status_code == 404


@pytest.mark.parametrize("file", ["manifest.json", "model.onnx", "..%2F..%2Fx.png", "none.png", ".png"])
def test_only_plots_are_served(file: str, shipped: Server) -> None:
    """Of a version's folder, its plots alone can be read."""
    assert shipped.get("/v1/models/mnist/versions/1/plots/loss.png").headers["Content-Type"] == "image/png"
    assert shipped.get(f"/v1/models/mnist/versions/1/plots/{file}").status_code == 404
