"""A function that another process can find again."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def describe_function(function: Callable[..., Any] | str) -> dict[str, Any]:
    """Where a function is to be found, as plain values.

    It is a function at the top of a module, also of a script (``__main__``) or of a module that no
    import finds, as pytest loads them; a ``functools.partial`` of one, with arguments that JSON can
    write; ``"module:name"``; or ``"path/to/file.py:name"``.

    Raises:
        TypeError: another process can't find it; the message says why.
    """
    if isinstance(function, str):
        source, _, name = function.rpartition(":")
        if not source or not name.isidentifier():
            raise TypeError(f"expected 'module:name' or 'file.py:name', got {function!r}")
        if source.endswith(".py"):
            return {"file": str(Path(source).resolve()), "module": Path(source).stem, "name": name}
        return {"file": None, "module": source, "name": name}
    if isinstance(function, functools.partial):
        described = describe_function(function.func)
        given = {"args": list(function.args), "kwargs": dict(function.keywords)}
        try:
            same = json.loads(json.dumps(given)) == given
        except (TypeError, ValueError):
            same = False
        if not same or "args" in described:
            raise TypeError(
                f"another process can't be given {function!r:.120}: a partial must be of a plain "
                "function, with arguments that JSON can write; name other things in the function"
            )
        return {**described, **given}
    name, module = getattr(function, "__qualname__", ""), getattr(function, "__module__", "")
    if not inspect.isfunction(function) or not name.isidentifier():
        raise TypeError(
            f"another process can't find {function!r:.120}: give a function that is defined at the "
            "top of a module (not a lambda, a method or a function in a function), or its name as "
            "'module:name'"
        )
    code_file = inspect.getsourcefile(inspect.unwrap(function))
    file = getattr(sys.modules.get(module), "__file__", None) or code_file
    if file is None or not Path(file).is_file():
        raise TypeError(
            f"another process can't find {name} of {module}: there is no file of it; "
            "define it in a file"
        )
    return {"file": str(Path(file).resolve()), "module": module, "name": name}


def find_function(described: dict[str, Any]) -> Callable[..., Any]:
    """The function that was described.

    A script is loaded by another name than ``__main__``, as multiprocessing does, so that what is
    guarded by that name does not run.

    Raises:
        ImportError: there is no such function here.
    """
    module = _module_of(described["module"], described["file"])
    function = getattr(module, described["name"], None)
    if not callable(function):
        raise ImportError(
            f"{module.__name__} ({module.__file__}) has no function {described['name']!r}"
        )
    if "args" in described:
        return functools.partial(function, *described["args"], **described["kwargs"])
    return function  # type: ignore[no-any-return]  # it is callable


def _module_of(name: str, file: str | None) -> ModuleType:
    if file is None:
        return importlib.import_module(name)
    if name == "__main__":
        name = "__mp_main__"
    else:
        try:
            found = importlib.import_module(name)
        except ImportError:
            sys.modules.pop(name, None)
        else:
            if found.__file__ is not None and Path(found.__file__).resolve() == Path(file):
                return found
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where classes in it are looked up by their module
    spec.loader.exec_module(module)
    return module
