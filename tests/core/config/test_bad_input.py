"""Bad input raises a typed error with its location."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any, Literal

import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robo_orchard_core.utils.config import (
    Config,
    ConfigError,
    ConfigFieldError,
    ConfigSyntaxError,
    Format,
)

# Shared machines are slow at times.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Stats(Config):
    step_log_freq: int = 5
    rate: float = 0.5
    label: str = "é"


class Hooks(Config):
    stats: Stats = Stats()
    more: dict[str, Stats] = pydantic.Field(default={})


class Run(Config):
    hooks: Hooks = Hooks()
    batch_size: int = 1
    rows: list[list[int]] = pydantic.Field(default=[])
    extra: Any = None


RUN = Run(hooks=Hooks(more={"a.b": Stats(label="x")}), rows=[[1], [2]])


def refused(text: str, format_: Format) -> ConfigError:
    """Return the error raised by reading the text."""
    with pytest.raises(ConfigError) as caught:
        Run.from_str(text, format_)
    return caught.value


def test_truncated_json_is_refused() -> None:
    """JSON text truncated at any character is refused."""
    text = RUN.to_str("json")
    for end in range(len(text)):
        assert isinstance(refused(text[:end], "json"), ConfigSyntaxError)


def test_truncated_json_file_is_refused(tmp_path: Path) -> None:
    """A file truncated at any byte is refused by name, even inside a character."""
    path = tmp_path / "run.json"
    RUN.save(path)
    content = path.read_bytes()
    for end in range(len(content)):
        path.write_bytes(content[:end])
        with pytest.raises(ConfigSyntaxError, match=re.escape(f"{path}: ")):
            Run.load(path)
    path.write_bytes(content)
    assert Run.load(path) == RUN


@pytest.mark.parametrize("format_", ["yaml", "toml"])
def test_truncated_yaml_and_toml_raise_only_config_errors(format_: Format) -> None:
    """Truncated YAML or TOML is read as a shorter document, or refused."""
    text = RUN.to_str(format_)
    for end in range(len(text)):
        with contextlib.suppress(ConfigError):
            Run.from_str(text[:end], format_)


REPEATED = [
    ("json", '{"hooks": {"stats": {"rate": 1, "rate": 2}}}', "hooks.stats.rate"),
    ("json", '{"rows": [[], {"a": 1, "b": {}, "a": 2}]}', "rows.1.a"),
    ("yaml", "hooks:\n  stats:\n    rate: 1\n    rate: 2\n", "hooks.stats.rate"),
    ("toml", "[hooks.stats]\nrate = 1\nrate = 2\n", "hooks.stats.rate"),
    ("toml", "[hooks.stats]\nrate = 1\nrate = 2", "hooks.stats.rate"),
    ("toml", "[hooks.stats]\n[hooks.stats]\n", "hooks.stats"),
    ("toml", "[[hooks]]\na.b = 1\na.b = 1\n", "hooks.a.b"),
    ("toml", "a = 1\na = [\n]\n", "line 3, column 2"),
]


@pytest.mark.parametrize(("format_", "text", "place"), REPEATED)
def test_duplicate_key_is_refused(format_: Format, text: str, place: str) -> None:
    """A duplicate key is an error with its path; the last value does not win."""
    error = refused(text, format_)
    assert isinstance(error, ConfigSyntaxError)
    assert error.location == place
    assert re.search("occurs twice|Cannot (overwrite|declare)", str(error))


NOT_FINITE = [
    ("json", '{"hooks": {"stats": {"rate": NaN}}}'),
    ("json", '{"hooks": {"stats": {"rate": -Infinity}}}'),
    ("json", '{"hooks": {"stats": {"rate": 1e999}}}'),
    ("yaml", "hooks: {stats: {rate: .nan}}"),
    ("yaml", "hooks: {stats: {rate: -.Inf}}"),
    ("yaml", "hooks: {stats: {rate: 1e999}}"),
    ("toml", "hooks.stats.rate = nan"),
    ("toml", "hooks.stats.rate = -inf"),
]


@pytest.mark.parametrize(("format_", "text"), NOT_FINITE)
def test_non_finite_numbers_are_refused(format_: Format, text: str) -> None:
    """NaN and infinities are errors in any spelling."""
    error = refused(text, format_)
    assert error.location == "hooks.stats.rate"
    assert "expected a finite number" in error.problem


def test_text_nan_is_not_read_as_a_number() -> None:
    """pydantic alone would read the text "nan" as a number."""
    assert refused('{"hooks": {"stats": {"rate": "nan"}}}', "json").location == "hooks.stats.rate"
    with pytest.raises(pydantic.ValidationError, match="finite number"):
        Stats(rate=float("nan"))


DEEP = [
    ("json", '{"extra": ' + "[" * 200 + "]" * 200 + "}"),
    ("json", '{"extra": ' * 200 + "1" + "}" * 200),
    ("json", "[" * 100_000),
    ("yaml", "extra: " + "[" * 200 + "]" * 200),
    ("yaml", "extra: " + "{a: " * 200 + "}" * 200),
    ("yaml", "- " * 100_000),
    ("toml", "extra = " + "[" * 200 + "]" * 200),
    ("toml", "extra = " + "[" * 100_000),
    ("toml", ".".join(["extra"] * 200) + " = 1"),
    ("toml", ".".join(["extra"] * 100_000) + " = 1"),
    ("toml", "extra = {" + "'a' . " * 100_000 + "a = 1}"),
    ("toml", "[" + '"a".' * 100_000 + "a]"),
]


@pytest.mark.parametrize(("format_", "text"), DEEP, ids=range(len(DEEP)))
def test_deeply_nested_document_is_refused(format_: Format, text: str) -> None:
    """Depth is limited far below the interpreter's recursion limit."""
    error = refused(text, format_)
    assert isinstance(error, ConfigSyntaxError)
    assert "deep" in error.problem
    assert len(str(error)) < 200


