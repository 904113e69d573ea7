"""Configs from command line and environment."""

from __future__ import annotations

import argparse
import enum
import logging
import operator
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, Optional

import pydantic
import pydantic_settings
import pytest
from pydantic import Field

from robo_orchard_core.utils.cli import SettingConfig, pydantic_from_argparse
from robo_orchard_core.utils.config import ClassConfig, Config, ConfigInstanceOf


class Mode(enum.Enum):
    FAST = "fast"
    EXACT = "exact"


class Dataset(SettingConfig):
    data_root: Optional[str] = Field(  # noqa: UP045 - as users write it
        description="Where the images are; 100% of them.", default=None
    )
    pipeline_test: bool = Field(description="Use dummy data.", default=False)
    sizes: list[int] = Field(description="Sizes to train at.", default=[224])

    def __post_init__(self) -> None:
        if not self.pipeline_test and self.data_root is None:
            raise ValueError("data_root must be given unless pipeline_test is set")


class Hook:
    """Class named by files and options."""


class HookConfig(ClassConfig[Hook]):
    class_type: type[Hook] = Hook
    every_steps: int = 5


class Trainer(SettingConfig):
    dataset: Dataset = Field(description="The data.")
    batch_size: int = Field(description="Images in a batch.", default=128)
    rate: float | None = Field(description="Learning rate.", default=0.1)
    mode: Mode = Field(description="How to train.", default=Mode.FAST)
    optimizer: Literal["sgd", "adam"] = Field(description="Which one.", default="sgd")
    workspace: Path = Field(description="Output directory.", default=Path("workspace"))
    tags: dict[str, int] = Field(description="Anything.", default={})
    hook: ConfigInstanceOf[HookConfig] = Field(
        description="A hook.", default=HookConfig(every_steps=7)
    )
    anything: Any = Field(description="What you like.", default=None)


def parse(*args: str, cls: type[Any] = Trainer, parser: Any = None) -> Any:
    """Return the config for the arguments."""
    return pydantic_from_argparse(cls, parser or argparse.ArgumentParser("prog"), args)


TEST = "--dataset.pipeline_test"


def test_defaults_apply_without_options() -> None:
    """The result equals the config built in code."""
    assert parse(TEST) == Trainer(dataset=Dataset(pipeline_test=True))


def test_nested_options_set_nested_fields() -> None:
    """Every field has an option, with a dot per level."""
    config = parse("--dataset.data_root", "a b", "--batch_size=4", "--hook.every_steps", "3")
    assert config == Trainer(
        dataset=Dataset(data_root="a b"), batch_size=4, hook=HookConfig(every_steps=3)
    )


def test_nested_option_keeps_other_fields_of_the_default() -> None:
    """Other fields of a non-standard default config are kept."""

    class Outer(SettingConfig):
        dataset: Dataset = Dataset(pipeline_test=True, sizes=[1])

    config = parse("--dataset.data_root", "x", cls=Outer)
    assert config.dataset == Dataset(pipeline_test=True, sizes=[1], data_root="x")


VALUES: list[tuple[list[str], str, Any]] = [
    (["--rate", "1e-3"], "rate", 0.001),
    (["--rate", "null"], "rate", None),
    (["--mode", "exact"], "mode", Mode.EXACT),
    (["--optimizer", "adam"], "optimizer", "adam"),
    (["--workspace", "/x"], "workspace", Path("/x")),
    (["--tags", '{"a": 1}'], "tags", {"a": 1}),
    (["--anything", "[1, null]"], "anything", [1, None]),
    (["--anything", "text"], "anything", "text"),
    (["--batch_size", "1", "--batch_size", "2"], "batch_size", 2),
    (
        ["--hook", '{"every_steps": 2}', "--hook.every_steps", "3"],
        "hook",
        HookConfig(every_steps=3),
    ),
    (["--hook", '{"every_steps": 2}'], "hook", HookConfig(every_steps=2)),
]


@pytest.mark.parametrize(("args", "field", "value"), VALUES)
def test_values_are_parsed_by_field_type(args: list[str], field: str, value: Any) -> None:
    """Text becomes the declared type; lists, mappings and configs are JSON."""
    assert operator.attrgetter(field)(parse(TEST, *args)) == value


