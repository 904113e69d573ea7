"""What all commands have in common: help with an example, JSON, short errors."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name

import click
import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from tests.cli.spirals import write_experiment

from robo_orchard_lab.cli.main import COMMANDS, main


def walk(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    """Yield the commands of a group with their names, or a single command."""
    if not isinstance(command, click.Group):
        yield name, command
        return
    for inner in command.list_commands(click.Context(command)):
        yield from walk(f"{name} {inner}", command.commands[inner])


EVERY_COMMAND = dict(
    each
    for section in COMMANDS.values()
    for name, (_, reference) in section.items()
    for each in walk(name, resolve_name(reference))
)
WITHOUT_JSON = {
    "watch": "a picture; `runs --json` has the data",
    "view": "a server",
    "schema": "prints JSON",
    "config init": "writes a file",
    "completion": "prints a script",
}
ELSEWHERE = {  # tests of their own
    *("rollout", "sweep run", "sweep show", "prove-resume", "hub push", "hub pull"),
}
JSON_OF = {
    "train": "spirals.yaml --trainer.max_epoch 1 --run_folder runs/again",
    "resume": "runs/spirals",
    "evaluate": "runs/spirals",
    "test": "runs/spirals --set val",
    "predict": "runs/spirals --data val --out predictions.jsonl",
    "export": "runs/spirals --format torch-export --data val",
    "submit": "spirals.yaml --cluster local --time 1h --dry-run",
    "report": "runs/spirals",
    "runs": "",
    "checkpoint list": "runs/spirals",
    "checkpoint show": "runs/spirals",
    "checkpoint verify": "runs/spirals",
    "checkpoint export": "runs/spirals",
    "checkpoint prune": "runs/spirals --keep-last 1 --dry-run",
    "config check": "spirals.yaml",
    "config show": "spirals.yaml",
    "config diff": "spirals.yaml runs/spirals/config.yaml",
    "hooks list": "",
    "hooks show": "EMA",
    "hooks plan": "spirals.yaml",
    "doctor": "",
}
MISSING = {  # arguments for a path that does not exist
    "train": "nowhere.yaml",
    "resume": "nowhere",
    "evaluate": "nowhere",
    "test": "nowhere",
    "predict": "nowhere --data val --out predictions.jsonl",
    "export": "nowhere --format torch-export --data val",
    "rollout": "nowhere",
    "submit": "nowhere.yaml --cluster local --time 1h",
    "sweep run": "nowhere.yaml --space space.yaml --trials 1",
    "sweep show": "nowhere",
    "prove-resume": "nowhere.yaml",
    "report": "nowhere",
    "runs": "nowhere",
    "watch": "nowhere",
    "view": "nowhere",
    "checkpoint list": "nowhere",
    "checkpoint show": "nowhere",
    "checkpoint verify": "nowhere",
    "checkpoint export": "nowhere",
    "checkpoint prune": "nowhere --keep-last 1",
    "hub push": "nowhere --repo me/model",
    "config init": "nowhere/experiment.yaml",
    "config check": "nowhere.yaml",
    "config show": "nowhere.yaml",
    "config diff": "nowhere.yaml spirals.yaml",
    "schema": "--output nowhere/schema.json",
    "hooks show": "Nowhere",
    "hooks plan": "nowhere.yaml",
    "completion": "nowhere",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an experiment file and its run."""
    folder = tmp_path_factory.mktemp("commands")
    write_experiment(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "spirals.yaml", "--trainer.max_epoch", "1"]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()
    return folder


@pytest.mark.parametrize("name", EVERY_COMMAND)
def test_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Help exits with 0, and its examples are options of the command."""
    assert main([*name.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    short = name.removesuffix(" run")
    examples = [line.split() for line in shown.splitlines() if f"robo-orchard-lab {short}" in line]
    command = EVERY_COMMAND[name]
    assert len(examples) > 1, "only the usage"
    known = {option for each in command.params for option in each.opts} | {"--nproc-per-node"}
    used = {word.partition("=")[0] for line in examples for word in line if word[:2] == "--"}
    assert not {word for word in used if "." not in word} - known - {"--run_folder"}


def test_every_command_is_tested() -> None:
    """Each command has JSON and an error for a missing path, or a reason not to."""
    with_json = {
        name
        for name, command in EVERY_COMMAND.items()
        if any("--json" in each.opts for each in command.params)
    }
    assert with_json == {*JSON_OF, *ELSEWHERE}
    assert EVERY_COMMAND.keys() == with_json | WITHOUT_JSON.keys()
    assert EVERY_COMMAND.keys() - MISSING.keys() == {"hooks list", "doctor", "hub pull"}


@pytest.mark.parametrize("name", JSON_OF)
def test_json_is_one_document(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Standard output has one JSON document, without NaN, and nothing else."""
    monkeypatch.chdir(folder)
    capsys.readouterr()
    assert main([*name.split(), *shlex.split(JSON_OF[name]), "--json"]) == 0
    document = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert document or name == "config diff"


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_path_is_a_short_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A path or name that does not exist exits with 2, names it in a line, and writes nothing."""
    write_experiment(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    assert main([*name.split(), *shlex.split(MISSING[name])]) == 2
    shown = capsys.readouterr()
    lines = (shown.err or shown.out).splitlines()
    assert "error: " in lines[0]
    assert "nowhere" in lines[0].lower()
    assert len(lines) <= 2
    assert "Traceback" not in shown.err
    assert sorted(tmp_path.rglob("*")) == before
