"""Overrides from the command line, the environment and code."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robo_orchard_core.utils.config import ConfigError
from robo_orchard_core.utils.config.formats import Plain
from robo_orchard_lab.experiment.overrides import (
    Origin,
    Override,
    from_arguments,
    from_environment,
    from_mapping,
    parse_value,
)


@given(st.text())
def test_any_text_is_a_value_or_refused(text: str) -> None:
    """Any text is a value or raises a ConfigError."""
    with contextlib.suppress(ConfigError):
        parse_value(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-1e-3", -0.001),
        ("true", True),
        ("null", None),
        ("50 steps", "50 steps"),
        ("'3'", "3"),
        ("on", "on"),
        ("[1, {a: b}]", [1, {"a": "b"}]),
        ('{"a": [1.5, "x"]}', {"a": [1.5, "x"]}),
        ("[fc.*, bias]", ["fc.*", "bias"]),
        ("*.bias", "*.bias"),
        ("!x", "!x"),
        ("a: b", "a: b"),
        ("50 # steps", "50 # steps"),
        (".inf", ".inf"),
        ("1e999", "1e999"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_values_are_scalars_or_collections_of_yaml(text: str, value: object) -> None:
    """Scalars and collections are typed as in a file, and other values are text."""
    found = parse_value(text)
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    "text", ["[1, 2", "{a: *b}", "{a: !x 1}", "{a: 1, a: 2}", "[.nan]", "'x", "[" * 70, "[" * 70000]
)
def test_broken_collections_are_refused_with_the_option(text: str) -> None:
    """A value that begins as a collection must be one."""
    with pytest.raises(ConfigError, match=r"^command line: --hooks\.a: hooks\.a"):
        from_arguments([f"--hooks.a={text}"])


def test_arguments_are_overrides_or_stay() -> None:
    """Both forms of an option are read, and other arguments are returned."""
    overrides, rest = from_arguments(
        ["a.yaml", "--seed", "-3", '--data."a=b".x=c=d', "b", "--", "--x", "y"]
    )
    assert overrides == [
        Override(("seed",), -3, "-3", Origin("command line", "--seed")),
        Override(("data", "a=b", "x"), "c=d", "c=d", Origin("command line", '--data."a=b".x')),
    ]
    assert rest == ["a.yaml", "b", "--x", "y"]


@pytest.mark.parametrize("arguments", [["--seed"], ["--seed", "--name", "x"]])
def test_an_option_without_a_value_is_refused(arguments: list[str]) -> None:
    """The next option is never used as a value."""
    with pytest.raises(ConfigError, match="--seed: expected a value, as in --seed=VALUE"):
        from_arguments(arguments)


@pytest.mark.parametrize("path", ["", ".", "a..b", "a.", ".a", 'a."b', 'a"b', "a." * 70 + "b"])
def test_malformed_path_is_refused(path: str) -> None:
    """Keys must not be empty, quotes must be closed, and the depth is limited."""
    with pytest.raises(ConfigError, match="expected keys with dots between them"):
        from_arguments([f"--{path}=1"])


def test_variables_match_keys_ignoring_case() -> None:
    """Keys match in any case, and new keys are lower case."""
    document: dict[str, Plain] = {
        "hooks": {"Stats": {}, "sinks": [{"a": {"Path": 1}}]},
        "trainer": None,
    }
    environ = {
        "ROBO_ORCHARD_LAB__HOOKS__STATS__EVERY": "50 steps",
        "ROBO_ORCHARD_LAB__HOOKS__SINKS__0__A__PATH": "x",
        "ROBO_ORCHARD_LAB__TRAINER__MAX_EPOCH": "3",
        "ROBO_ORCHARD_LAB_OTHER": "1",
        "HOME": "/",
    }
    stats, path, epochs, *_ = (f"environment: {name}" for name in environ)
    assert [(o.path, o.value, str(o.origin)) for o in from_environment(environ, document)] == [
        (("hooks", "sinks", "0", "a", "Path"), "x", path),
        (("hooks", "Stats", "every"), "50 steps", stats),
        (("trainer", "max_epoch"), 3, epochs),
    ]


@pytest.mark.parametrize(
    ("name", "problem"),
    [("HOOKS__STATS", "matches each of 'Stats', 'sTATS'"), ("HOOKS____A", "found an empty one")],
)
def test_ambiguous_variables_are_refused(name: str, problem: str) -> None:
    """A variable that matches two keys is refused."""
    variable = f"ROBO_ORCHARD_LAB__{name}"
    with pytest.raises(ConfigError, match=f"^environment: {variable}: hooks.*{re.escape(problem)}"):
        from_environment({variable: "1"}, {"hooks": {"Stats": {}, "sTATS": {}}})


def test_mapping_holds_overrides_from_code() -> None:
    """Overrides from code stay plain data, even if they resemble YAML."""
    [one, two] = from_mapping({"trainer.max_epoch": 3, "data": {"name": "3", "a.b": None}})
    assert (one.path, one.value, one.text) == (("trainer", "max_epoch"), 3, None)
    assert (two.path, two.value) == (("data",), {"name": "3", "a.b": None})
    with pytest.raises(ConfigError, match=r"^code: overrides=: x: expected plain data, found"):
        from_mapping({"x": object()})
