"""Configs validate, compare, replace and save fields."""

from __future__ import annotations

import copy
import os
import pickle
import re
import stat
from pathlib import Path
from typing import Any

import pydantic
import pytest

from robo_orchard_core.utils.config import (
    Config,
    ConfigError,
    ConfigFieldError,
    ConfigSaveError,
    ConfigSyntaxError,
)


class Data(Config):
    root: str = "images"
    batch_size: int = 128
    tags: list[str] = pydantic.Field(default=["a"])


class Limited(Config):
    low: int = 0
    high: int = 10

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError("low must not be above high")


class Run(Config):
    data: Data = Data()
    limits: Limited = Limited()
    name: str | None = None


def test_unknown_fields_are_refused() -> None:
    """A misspelled argument is an error."""
    with pytest.raises(pydantic.ValidationError, match="bach_size"):
        Data(bach_size=4)  # type: ignore[call-arg]  # the error is the point


def test_post_init_may_assign_fields() -> None:
    """`__post_init__` may compute a field; the value is validated."""

    class Derived(Config):
        width: int = 2
        area: float = 0

        def __post_init__(self) -> None:
            self.area = self.width**2

    assert Derived(width=3).area == 9.0
    assert type(Derived().area) is float
    assert Derived.from_str(Derived().to_str()) == Derived()


def test_assignment_is_validated() -> None:
    """An invalid assignment is refused and keeps the old value."""
    data = Data()
    with pytest.raises(pydantic.ValidationError, match="valid integer"):
        data.batch_size = "many"  # type: ignore[assignment]  # the error is the point
    data.batch_size = 4
    assert data == Data(batch_size=4)


def test_assignment_skips_rules_across_fields() -> None:
    """Two dependent fields can be changed one after the other."""
    limits = Limited()
    limits.low = 20
    limits.high = 30
    assert limits == Limited(low=20, high=30)


def test_defaults_are_not_shared() -> None:
    """Two configs don't share mutable defaults."""
    first, second = Run(), Run()
    first.data.batch_size = 1
    first.data.tags.append("b")
    assert second == Run()


def test_configs_are_equal_by_class_and_content() -> None:
    """Equal class and values make configs equal; a subclass with equal values differs."""

    class Other(Data):
        pass

    class Remembers(Config):
        size: int = 1
        _cache: list[int] = pydantic.PrivateAttr(default_factory=list)

    assert Data() == Data()
    assert Data() != Data(batch_size=1)
    assert Data() != Other()
    assert Data() != "images"
    remembering = Remembers()
    remembering._cache.append(1)
    assert remembering == Remembers()


def test_configs_can_be_copied_and_pickled() -> None:
    """Configs can be sent to the worker processes of a data loader."""
    run = Run(name="x")
    assert pickle.loads(pickle.dumps(run)) == copy.deepcopy(run) == run


def test_replace_returns_a_validated_copy() -> None:
    """The original is unchanged, the copy shares nothing, and rules across fields hold."""
    run = Run()
    other = run.replace(name="x", **{"data.batch_size": 4, "limits.high": 5})
    assert other == Run(name="x", data=Data(batch_size=4), limits=Limited(high=5))
    assert run == Run()
    run.replace(name="y").data.tags.append("b")
    assert run == Run()


REPLACEMENTS: list[tuple[dict[str, Any], str]] = [
    ({"names": 1}, "names: Run has no such field; did you mean 'name'?"),
    ({"data.bach_size": 1}, "data.bach_size: Data has no such field; did you mean 'batch_size'?"),
    ({"data.batch_size": "x"}, "data.batch_size: Input should be a valid integer"),
    ({"data.root.x": 1}, "data.root: holds no config, mapping or list but str"),
    ({"limits.low": 11}, "limits: Limited: low must not be above high"),
    ({"limits": {"low": 11}}, "limits: low must not be above high"),
]