@pytest.mark.parametrize(
    ("args", "sizes"),
    [
        (["--dataset.sizes", "1", "--dataset.sizes", "2"], [1, 2]),
        (["--dataset.sizes", "[1, 2]"], [1, 2]),
        (["--dataset.sizes", "1", "--dataset.sizes", "[]"], []),
    ],
)
def test_list_is_typed_as_items_or_json(args: list[str], sizes: list[int]) -> None:
    """A repeated option adds an item; JSON replaces the list."""
    assert parse(TEST, *args).dataset.sizes == sizes


@pytest.mark.parametrize(("args", "on"), [([], True), (["true"], True), (["false"], False)])
def test_boolean_option_needs_no_value(args: list[str], on: bool) -> None:
    """A bool is set by its name alone or by a value."""
    config = parse("--dataset.data_root", "x", TEST, *args)
    assert config.dataset.pipeline_test is on


def test_text_fields_keep_text_that_looks_like_json() -> None:
    """A directory may be named `[1]` or `null`; null needs a field that admits None."""

    class Named(SettingConfig):
        name: str

    assert parse("--name", "[1]", cls=Named).name == "[1]"
    assert parse("--name", "null", cls=Named).name == "null"
    assert parse("--dataset.data_root", "null", TEST).dataset.data_root is None


def test_lists_of_configs_are_json() -> None:
    """Each item of a list may be an object."""

    class Many(Config):
        hooks: list[HookConfig] | None = None

    config = parse("--hooks", '{"every_steps": 1}', "--hooks", "{}", cls=Many)
    assert config == Many(hooks=[HookConfig(every_steps=1), HookConfig()])
    assert parse("--hooks", "null", cls=Many) == Many()


class Node(Config):
    size: int = 1
    below: Optional[Node] = None  # noqa: UP045 - as users write it


def test_recursive_class_is_unrolled_once() -> None:
    """Deeper levels are typed as JSON."""
    config = parse("--size", "2", "--below", '{"below": {"size": 3}}', cls=Node)
    assert config == Node(size=2, below=Node(below=Node(size=3)))


def test_parsers_own_arguments_stay_usable() -> None:
    """A script's arguments and the config's options coexist."""
    parser = argparse.ArgumentParser()
    parser.add_argument("batch_size")
    parser.add_argument("--resume", default="auto")
    args = ["mine", "--resume", "no", TEST, "--batch_size", "4"]
    assert parse(*args, parser=parser).batch_size == 4
    own = parser.parse_args(args)
    assert (own.batch_size, own.resume) == ("mine", "no")


def test_sys_argv_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without arguments, `sys.argv` is parsed."""
    monkeypatch.setattr(sys, "argv", ["prog", TEST, "--batch_size", "9"])
    assert pydantic_from_argparse(Trainer, argparse.ArgumentParser()).batch_size == 9


def test_help_shows_description_type_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    """Help shows all facts about a field."""
    parser = argparse.ArgumentParser(
        "prog", formatter_class=lambda prog: argparse.HelpFormatter(prog, width=200)
    )
    with pytest.raises(SystemExit) as caught:
        parse("--help", parser=parser)
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert text.startswith("usage: prog [-h] [--FIELD VALUE ...]\n")
    for line in (
        "--dataset JSON ",
        "The data. (type: Dataset, required) [env: DATASET]",
        "Where the images are; 100% of them. (type: str | null, default: null) "
        "[env: DATASET__DATA_ROOT]",
        "--dataset.pipeline_test [VALUE]",
        "Use dummy data. (type: bool, default: false)",
        "Sizes to train at. (type: list of int, default: [224])",
        "Images in a batch. (type: int, default: 128)",
        "Learning rate. (type: float | null, default: 0.1)",
        "How to train. (type: 'fast' | 'exact', default: \"fast\")",
        "Which one. (type: 'sgd' | 'adam', default: sgd)",
        'Output directory. (type: Path, default: "workspace")',
        "Anything. (type: int by name, default: {})",
        "A hook. (type: HookConfig, default: a HookConfig)",
        '(type: type[Hook], default: "tests.core.test_cli:Hook")',
        "(type: int, default: 7) [env: HOOK__EVERY_STEPS]",
    ):
        assert line in text


def test_help_shows_unserializable_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    """Computed and unserializable defaults don't break the help."""

    def fails() -> Dataset:
        return Dataset()

    class Odd(Config):
        made: Dataset = Field(default_factory=fails)
        size: int = Field(default_factory=lambda: 3)
        odd: Any = Field(default=float("inf"), validate_default=False)

    with pytest.raises(SystemExit):
        parse("--help", cls=Odd)
    text = " ".join(capsys.readouterr().out.split())
    assert "--made JSON (type: Dataset, default: made when needed)" in text
    assert "--size VALUE (type: int, default: 3)" in text
    assert "--odd VALUE (type: anything, default: inf)" in text
    assert parse("--made.data_root", "x", cls=Odd).made == Dataset(data_root="x")


