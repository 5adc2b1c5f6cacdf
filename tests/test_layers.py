"""The layers: who may import whom. A module imports from its own layer and from those below it, never from above."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import ROOT

LAYERS = (
    ("service.__main__",),
    ("service.cli",),
    ("service.hosts",),
    ("service.http", "service.grpc"),
    ("service.app",),
    ("service.request",),
    ("service.api", "service.packaging"),
    ("service.registry",),
    ("service.model",),
    ("service.telemetry",),
    ("service.settings", "service.runtime_folder"),
    ("service.errors",),
)
"""From the top to the bottom; packages of one layer know nothing of each other."""
TRAINING_MAY_USE = ("service.model", "service.packaging", "service.errors")
MODULES = [*ROOT.glob("service/**/*.py"), *ROOT.glob("training/**/*.py")]


def name_module(file: Path) -> str:
    """Return the dotted name of a module, or of a package for its `__init__`."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def list_imports(file: Path) -> Iterator[str]:
    """Return the dotted names that a module imports, anywhere in it, other than for its types alone."""
    tree = ast.parse(file.read_text())
    for_types = {
        each
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for each in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def find_layer(name: str) -> tuple[int, str]:
    """Return a module's layer, 0 at the top, and which package of the layer it is in."""
    for index, packages in enumerate(LAYERS):
        for package in packages:
            if name == package or name.startswith(f"{package}."):
                return index, package
    raise AssertionError(f"{name} is in no layer")


def is_allowed(importer: str, imported: str) -> bool:
    """Tell whether one module may import another."""
    if importer.startswith("training"):
        return imported.startswith(TRAINING_MAY_USE)
    here, there = find_layer(importer), find_layer(imported)
    return here == there or here[0] < there[0]


@pytest.mark.parametrize("file", MODULES, ids=name_module)
def test_imports_point_downwards(file: Path) -> None:
    """No module of the service imports from a layer above, and training only what it may use."""
    importer = name_module(file)
    if importer == "service":
        assert not list(list_imports(file))
        return
    for imported in list_imports(file):
        if imported.startswith("service.") and imported != "service.__version__":
            assert is_allowed(importer, imported), f"{importer} imports {imported}"
        assert not imported.startswith("training") or importer.startswith("training")
        if importer.startswith("service.") and imported.partition(".")[0] == "torch":
            assert importer.startswith("service.model.backends."), f"{importer} imports torch"


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("service.model.batching", "service.registry.registry"),
        ("service.api.v1.decode", "service.request"),
        ("service.telemetry.metrics", "service.model.manifest"),
        ("service.packaging.package", "service.api.headers"),
        ("training.publish", "service.registry.model_folder"),
    ],
)
def test_imports_upwards_are_found(importer: str, imported: str) -> None:
    """The rule refuses what it is there to refuse."""
    assert not is_allowed(importer, imported)