@pytest.mark.parametrize(("changes", "problem"), REPLACEMENTS)
def test_replace_errors_have_the_path(changes: dict[str, Any], problem: str) -> None:
    """A wrong replacement is an error with the dotted path."""
    with pytest.raises(ConfigFieldError, match="^" + re.escape(problem)):
        Run().replace(**changes)


@pytest.mark.parametrize("suffix", ["json", "yaml", "yml", "toml", "JSON"])
def test_load_restores_a_saved_config(tmp_path: Path, suffix: str) -> None:
    """`load` reads the file that `save` wrote, in the format of the suffix."""
    path = tmp_path / f"run.{suffix}"
    run = Run(name="ü\r\n", data=Data(tags=["x", "y"]))
    run.save(path)
    assert Run.load(path) == Run.load(str(path)) == run
    assert os.listdir(tmp_path) == [path.name]


def test_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    """The old file stays if the new config can't be written, without a draft."""
    path = tmp_path / "run.json"
    Run().save(path)
    broken = Run(name="\ud800")
    with pytest.raises(ConfigSaveError, match="name: text can't hold"):
        broken.save(path)
    assert Run.load(path) == Run()
    assert os.listdir(tmp_path) == ["run.json"]


def test_save_removes_its_draft_on_disk_errors(tmp_path: Path) -> None:
    """The draft is removed if it can't replace the file."""
    (tmp_path / "run.json").mkdir()
    with pytest.raises(OSError, match=r"run\.json"):
        Run().save(tmp_path / "run.json")
    assert os.listdir(tmp_path) == ["run.json"]


def test_save_keeps_file_mode_and_links(tmp_path: Path) -> None:
    """A private file stays private, and a link still leads to its file."""
    target, link = tmp_path / "target.yaml", tmp_path / "link.yaml"
    target.touch()
    target.chmod(0o600)
    link.symlink_to(target)
    Run().save(link)
    assert link.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert Run.load(target) == Run()


def test_file_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    """The error names the file."""
    path = tmp_path / "run.yaml"
    path.write_bytes(b"name: \xff")
    with pytest.raises(ConfigSyntaxError, match=r"run\.yaml: expected UTF-8: .* position 6"):
        Run.load(path)
    with pytest.raises(FileNotFoundError):
        Run.load(tmp_path / "missing.yaml")


def test_documents_use_field_names_instead_of_aliases() -> None:
    """An alias is for the constructor; files are read with either name."""

    class Aliased(Config):
        batch_size: int = pydantic.Field(alias="bs")

    config = Aliased(bs=4)
    assert config.to_dict() == {"batch_size": 4}
    assert Aliased.from_dict({"batch_size": 4}) == Aliased.from_dict({"bs": 4}) == config


def test_configs_can_not_allow_unknown_fields() -> None:
    """A class that would ignore unknown fields is refused at its definition."""
    with pytest.raises(TypeError, match="a Config refuses unknown fields; drop `extra`"):

        class Loose(Config):
            model_config = pydantic.ConfigDict(extra="ignore")


def test_config_type_is_a_reserved_name() -> None:
    """A field named config_type is refused at the class definition."""
    with pytest.raises(TypeError, match="rename the field"):

        class Clashes(Config):
            config_type: str = ""


def test_errors_can_be_pickled() -> None:
    """An error of a worker process keeps its path."""
    with pytest.raises(ConfigError) as caught:
        Run.from_dict({"data": {"batch_size": "x"}})
    error = pickle.loads(pickle.dumps(caught.value))
    assert (str(error), error.location) == (str(caught.value), "data.batch_size")


def test_subclasses_of_builtin_types_are_written_as_builtins() -> None:
    """Subclasses of float or str, such as NumPy's, are written as the builtin type."""

    class Float64(float):
        pass

    class Text(str):
        __slots__ = ()

    class Numbers(Config):
        rate: float
        name: str

    config = Numbers(rate=Float64(0.5), name=Text("x"))
    assert Numbers.from_str(config.to_str("yaml"), "yaml") == config
