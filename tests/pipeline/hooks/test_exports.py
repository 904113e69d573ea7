"""Hooks are imported by name, from files that are loaded when they are asked for."""

import ast
import inspect
import subprocess
import sys

import pytest

from robo_orchard_lab.pipeline import hooks


def test_each_exported_name_is_found_in_its_own_file() -> None:
    """What the package lists is what it hands out, from a module within it."""
    for name in hooks.__all__:
        found = getattr(hooks, name)
        assert found.__name__ == name
        assert inspect.getmodule(found).__name__.startswith(hooks.__name__ + ".")  # type: ignore[union-attr]


def test_type_checkers_see_the_same_names() -> None:
    """The imports for type checkers list each exported name once, from its own module."""
    tree = ast.parse(inspect.getsource(hooks))
    imported = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
        if node.module.startswith(hooks.__name__)
    }
    assert imported == {name: getattr(hooks, name).__module__ for name in hooks.__all__}


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    """A name that the package lacks is told as of any module."""
    with pytest.raises(AttributeError, match=r"pipeline\.hooks' has no attribute 'Missing'"):
        _ = hooks.Missing  # type: ignore[attr-defined]  # as type checkers know, too


def test_the_trainer_does_not_load_all_hooks() -> None:
    """Importing the trainer leaves out hooks that it doesn't use, and what they stand on."""
    program = (
        "import sys, robo_orchard_lab.pipeline; "
        "print([name for name in sys.modules if 'pipeline.hooks.' in name or name == 'rich'])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert "optimizer" in loaded
    assert "ema" not in loaded
    assert "rich" not in loaded
