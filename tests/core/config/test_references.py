"""A file names only code that is trusted, of the declared kind, where it is defined."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from robo_orchard_core.utils.config import (
    Config,
    ConfigInstanceOf,
    ConfigReferenceError,
    Trust,
    TrustError,
)


class Hook:
    """What the references of these tests should lead to."""


class HookConfig(Config):
    every_steps: int = 1


class Run(Config):
    kind: type[Hook] = Hook
    kinds: dict[str, list[type[Hook] | None]] = {}  # noqa: RUF012 - pydantic copies it
    either: type[Hook] | type[Config] = Hook
    hook: ConfigInstanceOf[HookConfig] = HookConfig()
    function: Callable[[int], object] | None = None


TEAM = {
    "__init__.py": "from pathlib import Path\nPath(__file__).with_name('imported').touch()\n",
    "hooks.py": f"""
import os
import json as renamed
from collections import OrderedDict
import {__name__} as base

class TeamHook(base.Hook):
    class Inner(base.Hook):
        pass

    @staticmethod
    def helper(value):
        raise AssertionError("called")

class TeamConfig(base.HookConfig):
    team_size: int = 2

class Other:
    pass

alias = TeamHook
instance = TeamHook()

def function(value):
    raise AssertionError("called")

def two(first, second):
    raise AssertionError("called")

def __getattr__(name):
    raise AssertionError("called")
""",
    "broken.py": "raise RuntimeError('broken on import')\n",
    "__main__.py": "raise AssertionError('the command was run')\n",
}


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of the user's on the import path; its file `imported` appears on import."""
    package = tmp_path / "team"
    package.mkdir()
    for name, text in TEAM.items():
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "team"]:
        del sys.modules[name]


def is_imported(team: Path) -> bool:
    """Whether the package was imported; its own file says so, not only `sys.modules`."""
    return "team" in sys.modules or (team / "imported").exists()


UNTRUSTED = [
    ({"kind": "team.hooks:TeamHook"}, "kind"),
    ({"kinds": {"a": [None, "team.hooks:TeamHook"]}}, "kinds.a.1"),
    ({"either": "team.hooks:TeamHook"}, "either"),
    ({"hook": {"config_type": "team.hooks:TeamConfig"}}, "hook.config_type"),
    ({"function": "team.hooks:function"}, "function"),
    ({"config_type": "team.hooks:TeamConfig"}, "config_type"),
]


@pytest.mark.parametrize(("document", "place"), UNTRUSTED)
def test_what_is_not_trusted_is_not_imported(
    team: Path, document: dict[str, Any], place: str
) -> None:
    """A reference outside the trust is refused by its name alone."""
    with pytest.raises(TrustError, match=r"outside the trusted packages .* trust=\('team',\)") as e:
        Run.from_dict(document)
    assert e.value.place == place
    assert not is_imported(team)


@pytest.mark.parametrize("trust", [("teams",), ("tea",), ("team.hook",), ("team.hooks:Team",), ()])
def test_trust_goes_by_whole_names(team: Path, trust: tuple[str, ...]) -> None:
    """Trusting one name trusts no other that merely begins or ends like it."""
    with pytest.raises(TrustError):
        Run.from_dict({"kind": "team.hooks:TeamHook"}, trust=trust)
    assert not is_imported(team)


@pytest.mark.parametrize("trust", ["team", ("team",), ["team.hooks"], ("team.hooks:TeamHook",)])
def test_trust_is_widened_by_name(team: Path, trust: Any) -> None:
    """A package, a module or a single class can be named as trusted."""
    loaded = Run.from_dict({"kind": "team.hooks:TeamHook"}, trust=trust)
    assert issubclass(loaded.kind, Hook)
    assert loaded.kind.__qualname__ == "TeamHook"
    assert Run.from_dict(loaded.to_dict(), trust=trust) == loaded


def test_trust_in_one_class_covers_no_other(team: Path) -> None:
    """A class that is trusted by name doesn't open its module."""
    trust = Trust().widened("team.hooks:TeamHook")
    with pytest.raises(TrustError):
        Run.from_dict({"kind": "team.hooks:TeamHook.Inner"}, trust=trust)