def test_dots_in_text_do_not_count_as_depth() -> None:
    """Text with many dots stays text in every format."""
    for text in ("a." * 100, "'\"" + "a." * 100, '"""' + "a." * 100, "# " + "a." * 100):
        run = Run(extra={"x": text, text: "x"})
        assert Run.from_str(run.to_str("toml"), "toml") == run


def test_large_document_is_refused_before_parsing(tmp_path: Path) -> None:
    """Size is checked before anything is parsed."""
    path = tmp_path / "large.json"
    path.write_text('{"extra": "' + "x" * 2**24 + '"}')
    with pytest.raises(ConfigSyntaxError, match="larger than 16777216 bytes"):
        Run.load(path)
    with pytest.raises(ConfigSyntaxError, match="larger than 16777216 bytes"):
        Run.from_str(path.read_text())


SYNTAX = [
    ("yaml", "hooks: !!python/object/apply:os.system ['true']", "hooks", "tags are not read"),
    ("yaml", "hooks: !custom {}", "hooks", "tags are not read"),
    ("yaml", "hooks: {stats: ! 'x'}", "hooks.stats", "tags are not read"),
    ("yaml", "!!map {}", "line 1, column 1", "tags are not read"),
    ("yaml", "hooks: &h {}\nextra: *h", "extra", "aliases are not read"),
    ("yaml", "{}\n---\n{}", "line 2, column 1", "found another document"),
    ("yaml", "1: 2", "line 1, column 1", "expected a key of text, found 1"),
    ("yaml", "? [a]\n: 2", "line 1, column 3", "expected a key of text"),
    ("yaml", "a: b: c", "line 1, column 5", "broken YAML"),
    ("yaml", "a: \x00", "", "broken YAML"),
    ("yaml", "extra: " + "9" * 5000, "extra", "4300 digits"),
    ("yaml", "", "", "expected a mapping of fields at the top, found NoneType"),
    ("yaml", "- 1", "", "expected a mapping of fields at the top, found list"),
    ("json", "12", "", "expected a mapping of fields at the top, found int"),
    ("json", '{"extra": "\\ud800"}', "extra", "lone surrogate"),
    ("json", '{"extra": {"\\ud800": 1}}', "extra", "lone surrogate"),
    ("json", '"\ud800"', "", "lone surrogate"),
    ("json", '{"extra": ' + "9" * 5000 + "}", "", "4300 digits"),
    ("json", "{'extra': 1}", "line 1, column 2", "broken JSON"),
    ("toml", "extra = " + "9" * 5000, "", "4300 digits"),
    ("toml", "extra = ", "extra", "broken TOML"),
    ("toml", "= 1", "line 1, column 1", "broken TOML"),
]


