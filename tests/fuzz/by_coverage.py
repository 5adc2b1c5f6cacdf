"""`python -m tests.fuzz.by_coverage`: atheris (https://github.com/google/atheris) on each target, with a kept corpus.

The corpus in `corpus/` has an input a line, in base64; every test run replays it. `--save` adds what is new, as little
as covers the same lines. A finding is printed as a line that can be added by hand.
"""

import argparse
import base64
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from tests.servers import ROOT

CORPUS = Path(__file__).with_name("corpus")
NAMES = ("http", "v1", "v2", "v2-binary", "pictures", "coding", "head")
MAX_LENGTH = 4096
_FINAL = re.compile(r"stat::number_of_executed_units: *(\d+)")
_COVERED = re.compile(r"cov: (\d+) ft: (\d+)")
_OWN = str(ROOT / "service")


def main() -> int:
    """Fuzz the targets in turn; return 1 if something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.by_coverage", description=__doc__)
    parser.add_argument("target", nargs="*", metavar="TARGET", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--seconds", type=int, default=600, help="in all (default: %(default)s)")
    parser.add_argument("--save", action="store_true", help="add what is new to the corpus")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of the process that fuzzes one
    flags = parser.parse_args()
    targets = flags.target or NAMES
    if flags.folder:
        _fuzz(targets[0], flags.folder, flags.seconds)
    return max(_run(name, flags.seconds // len(targets), flags.save) for name in targets)


def load_corpus(name: str) -> list[bytes]:
    """Return the kept inputs of a target."""
    return [base64.b64decode(line) for line in (CORPUS / f"{name}.txt").read_text().splitlines()]


def _fuzz(name: str, folder: Path, seconds: int) -> None:
    """Fuzz one target in this process, which ends with it."""
    import atheris  # noqa: PLC0415 - not needed to replay, and not there for every Python

    with atheris.instrument_imports(include=["service"]):
        from tests.fuzz.targets import TARGETS  # noqa: PLC0415 - instrumented as it is imported

    limits = [f"-max_total_time={seconds}", f"-max_len={MAX_LENGTH}", "-timeout=20", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={folder}-found-", str(folder)], TARGETS[name])
    atheris.Fuzz()


def _run(name: str, seconds: int, saves: bool) -> int:
    """Fuzz one target in a process of its own, and print what came of it."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / name
        folder.mkdir()
        for index, data in enumerate(load_corpus(name)):
            (folder / f"{index:05}").write_bytes(data)
        command = [sys.executable, "-m", "tests.fuzz.by_coverage", name, f"--seconds={seconds}", f"--folder={folder}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
        found = [path.read_bytes() for path in Path(root).glob("*-found-[!s]*")]  # slow inputs are no findings
        executed, covered = _FINAL.search(done.stderr), _COVERED.findall(done.stderr)
        if executed is None and not found:
            print(done.stdout, done.stderr, sep="\n")
            return 1
        edges, features = covered[-1] if covered else ("?", "?")
        count = executed[1] if executed else "?"
        size = len(list(folder.iterdir()))
        print(f"{name}: {count} executions, {edges} edges, {features} features, {size} inputs, {len(found)} findings")
        for data in found:
            print(done.stdout[-2000:], base64.b64encode(data).decode(), sep="\n")
        sys.stdout.flush()
        if saves and not found:
            _save(name, (path.read_bytes() for path in folder.iterdir()))
        return int(bool(found))


def _save(name: str, inputs: Iterable[bytes]) -> None:
    """Keep the inputs of the corpus, and of the rest the shortest that reach lines no other does."""
    from tests.fuzz.targets import TARGETS  # noqa: PLC0415 - imports torch, which the parent of the fuzzer need not

    kept = load_corpus(name)
    reached: set[Any] = set()
    for data in kept:
        reached |= trace(TARGETS[name], data)
    for data in sorted(inputs, key=lambda each: (len(each), each)):
        new = trace(TARGETS[name], data) - reached
        if new:
            kept.append(data)
            reached |= new
    (CORPUS / f"{name}.txt").write_text("".join(f"{base64.b64encode(data).decode()}\n" for data in kept))


def trace(run: Callable[[bytes], None], data: bytes) -> set[tuple[str, int, int]]:
    """Return the steps from line to line of the service's code that an input takes."""
    steps: set[tuple[str, int, int]] = set()
    last: dict[FrameType, int] = {}

    def step(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_OWN):
            return None
        steps.add((frame.f_code.co_filename, last.get(frame, 0), frame.f_lineno))
        last[frame] = frame.f_lineno
        if event == "return":
            last.pop(frame, None)
        return step

    before = sys.gettrace()
    sys.settrace(step)
    try:
        run(data)
    finally:
        sys.settrace(before)
    return steps


if __name__ == "__main__":
    sys.exit(main())
