"""Names of the code in docstrings and annotations, as links to the public names.

A docstring refers to names as its module knows them, for example to a class by its short name; an
annotation refers to the module that defines a class. Both are found here among the exported names
and the errors. Docstrings in Google's style become fields of reStructuredText.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from functools import cache
from typing import Any

from docutils import nodes
from pydantic import BaseModel
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.napoleon import Config, GoogleDocstring

from robo_orchard_lab.experiment.inspection import fields_of

ROOTS = ("robo_orchard_core", "robo_orchard_lab")
_NAPOLEON = Config(napoleon_use_rtype=False, napoleon_use_ivar=True)


@cache
def modules() -> tuple[Any, ...]:
    """Import and return all modules of the packages."""
    found = []
    for root in ROOTS:
        package = importlib.import_module(root)
        found += [
            importlib.import_module(module.name)
            for module in pkgutil.walk_packages(package.__path__, f"{root}.")
            if not module.name.endswith("__main__")
        ]
    return tuple(found)


def public_modules() -> Iterator[Any]:
    """Return the modules that export names."""
    return (module for module in modules() if hasattr(module, "__all__"))


@cache
def exported() -> dict[str, Any]:
    """Return all exported objects by public name.

    A class or function that several modules export, or that has an alias, is there once: by its
    own name in the outermost module.
    """
    found: dict[str, Any] = {}
    names: dict[int, str] = {}
    for module in sorted(public_modules(), key=lambda module: module.__name__.count(".")):
        by_own_name = sorted(
            module.__all__,
            key=lambda name: getattr(getattr(module, name), "__name__", name) != name,
        )
        for name in by_own_name:
            value, public = getattr(module, name), f"{module.__name__}.{name}"
            has_identity = isinstance(value, type) or inspect.isfunction(value)
            if not has_identity or names.setdefault(id(value), public) == public:
                found[public] = value
    return found


def public_name(value: Any) -> str | None:
    """Return the public name of a class or function, or None."""
    return next((name for name, each in exported().items() if each is value), None)


@cache
def error_classes() -> dict[str, type[BaseException]]:
    """Return the classes of errors that the packages define, by name."""
    found = {}
    for module in modules():
        for value in vars(module).values():
            is_error = isinstance(value, type) and issubclass(value, BaseException)
            if is_error and value.__module__.startswith(ROOTS) and value.__name__[0] != "_":
                found[value.__name__] = value
    return dict(sorted(found.items()))


@cache
def _by_other_names() -> dict[str, str]:
    """Return public names by definition (``module.Class``) and by short name, if unique."""
    found: dict[str, str] = {}
    short: dict[str, list[str]] = {}
    for public, value in exported().items():
        short.setdefault(public.rpartition(".")[2], []).append(public)
        if isinstance(value, type) or inspect.isfunction(value):
            found[f"{value.__module__}.{value.__qualname__}"] = public
            found[f"{inspect.getmodule(value).__name__}.{value.__qualname__}"] = public  # type: ignore[union-attr]
    for module in modules():
        for name, value in vars(module).items():
            if isinstance(value, type) and (public := found.get(f"{value.__module__}.{name}")):
                found[f"{module.__name__}.{name}"] = public
    return {name: names[0] for name, names in short.items() if len(names) == 1} | found


@cache
def _internal_names() -> frozenset[str]:
    """Return all names of modules and attributes of classes, also those that are not public."""
    found: set[str] = set()
    for module in modules():
        found |= {*vars(module)}
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__.startswith(ROOTS):
                found |= {*vars(value), *getattr(value, "__annotations__", ())}
    return frozenset(found)


def _resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.TextElement
) -> nodes.Node | None:
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    holder, _, member = target.rpartition(".")
    known = _by_other_names()
    public = known.get(target) or (f"{known[holder]}.{member}" if holder in known else None)
    if public is not None and public != target:
        found = env.domains.python_domain.resolve_xref(
            env, node["refdoc"], app.builder, "obj", public, node, contnode
        )
        if found is not None:
            return found
    if member in error_classes():
        return env.domains.standard_domain.resolve_xref(
            env, node["refdoc"], app.builder, "error", member, node, contnode
        )
    is_text = node["reftype"] == "obj"  # in single backticks, as for arguments
    is_internal = target.startswith(ROOTS) or member in _internal_names()
    return contnode if is_text or is_internal else None


def _accept_existing(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.TextElement
) -> nodes.Node | None:
    """Show a name of another project without a link if it exists; others are warnings."""
    module, _, name = node["reftarget"].rpartition(".")
    if node.get("refdomain") != "py" or not module:
        return None
    try:
        pkgutil.resolve_name(f"{module}:{name}")
    except (ImportError, AttributeError, ValueError):
        return None
    return contnode


def _fields_from_sections(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Convert sections such as ``Args:``; add the fields of a config."""
    if what in ("module", "class", "exception", "function", "method", "property"):
        arguments = (_NAPOLEON, app, what, name, obj, options)
        if what != "property":  # a first line "Loss: the sum" would be a type
            lines[:] = GoogleDocstring(lines, *arguments).lines()
    if isinstance(obj, type) and issubclass(obj, BaseModel):
        lines.append("")
        for field in fields_of(obj):
            text = field.description.replace("*", "\\*") or "See the class."
            lines.append(f":param {field.path}: {text}")


def _signature_of_config(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, None] | None:
    """Return the fields of a config and their defaults; pydantic's types are unreadable."""
    if what == "class" and getattr(obj, "_is_protocol", False):
        return "", None
    if what != "class" or not issubclass(obj, BaseModel):
        return None
    fields = [field for field in fields_of(obj) if "." not in field.path]
    texts = [f.path if f.default is None else f"{f.path}={_python(f.default)}" for f in fields]
    return f"({', '.join(['*', *texts]) if texts else ''})", None


def _python(default: str) -> str:
    """Return a default of a file as Python."""
    words = {"null": "None", "true": "True", "false": "False"}
    is_literal = default[:1] in '[{"' or default.replace(".", "").replace("-", "").isdigit()
    return words.get(default) or (default if is_literal else repr(default))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("missing-reference", _resolve, priority=400)  # before intersphinx
    app.connect("missing-reference", _accept_existing, priority=600)  # after it
    app.connect("autodoc-process-docstring", _fields_from_sections)
    app.connect("autodoc-process-signature", _signature_of_config)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
