"""`python -m tests.mutants`: change the service's code in one place, and see whether its tests notice; again and again.

The changes are made in a copy of the repository. Each is tried in a process that is forked after the slow imports, by
the fast tests of the module that is changed. What survives is printed; some of it changes nothing that can be seen.

Left out, since they tell nothing about the tests: calls of which only a log line or a counter tells; what abstract
methods raise; a number of a module's constant (`NAME = 256`) made larger by one, for a test could only repeat it; and
what `__init__` sets, left unset, for either nothing works without it or it only declares the attribute.
"""

import argparse
import ast
import contextlib
import gc
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import ROOT

HTTP_TESTS = ("test_http_connection", "test_protocol", "test_http_head", "test_http_conformance", "test_fuzz_corpus")
TESTS = {
    "service/request.py": ("test_request", "test_app"),
    "service/model/batching.py": ("test_batching", "test_request"),
    "service/registry/coordination.py": ("test_coordination", "test_reconciler"),
    "service/http/protocol.py": HTTP_TESTS,
    "service/http/connection.py": HTTP_TESTS,
}
SLOW = (
    "torch", "onnx", "onnxruntime", "numpy", "numpy.testing", "hypothesis", "pytest", "xdist", "starlette.applications",
    "pydantic", "simdjson", "httptools", "orjson", "prometheus_client", "PIL.Image",
)  # fmt: skip
_SWAPPED: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
}  # fmt: skip
_IGNORED = ("logger", "record_", "NotImplementedError")


def main() -> int:
    """Print a line for each survivor, and the score; return 1 below `--least`."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("module", nargs="*", metavar="MODULE", help=f"of {', '.join(TESTS)}; default: all")
    parser.add_argument("--sample", type=int, default=150, help="changes of each module (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which (default: %(default)s)")
    parser.add_argument("--least", type=float, default=0.0, help="percentage that must be noticed")
    flags = parser.parse_args()
    scores = []
    for name in SLOW:
        __import__(name)
    gc.freeze()  # so that no child looks through all of it again
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
        for file in filter(None, files):
            (copy / os.fsdecode(file)).parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                shutil.copy2(ROOT / os.fsdecode(file), copy / os.fsdecode(file))
        for module in flags.module or TESTS:
            scores.append(_run(copy, module, flags.sample, flags.seed))
    return int(min(scores) < flags.least)


def _run(copy: Path, module: str, sample: int, seed: int) -> float:
    """Try changes of one module, and return the percentage that is noticed."""
    source, path = (ROOT / module).read_text(), copy / module
    began = time.monotonic()
    if _is_noticed(copy, module, 120):
        raise SystemExit(f"the tests of {module} fail without a change")
    patience = 10 + 5 * (time.monotonic() - began)
    found = list(find_changes(source))
    chosen = sorted(random.Random(seed).sample(range(len(found)), min(sample, len(found))))
    survivors = 0
    for index in chosen:
        line, what, changed = found[index]
        path.write_text(changed)
        if not _is_noticed(copy, module, patience):
            survivors += 1
            print(f"{module}:{line}: {what}", flush=True)
    path.write_text(source)
    score = 100 * (1 - survivors / len(chosen))
    print(f"{module}: {len(chosen)} of {len(found)} changes, {survivors} unnoticed, {score:.1f} % noticed", flush=True)
    return score


def _is_noticed(copy: Path, module: str, seconds: float) -> bool:
    """Run a module's tests in a child; tell whether they fail, or do not end."""
    child = os.fork()
    if child == 0:
        try:
            _run_tests(copy, module)
        finally:
            os._exit(1)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status != 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def _run_tests(copy: Path, module: str) -> None:
    """Run a module's tests in this process, and end it with their exit code."""
    os.setsid()
    os.chdir(copy)
    sys.path[:] = [str(copy), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "service")]:
        del sys.modules[name]
    sys.dont_write_bytecode = True
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    files = [f"tests/service/{name}.py" for name in TESTS[module]]
    # Without the plugins that are installed, and explanations that nobody reads, which take most of the time.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    flags = ("-x", "-q", "-o", "addopts=", "--assert=plain", "-p", "no:cacheprovider")
    os._exit(int(any(pytest.main([*flags, file]) for file in files)))


def find_changes(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield every change of a module: its line, what it is, and the source with it."""
    whole = ast.parse(source)
    left_out = set(_list_left_out(whole))
    for index in (index for index, node in enumerate(ast.walk(whole)) if node not in left_out):
        for way in range(2):
            tree = ast.parse(source)
            node = next(each for position, each in enumerate(ast.walk(tree)) if position == index)
            if not isinstance(node, ast.expr | ast.stmt):
                break
            before = ast.unparse(node)
            if _change(tree, node, way):
                changed = ast.unparse(ast.fix_missing_locations(tree))
                shown = before.splitlines()[0][:80]
                yield node.lineno, f"{shown}  [{type(node).__name__} {way}]", changed


def _list_left_out(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the numbers of the module's constants, and the statements of `__init__` that set an attribute."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign):
            yield from (node for node in ast.walk(statement.value) if isinstance(node, ast.Constant))
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.name == "__init__":
            yield from (node for node in function.body if isinstance(node, ast.Assign))


def _change(tree: ast.Module, node: ast.AST, way: int) -> bool:
    """Change a node in place; tell whether there is such a change."""
    match node:
        case ast.Compare() if way == 0 and type(node.ops[0]) in _SWAPPED:
            node.ops[0] = _SWAPPED[type(node.ops[0])]()
        case ast.BoolOp() | ast.BinOp() if way == 0 and type(node.op) in _SWAPPED:
            node.op = _SWAPPED[type(node.op)]()
        case ast.Constant(value=bool()) if way == 0:
            node.value = not node.value
        case ast.Constant(value=int() | float() as number) if way == 0:
            node.value = number + 1
        case ast.If() | ast.While() | ast.IfExp():
            node.test = ast.UnaryOp(ast.Not(), node.test) if way == 0 else ast.Constant(False)
        case ast.Return(value=ast.expr()) if way == 0:
            node.value = ast.Constant(None)
        case ast.Expr(value=ast.Call() | ast.Await()) | ast.AugAssign() | ast.Raise() | ast.Break() | ast.Continue():
            return way == 0 and not any(word in ast.unparse(node) for word in _IGNORED) and _replace(tree, node)
        case ast.Assign() if way == 0 and isinstance(node.targets[0], ast.Attribute):
            return _replace(tree, node)
        case _:
            return False
    return True


def _replace(tree: ast.Module, node: ast.AST) -> bool:
    """Put `pass` in a statement's place."""
    for parent in ast.walk(tree):
        for body in (getattr(parent, name, None) for name in ("body", "orelse", "finalbody")):
            if isinstance(body, list) and node in body:
                body[body.index(node)] = ast.Pass()
                return True
    return False


if __name__ == "__main__":
    sys.exit(main())
