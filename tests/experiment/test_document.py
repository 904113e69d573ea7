"""Reading experiment files with base files and overrides."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from robo_orchard_core.utils.config import ConfigError, formats
from robo_orchard_core.utils.config.errors import Path as Place
from robo_orchard_core.utils.config.formats import Plain
from robo_orchard_lab.experiment.document import (
    MAX_BASES,
    MAX_FILE_BYTES,
    MAX_KEY,
    MAX_VALUES,
    ExperimentDocument,
    read_experiment,
)
from robo_orchard_lab.experiment.overrides import Override, from_arguments, from_mapping, origin_of

BASE = """\
# shared by the variants
$schema: schema.json
name: base
trainer:
  max_epoch: 3
hooks:
  bar: {class_type: m:Bar}
  log:
    class_type: m:Log
    sinks:
      - {class_type: m:Sink, path: a}
      - {class_type: m:Other}
"""
VARIANT = """\
base: base.yaml
name: variant
hooks:
  bar: null
  stats:
    class_type: m:Stats
    every: 50 steps
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file and a variant of the file."""
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "variant.yaml").write_text(VARIANT)
    return tmp_path


def arguments(*given: str) -> list[Override]:
    """Return the overrides of a command line."""
    return from_arguments(given)[0]


def origin(document: ExperimentDocument, *path: str | int) -> str:
    """Return the origin of a value, without the folder of a file."""
    return os.path.basename(str(origin_of(path, document.origins)))


def first_sink(document: ExperimentDocument) -> Plain:
    """Return the first sink of the base's hook `log`."""
    value: Any = document.document
    for key in ("hooks", "log", "sinks", 0):
        value = value[key]
    sink: Plain = value
    return sink


def test_a_variant_is_merged_over_its_base(folder: Path) -> None:
    """Other values come from the base, and every value has its file and line."""
    read = read_experiment(folder / "variant.yaml")
    assert read.files == (folder / "variant.yaml", folder / "base.yaml")
    assert read.document == {
        "name": "variant",
        "trainer": {"max_epoch": 3},
        "hooks": {
            "log": {
                "class_type": "m:Log",
                "sinks": [{"class_type": "m:Sink", "path": "a"}, {"class_type": "m:Other"}],
            },
            "stats": {"class_type": "m:Stats", "every": "50 steps"},
        },
    }
    assert origin(read, "name") == "variant.yaml:2"
    assert origin(read, "trainer", "max_epoch") == "base.yaml:5"
    assert origin(read, "hooks", "stats", "every") == "variant.yaml:7"
    assert origin(read, "hooks", "stats", "missing") == "variant.yaml:5"
    assert origin(read, "hooks", "log", "sinks", 1, "class_type") == "base.yaml:12"
    assert origin(read, "hooks") == "base.yaml:6"
    assert origin(read, "seed") == "default"
    assert str(origin_of(("hooks", "stats", "name"), read.leaf_origins)) == "default"
    assert read.locate(ConfigError("x", ("hooks", "stats", "name"))).source == (
        f"{folder / 'variant.yaml'}:5"
    )
    assert read.locate(ConfigError("x", ("model",))).source == str(folder / "variant.yaml")


def test_all_formats_read_equal_documents(folder: Path) -> None:
    """A base may have another format than its variant, and lines are known in each format."""
    document = formats.read(BASE.replace("$schema: schema.json\n", ""), "yaml")
    for suffix in ("json", "toml"):
        text = formats.write(document, suffix)
        (folder / f"base.{suffix}").write_text(text)
        (folder / "of_it.yaml").write_text(f"base: base.{suffix}\n")
        read = read_experiment(folder / "of_it.yaml")
        assert read.document == document
        line = next(n for n, line in enumerate(text.splitlines(), 1) if "max_epoch" in line)
        assert origin(read, "trainer", "max_epoch") == f"base.{suffix}:{line}"


def test_stronger_layer_takes_precedence(folder: Path) -> None:
    """The command line overrides the environment, then code, then the file, in any order."""
    overrides = [
        *arguments("--a=command line"),
        *from_mapping({"a": "code", "b": "code", "c": "code", "name": "code"}),
    ]
    prefix = "ROBO_ORCHARD_LAB__"
    environ = {f"{prefix}A": "environment", f"{prefix}B": "environment", f"{prefix}NAME": "e"}
    read = read_experiment(folder / "base.yaml", overrides=overrides, environ=environ)
    assert {key: (read.document[key], origin(read, key)) for key in ("a", "b", "c", "name")} == {
        "a": ("command line", "command line: --a"),
        "b": ("environment", f"environment: {prefix}B"),
        "c": ("code", "code: overrides="),
        "name": ("e", f"environment: {prefix}NAME"),
    }
    assert [override.path for override in read.overrides[-1:]] == [("a",)]
    assert "a" not in read_experiment(folder / "base.yaml").document


