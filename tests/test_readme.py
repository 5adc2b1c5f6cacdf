"""README.md and the pages that it leads to are run: their commands, snippets and tables are what the program does."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from service import errors
from service.api import openapi
from service.errors import ClientClosedError, ModelRefusedError, ServiceError, StartError
from service.settings import Settings, variable
from tests.servers import ROOT, Server, clean_environment
from training.__main__ import AUTOGRAD
from training.__main__ import build_parser as training_parser
from training.recipes import RECIPES

PAGES = (
    "README.md",
    *(f"docs/{name}.md" for name in ("api", "settings", "own-model", "docker", "operations", "layout")),
)
README = "\n".join((ROOT / page).read_text() for page in PAGES)
ADDRESS = "http://127.0.0.1:8000"
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def shipped(published: Path) -> Iterator[Server]:
    """What `make serve` starts, on a free port."""
    with Server(published, "--workers", "1") as running:
        yield running


def blocks(language: str, part: str) -> list[str]:
    """Return the code blocks of a language that contain a text."""
    return [text for kind, text in BLOCKS if kind == language and part in text]


def block_after(block: str) -> str:
    """Return the code block that follows another."""
    texts = [text for _, text in BLOCKS]
    return texts[texts.index(block) + 1]


def table(heading: str) -> list[list[str]]:
    """Return the cells of the table that begins with a row of these headings, without that row."""
    lines = README[README.index(f"\n{heading}\n") + 1 :].splitlines()
    rows = []
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def run(command: list[str] | str, folder: Path, text: str | None = None) -> str:
    """Run a command as a reader would and return its output; `python` is the one that runs the tests."""
    environment = clean_environment()
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        command,
        shell=isinstance(command, str),
        input=text,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_curl_has_the_answer_shown(shipped: Server) -> None:
    """The curl answers exactly what stands below it, numbers within float32's last digit."""
    (command,) = blocks("sh", "curl -s")
    answer, shown = (
        json.loads(text) for text in (run(command.replace(ADDRESS, shipped.url), ROOT), block_after(command))
    )
    assert list(answer) == list(shown)
    assert (answer["model"], answer["version"]) == (shown["model"], shown["version"])
    for real, written in zip(answer["predictions"], shown["predictions"], strict=True):
        assert list(real) == list(written)
        assert (real["prediction"], real["label"]) == (written["prediction"], written["label"])
        assert real["probabilities"] == pytest.approx(written["probabilities"], abs=1e-6)
        assert real["probability"] == pytest.approx(written["probability"], abs=1e-6)


def test_python_example_prints_what_is_shown(shipped: Server, tmp_path: Path) -> None:
    """The examples, without any package and with the client, run as they stand and print the lines below them."""
    for part in ("urlopen", "model_service"):
        (program,) = blocks("python", part)
        assert run([sys.executable, "-c", program.replace(ADDRESS, shipped.url)], tmp_path) == block_after(program)


def test_own_model_is_served_as_described(tmp_path: Path) -> None:
    """The scikit-learn example and the package command, run in an empty folder, make a model that serves."""
    (program,) = blocks("python", "skl2onnx")
    run([sys.executable, "-W", "ignore", "-c", program], tmp_path)
    command = blocks("sh", "service package")[-1]
    assert "served as iris version 1" in run(command, tmp_path)
    own = [line for line in commands("service init") if " serve " not in line]
    assert len(own) == 3
    printed = "".join(run(line, tmp_path) for line in own)
    assert "made my-models/" in printed
    assert "ranges are unknown" not in printed
    assert printed.splitlines()[-1].endswith(" 0 failed")
    with Server(tmp_path / "models", "--workers", "1") as server:
        answer = server.predict("iris", [[5.1, 3.5, 1.4, 0.2]]).json()
    assert answer["predictions"][0]["label"] == "setosa"


def commands(part: str) -> list[str]:
    """Return the commands of the first shell block with a text, without their comments."""
    lines = blocks("sh", part)[0].replace("\\\n", " ").splitlines()
    return [line.partition("  # ")[0].strip() for line in lines]