def test_a_class_itself_can_be_named_as_trusted() -> None:
    """In code, the class stands for its name."""
    assert Trust.of(Hook) == Trust.of([Hook]) == Trust().widened(f"{__name__}:Hook")


def test_only_our_own_packages_are_trusted_by_default() -> None:
    """The default trust is the two packages of this project."""
    assert Trust().packages == {"robo_orchard_core", "robo_orchard_lab"}


@pytest.mark.parametrize("name", ["", "a..b", "a b", "a:b:c", ":x", "a:", "a/b"])
def test_a_name_that_is_none_cannot_be_trusted(name: str) -> None:
    """A slip in a trusted name is told, and doesn't silently trust nothing."""
    with pytest.raises(ValueError, match="expected the name of a package to trust"):
        Trust().widened(name)


WRONG = [
    ("kind", "team.hooks:function", "expected a subclass of .*Hook, found 'team.hooks:function'"),
    ("kind", "team.hooks:TeamHook.helper", "expected a subclass"),
    ("kind", "team.hooks:Other", "expected a subclass"),
    ("kind", "team.hooks:TeamConfig", "expected a subclass"),
    ("kind", "team.hooks:os", "leads to a module, expected a class or function"),
    ("kind", "team.hooks:renamed", "leads to a module"),
    ("kind", "team.hooks:os.path", "no 'path' is defined there"),
    ("kind", "team.hooks:OrderedDict", "defined elsewhere; .* 'collections:OrderedDict'"),
    ("kind", "team.hooks:base.Hook", "no 'Hook' is defined there"),
    ("kind", "team.hooks:alias", "defined elsewhere; .* 'team.hooks:TeamHook'"),
    ("kind", "team.hooks:instance", "leads to a TeamHook, expected a class"),
    ("kind", "team.hooks:instance.Inner", "no 'Inner' is defined there"),
    ("kind", "team.hooks:missing", "no 'missing' is defined there"),
    ("kind", "team.hooks:__name__", "leads to a str"),
    ("kind", "team.nothing:X", "can't be imported: No module named 'team.nothing'$"),
    ("kind", "team.broken:X", "can't be imported: broken on import"),
    ("kind", "team.__main__:X", "names a command"),
    ("function", "team.hooks:TeamHook", "expected a function, found the class"),
    ("function", "team.hooks:two", "can't be called with 1 arguments: missing .* 'second'"),
    ("hook", {"config_type": "team.hooks:Other"}, "expected a subclass of .*HookConfig"),
    ("hook", {"config_type": 5}, "expected the name of a class, found 5"),
    ("hook", {"config_type": "team.hooks:TeamConfig", "size": 1}, "did you mean 'team_size'?"),
]


def test_a_package_that_is_not_there_is_told_with_what_to_do() -> None:
    """Which is to install it, or to start elsewhere."""
    with pytest.raises(ConfigReferenceError, match="'nowhere'; install it, or start where"):
        Run.from_dict({"kind": "nowhere.models:Net"}, trust="nowhere")


@pytest.mark.parametrize(("field", "value", "problem"), WRONG)
def test_what_is_not_the_declared_kind_is_refused(
    team: Path, field: str, value: Any, problem: str
) -> None:
    """Only a class or function of the declared kind, named where it is defined, comes through."""
    with pytest.raises(ValueError, match=problem) as caught:
        Run.from_dict({field: value}, trust="team")
    assert re.match(rf"{field}[.:]", str(caught.value))


@pytest.mark.parametrize("text", ["", "x", "a.b", "a:", ":b", "a:b:c", "a b:c", "a:b c", "../a:b"])
def test_what_is_not_written_as_a_reference_is_refused(text: str) -> None:
    """A reference is `module:QualName`."""
    with pytest.raises(ConfigReferenceError, match=r"kind: expected a reference like"):
        Run.from_dict({"kind": text})


