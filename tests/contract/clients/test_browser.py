"""Web pages of other sites, in a real browser: Debian's chromium, driven by Playwright."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.servers import Server

playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright, of the dev extra")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium; apt-get install chromium")
REBOUND = "evil.example"  # a name that its owner makes resolve to this machine
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", f"--host-resolver-rules=MAP {REBOUND} 127.0.0.1"]
SEND = """async ([url, options]) => {
    try {
        const answer = await fetch(url, {method: "POST", body: '{"instances": [[2]]}', ...options});
        return [answer.status, await answer.text()];
    } catch (error) {
        return [0, String(error)];
    }
}"""


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Write nothing."""


@contextmanager
def serve_page(folder: Path) -> Iterator[str]:
    """Serve an empty page, and yield its origin."""
    (folder / "index.html").write_text("<!doctype html><title>Another site</title>")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as site:
        Thread(target=site.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{site.server_port}"
        site.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One browser for this module."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def test_other_sites_cannot_call_and_allowed_ones_can(browser: Any, models_dir: Path, tmp_path: Path) -> None:
    """A foreign page's request is refused, an allowed page reads its answer, and another host name is refused."""
    foreign, allowed = tmp_path / "foreign", tmp_path / "allowed"
    foreign.mkdir()
    allowed.mkdir()
    with serve_page(foreign) as bad, serve_page(allowed) as good:
        flags = ("--workers", "1", "--cors-origin", good)
        with Server(models_dir, *flags, environment={"SERVICE_ALLOWED_HOSTS": ""}) as server:
            page = browser.new_page()
            url = f"{server.url}/v1/models/doubler:predict"

            def send(site: str, **options: Any) -> tuple[int, str]:
                page.goto(site)
                status, text = page.evaluate(SEND, [url, options])
                return status, text

            form = {"Content-Type": "application/x-www-form-urlencoded"}
            assert send(bad, mode="no-cors", headers=form)[0] == 0  # the page may not even see the refusal
            assert send(bad, headers={"Content-Type": "application/json"})[0] == 0  # its preflight is refused
            before = server.log().count(" 403 ")
            assert before >= 1
            status, text = send(good, headers={"Content-Type": "application/json", "X-API-Key": "any"})
            assert (status, '"prediction":5.0' in text) == (200, True)
            assert send(f"{server.url}/docs", headers=form)[0] == 200
            rebound = server.url.replace("127.0.0.1", REBOUND)
            assert page.goto(rebound).status == 403
            assert page.evaluate(SEND, ["/v1/models/doubler:predict", {"headers": form}])[0] == 403
            answered = [line for line in server.log().splitlines() if "POST /v1/models/doubler:predict 200 " in line]
            assert len(answered) == 2, server.log()
            page.close()