@pytest.mark.parametrize(("format_", "text", "place", "problem"), SYNTAX, ids=range(len(SYNTAX)))
def test_malformed_document_is_refused_with_its_location(
    format_: Format, text: str, place: str, problem: str
) -> None:
    """Anything but plain data is an error with path or position."""
    error = refused(text, format_)
    assert isinstance(error, ConfigSyntaxError)
    assert error.location == place
    assert problem in str(error)
    assert "\n" not in str(error)


def test_yaml_scalars_follow_yaml_1_2() -> None:
    """`on` is text and 1e-3 a number, unlike in YAML 1.1."""
    text = "extra: [on, yes, 12:30, 012, 0o17, 0x1f, 1e-3, -.5, ~, NULL, True, 1_000, 2024-01-01]"
    expected = ["on", "yes", "12:30", 12, 15, 31, 0.001, -0.5, None, None, True, "1_000"]
    assert Run.from_str(text, "yaml").extra == [*expected, "2024-01-01"]


def test_toml_dates_become_iso_8601_text() -> None:
    """TOML's dates become the text that other formats hold."""
    text = "extra = [2024-01-01, 2024-01-01T01:02:03Z, 01:02:03]"
    expected = ["2024-01-01", "2024-01-01T01:02:03+00:00", "01:02:03"]
    assert Run.from_str(text, "toml").extra == expected


FIELDS = [
    ({"hooks": {"stats": {"step_log_freq": "x"}}}, "hooks.stats.step_log_freq", "valid integer"),
    ({"hooks": {"stats": {"step_log_frq": 1}}}, "hooks.stats.step_log_frq", "'step_log_freq'?"),
    ({"hooks": {"more": {"a.b": {"rate": []}}}}, 'hooks.more."a.b".rate', "found [] (list)"),
    ({"hooks": {"stats": 1}}, "hooks.stats", "found 1 (int)"),
    ({"rows": [[1], [2, "x"]]}, "rows.1.1", "valid integer"),
    ({"zzz": 1}, "zzz", "it has batch_size, extra, hooks, rows"),
    ({"batch_size": "x" * 99}, "batch_size", "..."),
]


@pytest.mark.parametrize(("document", "place", "problem"), FIELDS)
def test_wrong_field_is_reported_with_its_path(
    document: dict[str, Any], place: str, problem: str
) -> None:
    """Unknown fields and wrong values are reported by dotted path, in files and dicts."""
    error = refused(json.dumps(document), "json")
    assert isinstance(error, ConfigFieldError)
    assert error.location == place
    assert str(error).startswith(f"{place}: ")
    assert problem in error.problem
    with pytest.raises(ConfigFieldError, match=re.escape(place)):
        Run.from_dict(document)


def test_one_error_lists_all_problems() -> None:
    """One error lists all further problems of the document."""
    error = refused('{"batch_size": "x", "rows": [["y"]]}', "json")
    assert error.location == "batch_size"
    assert [other.location for other in error.others] == ["rows.0.0"]
    assert "\nalso rows.0.0: " in str(error)


def test_inner_problems_precede_outer_problems() -> None:
    """The inner problem of a union comes first; else the document's order counts."""

    class Either(Config):
        first: list[list[int]]
        sizes: dict[str, int] | list[int]

    with pytest.raises(ConfigFieldError) as found:
        Either.from_dict({"first": "x", "sizes": [1, "y"]})
    places = [problem.location for problem in (found.value, *found.value.others)]
    assert places == ["first", "sizes.1", "sizes"]


