"""Imports follow the layers, and private names stay within their package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src"

# Each layer may import itself and earlier layers. The trainer is the last package of the pipeline:
# within the pipeline, only its own __init__ imports the trainer.
LAYERS = [
    "robo_orchard_core.utils.strict_json",
    "robo_orchard_core.utils.hook",
    "robo_orchard_core.utils.config",
    "robo_orchard_core",
    "robo_orchard_lab.HOOK_MODULES",
    "robo_orchard_lab.foreign_fields",
    "robo_orchard_lab.metric_mode",
    "robo_orchard_lab.frames",
    "robo_orchard_lab.pipeline",
    "robo_orchard_lab.pipeline.trainer",
    "robo_orchard_lab.utils",
    "robo_orchard_lab.experiment",
    "robo_orchard_lab.data",
    "robo_orchard_lab.policy",
    "robo_orchard_lab.report",
    "robo_orchard_lab.cluster",
    "robo_orchard_lab.sharing",
    "robo_orchard_lab.search",
    "robo_orchard_lab.testing",
    "robo_orchard_lab.cli",
    "robo_orchard_lab",
]
EXPORTS_THE_TRAINER = "robo_orchard_lab.pipeline"

# Public API despite an underscored module name.
DOCUMENTED = {"torch.utils._python_dispatch.TorchDispatchMode"}

LEAST_LINES_FOR_ONE_IMPORTER = 60

FILES = sorted(SRC.rglob("*.py"))


def module_of(file: Path) -> str:
    parts = file.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file) for file in FILES}


def imports_of(file: Path) -> Iterator[str]:
    """Yield the full names of all imports in a file, at any level."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_imported_by(file: Path) -> Iterator[str]:
    """Yield the module of this project behind each import of a file."""
    for name in imports_of(file):
        owner = name if name in MODULES else name.rpartition(".")[0]
        if owner in MODULES:
            yield owner


def strongly_connected(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of a graph, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            start = stack.index(node)
            components.append(stack[start:])
            del stack[start:]

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return components


def layer_of(name: str) -> int | None:
    """Return the layer of a module or a name in a module; None for other distributions."""
    within = [layer for layer in LAYERS if name == layer or name.startswith(layer + ".")]
    return LAYERS.index(max(within, key=len)) if within else None


def package_of(module: str) -> str:
    """Return the package of a module; a package is its own."""
    is_package = any(other.startswith(module + ".") for other in MODULES)
    return module if is_package else module.rpartition(".")[0]


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_imports_follow_the_layers(file: Path) -> None:
    """A module imports only from its own layer and earlier layers."""
    own = layer_of(module_of(file))
    assert own is not None, f"{module_of(file)} has no layer; give it its place in LAYERS"
    for name in imports_of(file):
        layer = layer_of(name)
        if module_of(file) == EXPORTS_THE_TRAINER:
            continue
        assert layer is None or layer <= own, f"{module_of(file)} imports {name}"


def test_no_modules_import_each_other() -> None:
    """The graph of imports, including function-level imports, has no cycle."""
    graph = {module_of(file): set(modules_imported_by(file)) - {module_of(file)} for file in FILES}
    cycles = [set(found) for found in strongly_connected(graph) if len(found) > 1]
    assert cycles == []


def test_no_small_module_has_a_single_importer() -> None:
    """A module that one other module imports has at least 60 lines, or belongs into that module."""
    importers: dict[str, set[str]] = {module: set() for module in MODULES}
    for file in FILES:
        for module in set(modules_imported_by(file)) - {module_of(file)}:
            importers[module].add(module_of(file))
    small = [
        module_of(file)
        for file in FILES
        if file.name != "__init__.py"
        and len(importers[module_of(file)]) == 1
        and len(file.read_text(encoding="utf-8").splitlines()) < LEAST_LINES_FOR_ONE_IMPORTER
    ]
    assert small == []


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_private_names_are_imported_only_within_their_package(file: Path) -> None:
    """Names with a leading underscore are imported only within their own package."""
    for name in set(imports_of(file)) - DOCUMENTED:
        parts = name.split(".")
        for depth, part in enumerate(parts):
            if part.startswith("_") and part != "__future__":
                owner = ".".join(parts[:depth])
                owner = (
                    owner
                    if owner in MODULES and package_of(owner) == owner
                    else (owner.rpartition(".")[0])
                )
                assert package_of(module_of(file)) == owner, f"{module_of(file)} imports {name}"


@pytest.mark.parametrize(
    "file",
    [file for file in FILES if module_of(file).startswith("robo_orchard_core")],
    ids=module_of,
)
def test_core_knows_no_framework(file: Path) -> None:
    """The core package imports neither torch nor accelerate nor the lab package."""
    roots = {name.split(".")[0] for name in imports_of(file)}
    assert not roots & {"torch", "accelerate", "robo_orchard_lab"}