WRONG = [
    ([TEST, "--batch_size", "x"], "argument --batch_size: Input should be a valid integer"),
    ([TEST, "--dataset.sizes", "x"], "argument --dataset.sizes: 0: Input should be a valid int"),
    ([TEST, "--mode", "slow"], "argument --mode: Input should be 'fast' or 'exact'"),
    ([TEST, "--tags", "{"], "argument --tags: broken JSON"),
    ([TEST, "--tags", '{"a": 1, "a": 2}'], "argument --tags: a: the key occurs twice"),
    ([TEST, "--dataset", '{"size": 1}'], "argument --dataset: size: Dataset has no such field"),
    ([TEST, "--hook.class_type", "os:system"], "argument --hook.class_type: the reference"),
    ([TEST, "--rate", "nan"], "argument --rate: Input should be a finite number"),
    ([], "argument --dataset: a value is required here"),
    (["--batch_size", "4"], "argument --dataset: a value is required here"),
    (["--dataset.sizes", "4"], "argument --dataset: data_root must be given unless pipeline_test"),
    ([TEST, "--batch_sizes", "4"], "unrecognized arguments: --batch_sizes 4"),
    ([TEST, "--batch_size"], "argument --batch_size: expected one argument"),
]


@pytest.mark.parametrize(("args", "problem"), WRONG)
def test_wrong_option_is_reported_in_one_line(
    args: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code is 2, with at most two lines that name the option."""
    with pytest.raises(SystemExit) as caught:
        parse(*args)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert f"prog: error: {problem}" in error
    assert len(error.splitlines()) <= 2


def test_rule_across_fields_is_reported_with_the_class(capsys: pytest.CaptureFixture[str]) -> None:
    """The config's class is named if no option is wrong."""
    with pytest.raises(SystemExit):
        parse(cls=Dataset)
    assert "prog: error: Dataset: data_root must be given" in capsys.readouterr().err


def test_command_line_overrides_the_environment(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The order is command line, environment, default; variables in use are logged."""
    monkeypatch.setenv("BATCH_SIZE", "2")
    monkeypatch.setenv("RATE", "0.2")
    monkeypatch.setenv("DATASET__DATA_ROOT", "from environment")
    monkeypatch.setenv("DATASET__SIZES", "[5]")
    config = parse("--rate", "0.3", "--dataset.data_root", "typed")
    assert config == Trainer(dataset=Dataset(data_root="typed", sizes=[5]), batch_size=2, rate=0.3)
    assert "--batch_size is set by the environment variable BATCH_SIZE" in caplog.messages
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    whole = parse("--dataset", '{"pipeline_test": true}')
    assert whole.dataset == Dataset(pipeline_test=True)


def test_wrong_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names the variable instead of an option."""
    monkeypatch.setenv("BATCH_SIZE", "x")
    with pytest.raises(SystemExit) as caught:
        parse(TEST)
    assert caught.value.code == 2
    assert "error: environment variable BATCH_SIZE: Input should" in capsys.readouterr().err


def test_prefix_excludes_variables_of_other_programs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Only variables with the prefix are read, without a warning."""

    class Mine(SettingConfig):
        model_config = pydantic_settings.SettingsConfigDict(env_prefix="mine_")

        size: int = 1
        path: str = "x"

    monkeypatch.setenv("SIZE", "2")
    monkeypatch.setenv("MINE_PATH", "y")
    with caplog.at_level(logging.INFO):
        assert parse(cls=Mine) == Mine(path="y")
    assert [record.levelno for record in caplog.records] == [logging.INFO]


def test_code_and_files_ignore_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment variables don't change configs that are built or loaded."""
    monkeypatch.setenv("DATA_ROOT", "surprise")
    monkeypatch.setenv("DATASET__DATA_ROOT", "surprise")
    monkeypatch.setenv("BATCH_SIZE", "1")
    config = Trainer(dataset=Dataset(pipeline_test=True))
    assert (config.dataset.data_root, config.batch_size) == (None, 128)
    assert Trainer.from_str(config.to_str("toml"), "toml") == config
    assert Trainer.from_dict({"dataset": {"pipeline_test": True}}) == config
    with pytest.raises(pydantic.ValidationError, match="data_root must be given"):
        Dataset()


def test_plain_config_ignores_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a SettingConfig has variables; any config has options."""
    monkeypatch.setenv("EVERY_STEPS", "9")
    assert parse("--class_type", "tests.core.test_cli:Hook", cls=HookConfig) == HookConfig()


def test_setting_config_is_config_and_base_settings() -> None:
    """Both base classes work, and Config's rules take precedence."""
    assert issubclass(SettingConfig, Config)
    assert issubclass(SettingConfig, pydantic_settings.BaseSettings)
    dataset = Dataset(pipeline_test=True)
    with pytest.raises(pydantic.ValidationError):
        dataset.pipeline_test = "perhaps"  # type: ignore[assignment]  # the error is the point
    assert pydantic_settings.CliApp.run(Dataset, [TEST.replace("dataset.", ""), "true"]) == dataset


def test_caller_may_extend_the_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An option may name code that the caller trusts."""
    (tmp_path / "team_hooks.py").write_text(
        f"import {__name__} as base\nclass TeamHook(base.Hook):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = pydantic_from_argparse(
        HookConfig,
        argparse.ArgumentParser(),
        ["--class_type", "team_hooks:TeamHook"],
        trust="team_hooks",
    )
    assert config.class_type.__name__ == "TeamHook"
    del sys.modules["team_hooks"]


SCRIPT = """
import argparse
from pydantic import Field
from robo_orchard_core.utils.cli import SettingConfig, pydantic_from_argparse

class Data(SettingConfig):
    root: str = Field(description="Where.")

class Train(SettingConfig):
    data: Data
    batch_size: int = 128

print(repr(pydantic_from_argparse(Train, argparse.ArgumentParser())))
"""


def test_script_runs_with_options(tmp_path: Path) -> None:
    """Options and variables result in a config or one line of error."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "error", str(script), *args],
            env={**os.environ, "BATCH_SIZE": "3"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    good = run("--data.root", "images")
    assert good.stdout == "Train(data=Data(root='images'), batch_size=3)\n"
    bad = run("--batch_size", "x", "--data.root", "y")
    assert bad.returncode == 2
    warning, error = bad.stderr.splitlines()
    assert warning == "--batch_size is set by the environment variable BATCH_SIZE"
    assert error.startswith("train.py: error: argument --batch_size: ")


def test_subclass_defaults_have_options() -> None:
    """Fields of a default of a subclass are options too."""

    class Special(HookConfig):
        volume: int = 1

    class Outer(SettingConfig):
        hook: HookConfig = Special()

    assert parse("--hook.volume", "3", cls=Outer).hook == Special(volume=3)


def test_own_usage_of_the_parser_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    """A usage text set by the script is kept."""
    with pytest.raises(SystemExit):
        parse("--nothing", parser=argparse.ArgumentParser(usage="train it"))
    assert capsys.readouterr().err.startswith("usage: train it\n")
