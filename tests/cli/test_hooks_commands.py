"""Tests of the commands ``hooks list|show|plan``."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent

import pytest
import yaml

from robo_orchard_lab.cli.main import main
from robo_orchard_lab.experiment.inspection import hook_names
from robo_orchard_lab.pipeline import hooks as built_in


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_all_built_in_hooks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """Each hook with a config class is listed with a description."""
    lines = shown(capsys, "hooks", "list").splitlines()
    assert lines[0].split() == ["HOOK", "DOES"]
    listed = [line.split()[0] for line in lines[1:]]
    configured = {name.removesuffix("Config") for name in built_in.__all__ if "Config" in name}
    assert set(listed) == configured
    assert all(len(line.split()) > 3 for line in lines[1:])
    printed = json.loads(shown(capsys, "hooks", "list", "--json"))
    assert [each["name"] for each in printed] == listed


def test_a_hook_is_shown_with_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    """show prints description, channels, fields and an entry for a file."""
    text = shown(capsys, "hooks", "show", "KeepBest")
    assert text.startswith(
        "KeepBest  robo_orchard_lab.pipeline.hooks.keep_best:KeepBest\nFile with"
    )
    assert ">>>" not in text
    assert "Runs on on_loop.\n" in text
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "FIELD TYPE DEFAULT IS" in rows
    assert (
        "mode 'min' | 'max' required Best value: the smallest ('min') or the largest ('max')."
        in rows
    )
    assert "min_delta float 0.0 Least improvement; a smaller one does not count." in rows
    entry = yaml.safe_load(text[text.index("  hooks:\n") :])
    assert entry["hooks"]["keep_best"]["class_type"] == "KeepBest"
    printed = json.loads(shown(capsys, "hooks", "show", "KeepBest", "--json"))
    assert (printed["channels"], printed["fields"][0]["path"]) == (["on_loop"], "monitor")


def test_a_trusted_hook_is_shown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook of a trusted package is shown; an untrusted package is not imported."""
    (tmp_path / "my_shown_hooks.py").write_text(
        "from robo_orchard_lab.pipeline.hooks.mixin import *\n"
        "print('imported')\n"
        "class Mine(PipelineHooks):\n"
        '    """Does what I want."""\n'
        "    def __init__(self, often: int, name: str = 'x') -> None:\n"
        "        super().__init__()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["hooks", "show", "my_shown_hooks:Mine"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        "error: 'my_shown_hooks:Mine' is not trusted; if you trust its code, pass --trust "
        "my_shown_hooks\n"
    )
    text = shown(capsys, "hooks", "show", "my_shown_hooks:Mine", "--trust", "my_shown_hooks")
    assert "Does what I want.\n" in text
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "often int required" in rows
    assert "name str x" in rows


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("StatMonitor", "error: there is no hook 'StatMonitor'; did you mean 'StatsMonitor'?\n"),
        ("zzz", "error: there is no hook 'zzz'; there are ClearCacheHook, EarlyStopping, EMA, "),
        ("torch.optim:SGD", "error: expected a subclass of PipelineHooks, found 'torch."),
    ],
)
def test_an_unknown_hook_is_an_error(
    name: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A misspelled name gets a suggestion; a class that is no hook is refused."""
    assert main(["hooks", "show", name]) == 2
    assert said in capsys.readouterr().err


def test_plan_shows_the_hooks_of_a_file_in_order(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """plan shows channels, order, triggers and source lines, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    main(["config", "init"])
    typed = ["--hooks.log.every", "7 steps", "--hooks.loss=null"]
    printed = json.loads(shown(capsys, "hooks", "plan", "experiment.yaml", "--json", *typed))
    on_step = [each for each in printed if each["channel"] == "on_step"]
    assert [each["hook"] for each in on_step] == ["OptimizerHook", "bar", "log", "stats"]
    assert [each["position"] for each in on_step] == [0, 1, 2, 3]
    assert on_step[0]["defined_in"] == "the trainer"
    log = on_step[2]
    assert (log["when"], log["class_name"], log["before"]) == ("7 steps", "MetricsLogger", None)
    assert log["defined_in"].startswith("experiment.yaml:")
    assert "metrics_logger.py:" in log["after"]
    innermost = [each for each in printed if each["channel"] == "on_loop"][-1]
    assert (innermost["hook"], innermost["class_name"]) == ("checkpoint", "SaveCheckpoint")
    assert innermost["defined_in"].startswith("experiment.yaml:")
    text = Path("experiment.yaml").read_text()
    Path("experiment.yaml").write_text(text.replace("checkpoint: {every", "# checkpoint: {every"))
    printed = json.loads(shown(capsys, "hooks", "plan", "experiment.yaml", "--json"))
    assert {each["defined_in"] for each in printed if each["hook"] == "checkpoint"} == {"default"}
    text = shown(capsys, "hooks", "plan", "experiment.yaml")
    assert text.splitlines()[0].split() == [
        "CHANNEL", "HOOK", "CLASS", "WHEN", "CALLS", "DEFINED", "IN", "CODE"
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["experiment.yaml"]


@pytest.mark.parametrize("name", hook_names())
def test_the_shown_entry_is_valid_in_a_file(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entry of each hook makes a valid experiment, and its channels are known."""
    monkeypatch.chdir(tmp_path)
    main(["config", "init", "base.yaml"])
    text = shown(capsys, "hooks", "show", name)
    assert "\nRuns on on_" in text
    entry = text[text.index("In a file:\n") :].removeprefix("In a file:\n")
    Path("own.yaml").write_text("base: base.yaml\ncheckpoint: {keep_last: 1}\n" + dedent(entry))
    capsys.readouterr()
    code = main(["config", "check", "own.yaml"])
    assert (code, capsys.readouterr().out) == (0, "own.yaml: ok\n")