def test_missing_field_is_reported_with_its_path() -> None:
    """A missing required field is an error at its path."""

    class Needs(Config):
        root: str

    class Outer(Config):
        needs: Needs

    with pytest.raises(ConfigFieldError, match=r"needs\.root: a value is required"):
        Outer.from_dict({"needs": {}})


def test_union_errors_have_no_pydantic_labels() -> None:
    """Paths of errors in unions contain only keys of the document."""

    class Cat(Config):
        kind: Literal["cat"] = "cat"
        age: int = 1

    class Dog(Config):
        kind: Literal["dog"] = "dog"
        age: int = 1

    class Zoo(Config):
        pets: list[Cat | Dog]

    with pytest.raises(ConfigFieldError) as caught:
        Zoo.from_dict({"pets": [{"kind": "dog"}, {"kind": "dog", "age": "old"}]})
    places = {error.location for error in (caught.value, *caught.value.others)}
    assert places == {"pets.1.kind", "pets.1.age"}


def test_post_init_errors_name_the_config() -> None:
    """A ValueError of `__post_init__` is reported with the path of the config."""

    class Pair(Config):
        low: int = 0
        high: int = 1

        def __post_init__(self) -> None:
            if self.low > self.high:
                raise ValueError("low must not be above high")

    class Outer(Config):
        pair: Pair = Pair()

    with pytest.raises(ConfigFieldError, match=r"^pair: low must not be above high$"):
        Outer.from_dict({"pair": {"low": 2}})
    with pytest.raises(ConfigFieldError, match=r"^Pair: low must not be above high$"):
        Pair.from_dict({"low": 2})
    with pytest.raises(pydantic.ValidationError, match="low must not be above high"):
        Pair(low=2)


@pytest.mark.parametrize("value", [(1, 2), {1}, b"x", object(), Path("x")])
def test_from_dict_refuses_other_than_plain_data(value: object) -> None:
    """`from_dict` accepts only data that a file can hold."""
    with pytest.raises(ConfigSyntaxError, match=r"extra\.0: expected plain data, found"):
        Run.from_dict({"extra": [value]})


def test_from_dict_refuses_keys_other_than_text() -> None:
    """The keys of a document are text."""
    with pytest.raises(ConfigSyntaxError, match="extra: expected a key of text, found 1"):
        Run.from_dict({"extra": {1: 2}})


@PATIENT
@given(text=st.text() | st.text(alphabet='{}[]",:\\ntrue0e-.=&*!#|>\'"?\n '))
@pytest.mark.parametrize("format_", ["json", "yaml", "toml"])
def test_any_text_raises_only_config_errors(text: str, format_: Format) -> None:
    """Any text results in a config or a ConfigError."""
    with contextlib.suppress(ConfigError):
        Run.from_str(text, format_)


def test_unknown_format_is_refused(tmp_path: Path) -> None:
    """Formats are json, yaml and toml, by name and by suffix."""
    with pytest.raises(ConfigError, match="expected a format out of"):
        Run().to_str("xml")  # type: ignore[arg-type]  # the error is the point
    with pytest.raises(ConfigError, match=r"ends in \.json, \.yaml, \.yml, \.toml"):
        Run().save(tmp_path / "run.ini")
    with pytest.raises(ConfigError, match=r"run\.ini: expected a file name that ends in"):
        Run.load(tmp_path / "run.ini")


@pytest.mark.parametrize("text", ["[a]: 1", "{a: 1}: 1", "? [a]\n: 1", "? " * 50_000])
def test_yaml_collections_as_keys_are_refused(text: str) -> None:
    """A collection as a key is refused at its start."""
    error = refused(text, "yaml")
    assert isinstance(error, ConfigSyntaxError)
    assert error.problem == "expected a key of text, found a collection"