def test_overrides_reach_anywhere(folder: Path) -> None:
    """Overrides reach list items by index, create mappings and remove entries."""
    given = arguments(
        "--hooks.log.sinks.0.path=b",
        "--hooks.bar=null",
        "--data.train.batch_size=3",
        "--hooks.new={class_type: 'm:New', x: [1]}",
    )
    read = read_experiment(folder / "base.yaml", overrides=given)
    assert read.document == {
        "name": "base",
        "trainer": {"max_epoch": 3},
        "hooks": {
            "log": {
                "class_type": "m:Log",
                "sinks": [{"class_type": "m:Sink", "path": "b"}, {"class_type": "m:Other"}],
            },
            "new": {"class_type": "m:New", "x": [1]},
        },
        "data": {"train": {"batch_size": 3}},
    }
    assert origin(read, "hooks", "log", "sinks", 0, "path") == (
        "command line: --hooks.log.sinks.0.path"
    )
    assert origin(read, "hooks", "log", "sinks", 0, "class_type") == "base.yaml:11"
    assert origin(read, "data", "train") == "command line: --data.train.batch_size"


def test_the_order_of_overrides_does_not_affect_classes(folder: Path) -> None:
    """Another class drops the old class's arguments, and keeps the new class's."""
    given = ["--hooks.log.sinks.0.path=b", "--hooks.log.sinks.0.class_type=m:Third"]
    for order in (given, given[::-1]):
        read = read_experiment(folder / "base.yaml", overrides=arguments(*order))
        assert first_sink(read) == {"class_type": "m:Third", "path": "b"}
    given = [
        "--hooks.log.level=1",
        "--hooks.log.class_type=m:A",
        "--hooks={log: {class_type: 'm:B'}}",
    ]
    for order in (given, given[::-1]):
        read = read_experiment(folder / "base.yaml", overrides=arguments(*order))
        assert read.document["hooks"] == {
            "bar": {"class_type": "m:Bar"},
            "log": {"class_type": "m:A", "level": 1},
        }


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("--name.x=1", "name: holds 'base' (str), which has no 'x'"),
        ("--hooks.log.sinks.2.path=1", "hooks.log.sinks: expected the index of one of 2 items"),
        ("--hooks.log.sinks.x=1", "hooks.log.sinks: expected the index of one of 2 items"),
        ("--hooks.lag=null", "did you mean 'log'?"),
        ("--base=x.yaml", "base: can't be overridden"),
    ],
)
def test_overrides_without_a_target_are_refused(folder: Path, given: str, problem: str) -> None:
    """The error names the option and the value found."""
    option = given.partition("=")[0]
    with pytest.raises(ConfigError, match=f"^command line: {option}: .*{re.escape(problem)}"):
        read_experiment(folder / "base.yaml", overrides=arguments(given))


def test_override_is_reread_as_text(folder: Path) -> None:
    """`--name 3` is first read as a number, and reread as text for a text field."""
    given = arguments("--name=03", "--hooks.log.sinks.0.path=[1, 2]", "--trainer.x=y")
    read = read_experiment(folder / "base.yaml", overrides=given)
    assert read.document["name"] == 3
    text = read.with_text(("name",))
    assert text is not None
    assert text.document == {**read.document, "name": "03"}
    assert text.with_text(("name",)) is None  # it is text now
    place: Place = ("hooks", "log", "sinks", 0, "path")
    for path in (place, place[:-1], (*place, 1)):
        listed = read.with_text(path)
        assert listed is not None
        assert first_sink(listed) == {"class_type": "m:Sink", "path": "[1, 2]"}
        assert origin(listed, *place) == "command line: --hooks.log.sinks.0.path"
    assert read.with_text(("trainer", "x")) is None  # it was text all along
    assert read.with_text(("trainer", "max_epoch")) is None  # set by the file
    assert read.with_text(()) is None


def test_only_the_effective_override_is_reread_as_text(folder: Path) -> None:
    """A replaced override is not restored."""
    environ = {"ROBO_ORCHARD_LAB__NAME": "3"}
    read = read_experiment(folder / "base.yaml", overrides=arguments("--name=x"), environ=environ)
    assert read.with_text(("name",)) is None
    place: Place = ("hooks", "log", "every")
    environ = {"ROBO_ORCHARD_LAB__HOOKS__LOG__EVERY": "5"}
    given = arguments("--hooks.log={every: 7}")
    read = read_experiment(folder / "base.yaml", overrides=given, environ=environ)
    assert origin(read, *place) == "command line: --hooks.log"
    assert read.with_text(place) is None


