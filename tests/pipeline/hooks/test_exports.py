"""Lazy exports of the hooks package."""

import ast
import inspect
import subprocess
import sys

import pytest

from robo_orchard_lab.pipeline import hooks


def test_exports_are_defined_in_submodules() -> None:
    """Each exported name comes from a module of the package."""
    for name in hooks.__all__:
        found = getattr(hooks, name)
        assert found.__name__ == name
        assert inspect.getmodule(found).__name__.startswith(hooks.__name__ + ".")  # type: ignore[union-attr]


def test_type_checkers_see_the_same_names() -> None:
    """The imports for type checkers list each exported name with its module."""
    tree = ast.parse(inspect.getsource(hooks))
    imported = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
        if node.module.startswith(hooks.__name__)
    }
    assert imported == {name: getattr(hooks, name).__module__ for name in hooks.__all__}


def test_unknown_name_is_an_attribute_error() -> None:
    """An unknown name raises the usual error of a module."""
    with pytest.raises(AttributeError, match=r"pipeline\.hooks' has no attribute 'Missing'"):
        _ = hooks.Missing  # type: ignore[attr-defined]  # as type checkers know, too


def test_trainer_does_not_import_all_hooks() -> None:
    """Importing the trainer does not import unused hooks or rich."""
    program = (
        "import sys; from robo_orchard_lab.pipeline import HookBasedTrainer; "
        "print([name for name in sys.modules if 'pipeline.hooks.' in name or name == 'rich'])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert "optimizer" in loaded
    assert "ema" not in loaded
    assert "rich" not in loaded
