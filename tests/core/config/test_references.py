"""References in files name only trusted code of the declared kind."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest

from robo_orchard_core.utils.config import (
    Config,
    ConfigInstanceOf,
    ConfigReferenceError,
    Trust,
    TrustError,
)


class Hook:
    """Target of the references in these tests."""


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
    """Add a user's package to the import path; its import creates the file `imported`."""
    package = tmp_path / "team"
    package.mkdir()
    for name, text in TEAM.items():
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "team"]:
        del sys.modules[name]


def is_imported(team: Path) -> bool:
    """Return True if the package was imported, by its file or `sys.modules`."""
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
def test_untrusted_code_is_not_imported(team: Path, document: dict[str, Any], place: str) -> None:
    """A reference outside the trust is refused by name."""
    with pytest.raises(TrustError, match=r"outside the trusted packages .* trust=\('team',\)") as e:
        Run.from_dict(document)
    assert e.value.location == place
    assert not is_imported(team)


@pytest.mark.parametrize("trust", [("teams",), ("tea",), ("team.hook",), ("team.hooks:Team",), ()])
def test_trust_compares_complete_names(team: Path, trust: tuple[str, ...]) -> None:
    """Names with a common prefix or suffix are not trusted."""
    with pytest.raises(TrustError):
        Run.from_dict({"kind": "team.hooks:TeamHook"}, trust=trust)
    assert not is_imported(team)


@pytest.mark.parametrize("trust", ["team", ("team",), ["team.hooks"], ("team.hooks:TeamHook",)])
def test_trust_is_extended_by_name(team: Path, trust: Any) -> None:
    """A package, a module or a single class can be trusted."""
    loaded = Run.from_dict({"kind": "team.hooks:TeamHook"}, trust=trust)
    assert issubclass(loaded.kind, Hook)
    assert loaded.kind.__qualname__ == "TeamHook"
    assert Run.from_dict(loaded.to_dict(), trust=trust) == loaded


def test_trust_in_one_class_excludes_its_module(team: Path) -> None:
    """Trust in a class doesn't extend to its module."""
    trust = Trust().widened("team.hooks:TeamHook")
    with pytest.raises(TrustError):
        Run.from_dict({"kind": "team.hooks:TeamHook.Inner"}, trust=trust)


def test_trust_accepts_a_class() -> None:
    """A class object replaces its name in code."""
    assert Trust.of(Hook) == Trust.of([Hook]) == Trust().widened(f"{__name__}:Hook")


def test_default_trust_is_this_projects_packages() -> None:
    """The default trust has the two packages of this project."""
    assert Trust().packages == {"robo_orchard_core", "robo_orchard_lab"}


@pytest.mark.parametrize("name", ["", "a..b", "a b", "a:b:c", ":x", "a:", "a/b"])
def test_malformed_trusted_name_is_refused(name: str) -> None:
    """A malformed name is an error, not an empty trust."""
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


def test_missing_package_is_reported_with_a_remedy() -> None:
    """The remedy is an installation or another working directory."""
    with pytest.raises(ConfigReferenceError, match="'nowhere'; install it, or start where"):
        Run.from_dict({"kind": "nowhere.models:Net"}, trust="nowhere")


def test_code_of_another_release_is_reported_with_the_installed_one() -> None:
    """The code may exist in a newer or older release of the package."""
    release = re.escape(f"in pydantic {pydantic.VERSION}")
    for reference, problem in {
        "pydantic.main:Absent": f"no 'Absent' is defined there {release}; install a release that",
        "pydantic.absent:Model": f"No module named 'pydantic.absent' {release}$",
    }.items():
        with pytest.raises(ConfigReferenceError, match=problem):
            Run.from_dict({"kind": reference}, trust="pydantic")


@pytest.mark.parametrize(("field", "value", "problem"), WRONG)
def test_code_of_another_kind_is_refused(team: Path, field: str, value: Any, problem: str) -> None:
    """Only code of the declared kind, named where it is defined, is accepted."""
    with pytest.raises(ValueError, match=problem) as caught:
        Run.from_dict({field: value}, trust="team")
    assert re.match(rf"{field}[.:]", str(caught.value))


@pytest.mark.parametrize("text", ["", "x", "a.b", "a:", ":b", "a:b:c", "a b:c", "a:b c", "../a:b"])
def test_malformed_reference_is_refused(text: str) -> None:
    """A reference is `module:QualName`."""
    with pytest.raises(ConfigReferenceError, match=r"kind: expected a reference like"):
        Run.from_dict({"kind": text})


def test_re_exports_of_trusted_packages_are_refused() -> None:
    """A trusted package alone is not sufficient."""
    package = "robo_orchard_core.utils.config"
    for reference in (f"{package}.formats:json", f"{package}:Config", f"{package}:errors"):
        with pytest.raises(ConfigReferenceError, match="leads to"):
            Run.from_dict({"either": reference})
    assert Run.from_dict({"either": f"{package}.config:Config"}).either is Config


