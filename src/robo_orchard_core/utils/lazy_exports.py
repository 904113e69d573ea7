"""Exports of a package that are imported on first use (PEP 562).

A package lists its exports twice: by their modules, for this function, and as imports under
``TYPE_CHECKING``, for type checkers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def lazy_exports(package: str, modules: Mapping[str, str]) -> Callable[[str], object]:
    """Return the ``__getattr__`` of a package, which imports an export on its first use.

    Args:
        package: Name of the package.
        modules: Module of each export, relative to the package.

    >>> __getattr__ = lazy_exports("json", {"JSONDecoder": "decoder"})
    >>> __getattr__("JSONDecoder")
    <class 'json.decoder.JSONDecoder'>
    >>> __getattr__("Decoder")
    Traceback (most recent call last):
    AttributeError: module 'json' has no attribute 'Decoder'
    """

    def load(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{modules[name]}"), name)
        setattr(sys.modules[package], name, value)  # later look-ups bypass this function
        return value

    return load
