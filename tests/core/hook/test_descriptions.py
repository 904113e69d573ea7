"""Printed descriptions of hooks and channels."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from robo_orchard_core.utils.hook import FunctionInfo, HookContext, HookContextChannel


class Owner:
    def method(self, args: Any) -> None: ...

    @classmethod
    def class_method(cls, args: Any) -> None: ...

    @staticmethod
    def static_method(args: Any) -> None: ...

    def __call__(self, args: Any) -> None: ...


class Initialised:
    def __init__(self, args: Any) -> None: ...


def function(args: Any) -> None: ...


@functools.wraps(function)
def wrapping(*args: Any) -> None: ...


def line_of(text: str) -> int:
    return Path(__file__).read_text().splitlines().index(text) + 1


OWNER = Owner()
HERE = os.path.relpath(__file__)


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        (
            function,
            f"function function from {HERE}:{line_of('def function(args: Any) -> None: ...')}",
        ),
        (
            OWNER.method,
            f"bound method Owner(id={id(OWNER)}).method from {HERE}:"
            f"{line_of('    def method(self, args: Any) -> None: ...')}",
        ),
        (Owner.class_method, rf"bound method Owner.class_method from {HERE}:"),
        (Owner.static_method, f"function Owner.static_method from {HERE}:"),
        (OWNER, f"object Owner(id={id(OWNER)}) from {HERE}:"),
        (
            wrapping,
            f"function function from {HERE}:{line_of('def function(args: Any) -> None: ...')}",
        ),
        (functools.partial(function, 1), f"partial of function function from {HERE}:"),
        (functools.partial(print, 1), "partial of builtin print>"),
        (Initialised, f"class Initialised from {HERE}:"),
        (int, "class int>"),
        ([].append, "builtin list.append>"),
        (functools.partial(functools.partial(OWNER.method)), "partial of bound method Owner"),
    ],
    ids=[
        *("function", "method", "class_method", "static_method", "callable_object", "wrapper"),
        *("partial", "partial_of_builtin", "class", "builtin_class", "builtin_method"),
        "partial_of_partial",
    ],
)
def test_every_kind_of_callable_is_described(described: Any, expected: str) -> None:
    """A description has kind, name, file and line, if known."""
    assert repr(FunctionInfo.of(described)).startswith(f"<FunctionInfo {expected}")


class Hostile:
    """Object that raises on any inspection."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("don't look at me")

    def __call__(self, args: Any) -> None: ...


class HostileName(functools.partial[None]):
    @property
    def func(self) -> Any:
        raise RuntimeError("nor at me")


@pytest.mark.parametrize("make", [Hostile, lambda: HostileName(print), int])
def test_descriptions_never_fail(make: Callable[[], Any]) -> None:
    """Objects that raise on inspection, and objects that aren't callable, have descriptions."""
    assert repr(FunctionInfo.of(make())).startswith("<FunctionInfo ")


def test_description_works_without_a_working_directory(tmp_path: Path) -> None:
    """Without a working directory, the absolute path is shown."""
    gone = tmp_path / "gone"
    gone.mkdir()
    script = (
        "import os, shutil\n"
        "from robo_orchard_core.utils.hook import FunctionInfo, RemovableHandle\n"
        "shutil.rmtree(os.getcwd()); print(FunctionInfo.of(RemovableHandle.remove))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=gone, capture_output=True, text=True, check=True
    )
    assert re.search(r"from /.*channel\.py:\d+>", done.stdout)


class Falsy(list[Any]):
    def __call__(self, args: Any) -> None: ...


class HostileToInspect:
    def __call__(self, args: Any) -> None: ...

    @property
    def __signature__(self) -> Any:
        raise RuntimeError("nor at this")

    def __bool__(self) -> bool:
        raise RuntimeError("nor this")


@pytest.mark.parametrize("make", [Falsy, HostileToInspect])
def test_unusual_callables_can_be_hooks(make: Callable[[], Any]) -> None:
    """Empty callables and callables that raise on inspection are registered, run and described."""
    hook: HookContext[Any] = HookContext.from_callable(before=make())
    assert f"before=<FunctionInfo object {make.__name__}(id=" in repr(hook)
    with hook.begin(None):
        pass


def test_channel_prints_its_hooks_in_order() -> None:
    """The tree shows the channel and each hook with position, before and after."""
    channel = HookContextChannel[Any]("on_step")
    channel.register(HookContext.from_callable(before=function))
    channel.register(HookContext.from_callable(after=function, name="second"))
    info = repr(FunctionInfo.of(function))
    assert repr(channel).replace(", \n", ",\n").splitlines() == [
        "<robo_orchard_core.utils.hook.HookContextChannel(",
        "  name=on_step,",
        "  hooks=[",
        "    0: <robo_orchard_core.utils.hook.HookContextFromCallable(",
        "      name=None,",
        f"      before={info},",
        "      after=None)>,",
        "    1: <robo_orchard_core.utils.hook.HookContextFromCallable(",
        "      name=second,",
        "      before=None,",
        f"      after={info})>",
        "  ])>",
    ]


def test_importing_core_loads_neither_torch_nor_accelerate() -> None:
    """The core package works without torch."""
    script = (
        "import sys, robo_orchard_core, robo_orchard_core.utils.hook; "
        "assert not {'torch', 'accelerate'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