LAZY = {
    "lazy_team/__init__.py": """
def __getattr__(name):
    if name == "net":
        from lazy_team.net import net
        globals()["net"] = net
        return net
    if name == "Ordered":
        from collections import OrderedDict
        return OrderedDict
    if name == "Broken":
        import a_package_that_is_absent
    raise AttributeError(name)
""",
    "lazy_team/net.py": "def net(value): return value\n",
}


def test_lazily_exported_names_lead_to_their_definitions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module's ``__getattr__`` is asked for names of trusted packages; the definition must be
    trusted as well.
    """
    (tmp_path / "lazy_team").mkdir()
    for name, text in LAZY.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with pytest.raises(TrustError, match="outside the trusted packages"):
            Run.from_dict({"function": "lazy_team:net"})
        assert "lazy_team" not in sys.modules
        for _ in range(2):  # the module keeps the name after the first import
            loaded = Run.from_dict({"function": "lazy_team:net"}, trust="lazy_team")
            assert loaded.to_dict()["function"] == "lazy_team.net:net"
        only = Trust(classes=frozenset({"lazy_team:net"}))
        for reference, trust, problem in (
            ("lazy_team:net", only, "defined elsewhere; .* 'lazy_team.net:net'"),
            ("lazy_team:Ordered", "lazy_team", "defined elsewhere; .* 'collections:OrderedDict'"),
            ("lazy_team:Broken", "lazy_team", "can't be imported: No module named 'a_package"),
            ("lazy_team:Absent", "lazy_team", "no 'Absent' is defined there"),
        ):
            with pytest.raises(ConfigReferenceError, match=problem):
                Run.from_dict({"function": reference}, trust=trust)
    finally:
        for name in [name for name in sys.modules if name.startswith("lazy_team")]:
            del sys.modules[name]


def test_misspelled_reference_gets_a_suggestion(team: Path) -> None:
    """Suggestions are names that the module defines, not its imports."""
    for name, near in {"TeamHok": "TeamHook", "TeamHook.Iner": "Inner", "OrderedDit": None}.items():
        with pytest.raises(ConfigReferenceError, match="names nothing") as found:
            Run.from_dict({"kind": f"team.hooks:{name}"}, trust="team")
        told = re.search("did you mean '(.*)'", str(found.value))
        assert (told and told[1]) == near


def test_references_to_functions_are_resolved(team: Path) -> None:
    """A callable field holds a function, which is not called."""
    document = {"function": "team.hooks:TeamHook.helper"}
    loaded = Run.from_dict(document, trust="team")
    assert loaded.function is not None
    assert loaded.to_dict()["function"] == document["function"]


class Bound(Config):
    kind: type[Hook]
    plain: type
    maybe: type[Hook] | str = "x"


def test_text_stays_text_if_the_field_admits_text() -> None:
    """No reference is resolved if the field admits text."""
    document = {"kind": f"{__name__}:Hook", "plain": f"{__name__}:Hook", "maybe": "os:system"}
    assert Bound.from_dict(document, trust=__name__).maybe == "os:system"


def test_code_in_defaults_needs_no_trust() -> None:
    """Classes in a config's fields and defaults are known."""

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


def test_reference_to_main_finds_the_imported_script() -> None:
    """A class saved as `__main__` is found by importers of the script."""
    assert Run.from_dict({"kind": "__main__:Hook"}).kind is Hook
    with pytest.raises(TrustError):
        Run.from_dict({"kind": "__main__:HookTwo"})


def test_references_are_resolved_in_documents_only() -> None:
    """Code passes classes; text is not resolved."""
    with pytest.raises(ValueError, match="subclass of Hook"):
        Run(kind=f"{__name__}:Hook")  # type: ignore[arg-type]  # the error is the point
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        Run(hook={"config_type": f"{__name__}:HookConfig"})  # type: ignore[arg-type]  # as above


def test_declared_code_of_the_wrong_kind_is_reported_as_wrong_kind() -> None:
    """Code declared elsewhere is refused for its kind, not for trust."""
    with pytest.raises(ConfigReferenceError, match=r"kind: expected a subclass of .*:Hook,"):
        Run.from_dict({"kind": f"{__name__}:HookConfig"})


def test_builtin_without_a_signature_is_accepted() -> None:
    """Parameters can't be checked without a signature."""
    loaded = Run.from_dict({"function": "builtins:max"}, trust="builtins")
    assert loaded.to_dict()["function"] == "builtins:max"


def test_trusted_main_takes_precedence_over_equal_names() -> None:
    """Trust in `__main__` refers to its own classes."""
    main = sys.modules["__main__"]
    mine = type("Hook", (Hook,), {"__module__": "__main__"})
    vars(main)["Hook"] = mine
    try:
        assert Run.from_dict({"kind": "__main__:Hook"}, trust="__main__").kind is mine
        assert Run.from_dict(Run(kind=mine).to_dict(), trust="__main__") == Run(kind=mine)
    finally:
        del vars(main)["Hook"]