def test_our_own_functions_and_re_exports_are_refused_too() -> None:
    """Being inside a trusted package is not enough."""
    package = "robo_orchard_core.utils.config"
    for reference in (f"{package}.formats:json", f"{package}:Config", f"{package}:errors"):
        with pytest.raises(ConfigReferenceError, match="leads to"):
            Run.from_dict({"either": reference})
    assert Run.from_dict({"either": f"{package}.config:Config"}).either is Config


def test_a_misspelt_name_gets_the_nearest_that_is_defined_there(team: Path) -> None:
    """Not what the module has merely imported."""
    for name, near in {"TeamHok": "TeamHook", "TeamHook.Iner": "Inner", "OrderedDit": None}.items():
        with pytest.raises(ConfigReferenceError, match="names nothing") as found:
            Run.from_dict({"kind": f"team.hooks:{name}"}, trust="team")
        told = re.search("did you mean '(.*)'", str(found.value))
        assert (told and told[1]) == near


def test_functions_are_referred_to_like_classes(team: Path) -> None:
    """A callable field holds a function, which is not called."""
    document = {"function": "team.hooks:TeamHook.helper"}
    loaded = Run.from_dict(document, trust="team")
    assert loaded.function is not None
    assert loaded.to_dict()["function"] == document["function"]


class Bound(Config):
    kind: type[Hook]
    plain: type
    maybe: type[Hook] | str = "x"


def test_a_text_that_may_be_text_stays_text() -> None:
    """Where the declaration admits text, nothing is looked up."""
    document = {"kind": f"{__name__}:Hook", "plain": f"{__name__}:Hook", "maybe": "os:system"}
    assert Bound.from_dict(document, trust=__name__).maybe == "os:system"


def test_code_that_a_default_declares_needs_no_trust() -> None:
    """The classes that a config's fields and defaults hold are found through them."""

    class Local(Hook):
        pass

    class LocalConfig(HookConfig):
        kind: type[Hook] = Local

    class Declares(Config):
        kind: type[Hook] = Local
        made: list[HookConfig] = []  # noqa: RUF012 - pydantic copies it
        hooks: tuple[HookConfig, dict[str, HookConfig]] = (LocalConfig(), {"a": LocalConfig()})

    config = Declares(made=[LocalConfig(every_steps=3)])
    loaded = Declares.from_str(config.to_str())
    assert loaded == config
    assert loaded.kind is Local


def test_a_reference_of_a_script_finds_the_class_in_the_imported_script() -> None:
    """What a script saved as `__main__` is found by whoever imports that script as a module."""
    assert Run.from_dict({"kind": "__main__:Hook"}).kind is Hook
    with pytest.raises(TrustError):
        Run.from_dict({"kind": "__main__:HookTwo"})


def test_references_and_config_types_are_for_documents_only() -> None:
    """Code that builds a config passes classes, and no text that would be looked up."""
    with pytest.raises(ValueError, match="subclass of Hook"):
        Run(kind=f"{__name__}:Hook")  # type: ignore[arg-type]  # the error is the point
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        Run(hook={"config_type": f"{__name__}:HookConfig"})  # type: ignore[arg-type]  # as above


def test_declared_code_of_the_wrong_kind_is_told_as_such() -> None:
    """What the config declares elsewhere is found, and refused for its kind, not for trust."""
    with pytest.raises(ConfigReferenceError, match=r"kind: expected a subclass of .*:Hook,"):
        Run.from_dict({"kind": f"{__name__}:HookConfig"})


def test_a_builtin_that_says_nothing_about_its_parameters_is_taken() -> None:
    """Where a signature can't be read, being a function must do."""
    loaded = Run.from_dict({"function": "builtins:max"}, trust="builtins")
    assert loaded.to_dict()["function"] == "builtins:max"


def test_the_classes_of_main_go_before_those_of_the_same_name() -> None:
    """Trust in `__main__` means its own classes."""
    main = sys.modules["__main__"]
    mine = type("Hook", (Hook,), {"__module__": "__main__"})
    vars(main)["Hook"] = mine
    try:
        assert Run.from_dict({"kind": "__main__:Hook"}, trust="__main__").kind is mine
        assert Run.from_dict(Run(kind=mine).to_dict(), trust="__main__") == Run(kind=mine)
    finally:
        del vars(main)["Hook"]