def test_commands_for_operators_work(shipped: Server) -> None:
    """`verify`, `models list` and the `predict` pipe run as they stand, in the registry."""
    verify = blocks("sh", "service verify")[-1]
    assert run(verify, ROOT).splitlines()[-1].endswith(" 0 failed")
    listing, predict, docker, bench = commands("service models list")
    assert "mnist" in run(f"{listing} --url {shipped.url}", ROOT)
    assert json.loads(run(predict.partition("    #")[0], ROOT))["model"] == "logistic-hours"
    assert docker.startswith("docker compose up")
    assert bench.startswith("make bench")


def test_first_page_is_short_and_its_pictures_are_small() -> None:
    """README.md has at most 150 lines, and its moving picture at most 400 kB."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert len(pictures) == 2
    assert sum((ROOT / picture).stat().st_size for picture in pictures) < 400_000


def test_every_command_named_exists() -> None:
    """Each `make` target is in the Makefile; each `python -m` command and flag is one of the program's."""
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for command in re.findall(r"python -m training (\S+)`", README):
        assert command in ("--list", AUTOGRAD, *RECIPES), command
    known = training_parser().format_help()
    for action in ("serve", "verify", "predict", "package", "init"):
        known += run([sys.executable, "-m", "service", action, "--help"], ROOT)
    own = "\n".join(line for line in README.splitlines() if "docker " not in line and "make bench" not in line)
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", own)):
        assert flag in known, flag


def read_tree() -> set[str]:
    """Return every path in the annotated tree, folders with a slash at the end."""
    (tree,) = blocks("text", "service/")
    drawn: set[str] = set()
    parents: list[str] = []
    for line in tree.splitlines():
        entry, _, phrase = line.strip().partition(" ")
        assert phrase.strip(), f"{entry} has no phrase"
        depth = (len(line) - len(line.lstrip())) // 2
        path = "".join(parents[:depth]) + entry
        assert path not in drawn, f"{path} is listed twice"
        drawn.add(path)
        parents[depth:] = [entry]
    return drawn


def test_tree_is_the_repository() -> None:
    """Every entry of the tree exists; it has everything at the top level and every package of service/."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = [Path(line) for line in run(command, ROOT).splitlines() if (ROOT / line).exists()]
    folders = {f"{parent}/" for file in files for parent in file.parents[:-1]}
    drawn = read_tree()
    assert drawn <= folders | {str(file) for file in files}
    top_level = {f"{file.parts[0]}/" if len(file.parts) > 1 else str(file) for file in files}
    packages = {folder for folder in folders if folder.startswith("service/") and "demo/" not in folder[:-1]}
    assert top_level | packages <= drawn


def settings_rows() -> list[str]:
    """Return the rows of the settings table as they should stand."""
    rows = []
    for name, field in Settings.model_fields.items():
        default = "none" if field.default in (None, "") else f"`{field.default}`"
        rows.append(f"| `--{name.replace('_', '-')}` | `{variable(name)}` | {default} | {field.description} |")
    return rows


def test_settings_table_is_the_settings() -> None:
    """The table has every setting with its flag, variable, default and meaning, in order."""
    shown = ["| " + " | ".join(row).rstrip("| ") + " |" for row in table("| flag | environment | default | meaning |")]
    assert shown == settings_rows()


def test_error_table_is_the_errors() -> None:
    """The table has every status that an error is answered with, in the words of the OpenAPI document."""
    shown = {status: meaning.rstrip("| ") for status, meaning in table("| status | when |")}
    assert shown == openapi._ERRORS
    never = (ServiceError, ClientClosedError, ModelRefusedError, StartError)
    answered = {
        str(int(found.status))
        for found in vars(errors).values()
        if isinstance(found, type) and issubclass(found, ServiceError) and found not in never
    }
    assert answered == set(shown)


def test_links_lead_somewhere() -> None:
    """Every relative link of the pages is to a file that exists, and the index of docs/ has every page."""
    for name in (*PAGES, "CHANGELOG.md", "docs/README.md"):
        for target in re.findall(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)", (ROOT / name).read_text()):
            assert (ROOT / name).parent.joinpath(target).exists(), (name, target)
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name


def test_no_command_is_cut() -> None:
    """Every shell block is one that a shell can read."""
    for _, text in [block for block in BLOCKS if block[0] == "sh"]:
        assert shlex.split(text.replace("\\\n", " "))
