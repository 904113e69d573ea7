"""Tests of FILE, ``--trust`` and field options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest

from robo_orchard_lab.cli import main as program
from robo_orchard_lab.cli.errors import CommandError, error_lines
from robo_orchard_lab.cli.experiment_arguments import (
    ExperimentArguments,
    ExperimentCommand,
    file_argument,
)
from robo_orchard_lab.cli.main import main

got: list[tuple[Path, bool, str | None, ExperimentArguments]] = []


@click.command("take", cls=ExperimentCommand, lists_fields=True)
@file_argument
@click.option("--flag", is_flag=True, help="A flag.")
@click.option("-o", "--output", help="A text.")
def take(file: Path, flag: bool, output: str | None, experiment: ExperimentArguments) -> None:
    """Take all that there is."""
    got.append((file, flag, output, experiment))


@pytest.fixture(autouse=True)
def _only_this_command(monkeypatch: pytest.MonkeyPatch) -> None:
    got.clear()
    monkeypatch.setattr(program, "_program", lambda: take)


def taken(*arguments: str) -> tuple[Path, bool, str | None, ExperimentArguments]:
    assert main(arguments) == 0
    return got.pop()


@pytest.mark.parametrize(
    "arguments",
    [
        ["a.yaml", "--seed", "3", "--hooks.bar=null", "--flag", "--trust", "x", "--trust=y"],
        ["--seed=3", "--trust", "x", "--hooks.bar", "null", "--flag", "a.yaml", "--trust", "y"],
        ["--flag", "--trust=x", "--seed", "3", "--trust", "y", "--hooks.bar=null", "--", "a.yaml"],
    ],
)
def test_fields_options_and_file_may_have_any_order(arguments: list[str]) -> None:
    """Fields, with a space or an equals sign, are recognized anywhere."""
    file, flag, output, experiment = taken(*arguments)
    assert (file, flag, output) == (Path("a.yaml"), True, None)
    assert experiment.trust == ("x", "y")
    assert [(o.path, o.value) for o in experiment.overrides] == [
        (("seed",), 3),
        (("hooks", "bar"), None),
    ]


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        (["--optimizer.lr", "-1"], -1),
        (["--optimizer.lr", "-1e-3"], -1e-3),
        (["--name=--odd"], "--odd"),
        (["--name", "a b"], "a b"),
        (["--data.evaluation", "{}"], {}),
        (["--name=a=b"], "a=b"),
        (["--name="], None),
    ],
)
def test_values_may_look_like_options(typed: list[str], value: Any) -> None:
    """A value may start with one dash, and after an equals sign with any text."""
    *_, experiment = taken("a.yaml", *typed)
    assert [override.value for override in experiment.overrides] == [value]


def test_options_keep_their_values() -> None:
    """The value of an option of the command is never a field."""
    _, _, output, experiment = taken("a.yaml", "--output", "--seed", "-o", "--seed")
    assert (output, experiment.overrides) == ("--seed", ())


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--sed", "3"], "there is no option or field --sed; did you mean --seed?"),
        (["--flagg"], "there is no option or field --flagg; did you mean --flag?"),
        (
            ["--trainr.max_epoch=3"],
            "--trainr.max_epoch; did you mean --trainer.max_epoch?",
        ),
        (
            ["--hoks.bar.every", "x"],
            "--hoks.bar.every; did you mean --hooks.bar.every?",
        ),
        (
            ["--run-folder", "x"],
            "--run-folder; did you mean --run_folder?",
        ),
        (["--base", "x.yaml"], "there is no option or field --base; see --help"),
        (["--zzz"], "there is no option or field --zzz; see --help"),
        (["--seed"], "--seed requires a value, as in --seed=VALUE"),
        (["--seed", "--flag"], "--seed requires a value, as in --seed=VALUE"),
        (["--output"], "option '--output' requires an argument"),
        (["--trainer..x=3"], "expected keys with dots between them"),
        (["--seed=[1"], "error: --seed: "),
    ],
)
def test_a_misspelled_option_gets_a_suggestion(
    typed: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The nearest option or field is suggested; nothing is done."""
    assert main(["a.yaml", *typed]) == 2
    assert said in capsys.readouterr().err
    assert got == []


def test_help_lists_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    """Help shows description, type and default of each field."""
    assert main(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Usage: robo-orchard-lab [OPTIONS] [--FIELD VALUE ...] FILE" in shown
    assert "--seed Seed of weights, sample order and noise. (int; default: 0)" in shown
    assert "--model Module to train;" in shown
    assert "(Module | null; required)" in shown
    assert "--data.train.batch_size Samples per batch of one process; null: dataset" in shown
    assert "('batch' | 'sample' | 'none'; default: batch)" in shown
    assert "(SaveCheckpoint's fields | null; default: {})" in shown


def test_a_missing_file_gets_a_suggestion(tmp_path: Path) -> None:
    """The nearest name of an existing file is suggested."""
    (tmp_path / "digits.yaml").write_text("name: x")
    (tmp_path / "digits.txt").write_text("name: x")
    with pytest.raises(CommandError) as caught:
        ExperimentArguments().read(tmp_path / "digit.yml")
    assert error_lines(caught.value) == [
        f"error: there is no file {tmp_path}/digit.yml",
        f"       did you mean {tmp_path}/digits.yaml?",
    ]


def test_options_override_the_environment_and_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line overrides the environment, which overrides the file."""
    (tmp_path / "a.yaml").write_text("name: file\nseed: 1\nresume: auto\n")
    monkeypatch.setenv("ROBO_ORCHARD_LAB__SEED", "2")
    monkeypatch.setenv("ROBO_ORCHARD_LAB__NAME", "environment")
    *_, experiment = taken(str(tmp_path / "a.yaml"), "--seed", "3")
    read = experiment.read(tmp_path / "a.yaml")
    assert read.document == {"name": "environment", "seed": 3, "resume": "auto"}
    assert [str(read.leaf_origins[(name,)]) for name in ("seed", "name", "resume")] == [
        "command line: --seed",
        "environment: ROBO_ORCHARD_LAB__NAME",
        f"{tmp_path}/a.yaml:3",
    ]