def test_text_override_drops_origins_inside(folder: Path) -> None:
    """A text has no inner origins."""
    read = read_experiment(folder / "base.yaml", overrides=arguments("--fresh={a: 1}"))
    assert ("fresh", "a") in read.origins
    text = read.with_text(("fresh",))
    assert text is not None
    assert text.document["fresh"] == "{a: 1}"
    assert ("fresh", "a") not in text.origins


def chain(folder: Path, length: int) -> Path:
    """Create a chain of base files and return the first file."""
    for number in range(length):
        (folder / f"{number}.yaml").write_text(f"base: {number + 1}.yaml\nv{number}: {number}\n")
    (folder / f"{length}.yaml").write_text("name: last\n")
    return folder / "0.yaml"


def test_base_files_are_merged(tmp_path: Path) -> None:
    """The maximum number of base files is merged, and one more is refused."""
    read = read_experiment(chain(tmp_path, MAX_BASES))
    assert len(read.files) == 1 + MAX_BASES
    assert read.document["v15"] == 15
    with pytest.raises(ConfigError, match=r"16.yaml:1: base: exceeds the limit of 16"):
        read_experiment(chain(tmp_path, MAX_BASES + 1))


@pytest.mark.parametrize(
    "name",
    [
        "../base.yaml",
        "/etc/passwd.yaml",
        "sub/base.yaml",
        "sub\\base.yaml",
        "c:base.yaml",
        "..",
        ".",
        "",
        "base.yaml/",
        "base.yaml\n",
        "\0.yaml",
        3,
        ["base.yaml"],
        "n" * 300 + ".yaml",
    ],
)
def test_base_is_a_plain_name_in_the_same_folder(folder: Path, name: Plain) -> None:
    """No base name leads out of the folder."""
    (folder / "sub").mkdir()
    (folder / "sub" / "base.yaml").write_text(BASE)
    formats_text = formats.write({"name": "x", "base": name}, "json")
    (folder / "variant.json").write_text(formats_text)
    with pytest.raises(ConfigError, match=r"variant.json:3: base: "):
        read_experiment(folder / "variant.json")


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("missing", "can't be read: No such file"),
        ("link", "is a link"),
        ("folder", "is not a regular file"),
        ("pipe", "is not a regular file"),
        ("large", f"exceeds the limit of {MAX_FILE_BYTES} bytes"),
    ],
)
def test_irregular_files_are_refused(folder: Path, kind: str, problem: str) -> None:
    """Irregular files are refused as the file and as its base, without blocking on a pipe."""
    path = folder / "other.yaml"
    if kind == "link":
        path.symlink_to(folder / "base.yaml")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "large":
        path.write_text(f"name: {'x' * MAX_FILE_BYTES}")
    with pytest.raises(ConfigError, match=rf"^{path}: {problem}"):
        read_experiment(path)
    (folder / "variant.yaml").write_text("name: x\nbase: other.yaml\n")
    with pytest.raises(ConfigError, match=rf"variant.yaml:2: base: 'other.yaml' {problem}"):
        read_experiment(folder / "variant.yaml")


def test_cycle_of_base_files_is_refused(folder: Path) -> None:
    """The error shows the cycle."""
    (folder / "base.yaml").write_text("base: variant.yaml\n")
    with pytest.raises(ConfigError, match=r"base.yaml:1: base: .*variant.yaml -> base.yaml -> var"):
        read_experiment(folder / "variant.yaml")


@pytest.mark.parametrize(
    "text",
    [
        f"a: [{'0,' * MAX_VALUES}]",
        f"{'k' * (MAX_KEY + 1)}: 1",
        f"a: {{{'k' * (MAX_KEY + 1)}: 1}}",
    ],
)
def test_documents_are_bounded(tmp_path: Path, text: str) -> None:
    """The number of values and the length of keys are limited."""
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"a.yaml: (the document holds more|expected keys of at)"):
        read_experiment(tmp_path / "a.yaml")


def test_errors_of_a_base_name_the_base(folder: Path) -> None:
    """An error of a base names the base's file and line."""
    (folder / "base.yaml").write_text("a: 1\nb: [1, 2\n")
    with pytest.raises(ConfigError, match=r"base.yaml: line 3, column 1: broken YAML"):
        read_experiment(folder / "variant.yaml")
    (folder / "base.yaml").write_text("a: 1\nhooks: {x: null}\n")
    with pytest.raises(ConfigError, match=r"base.yaml:2: hooks.x: null removes an entry"):
        read_experiment(folder / "variant.yaml")
