"""Tests of the commands ``hooks list|show|plan``."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from contextlib import suppress
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
    assert set(listed) == {*configured, "RolloutEvaluation", "SweepTrial"}
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
    assert "Runs on on_loop.\nReads metrics, model.weights, model.buffers.\n" in text
    assert "\nRequests save_weights.\n" in text
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
    lines = text.splitlines()
    assert lines[0] == "on_loop: one call of the trainer"
    assert max(map(len, lines)) <= 80
    found = next(n for n, line in enumerate(lines) if line.startswith("  - log (MetricsLogger)"))
    title, source, *effects = lines[found : found + 5]
    assert title.startswith("  - log (MetricsLogger), experiment.yaml:")
    assert source.startswith("      before, after robo_orchard_lab/.../metrics_logger.py:")
    assert [line.strip() for line in effects] == ["reads metrics", "changes files", "requests log"]
    assert any(line.startswith("      - log, when 50 steps: after robo_orch") for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["experiment.yaml"]


def test_plan_has_effects_as_data_and_as_a_flowchart(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--json has what each hook reads, changes and requests; --mermaid prints a flowchart."""
    monkeypatch.chdir(tmp_path)
    main(["config", "init"])
    printed = json.loads(shown(capsys, "hooks", "plan", "experiment.yaml", "--json"))
    effects = {each["hook"]: (each["changes"], each["requests"]) for each in printed}
    assert effects["log"] == (["files"], ["log"])
    assert "model.weights" in effects["OptimizerHook"][0]
    text = shown(capsys, "hooks", "plan", "experiment.yaml", "--mermaid")
    assert text.startswith('flowchart TB\n  subgraph on_loop["on_loop: one call')
    assert "requests log" in text
    assert main(["hooks", "plan", "experiment.yaml", "--mermaid", "--json"]) == 2
    assert "found both" in capsys.readouterr().err


def test_plan_is_text_without_rich(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a terminal without rich, the plan is the same text as in a file."""
    monkeypatch.chdir(tmp_path)
    main(["config", "init"])
    text = shown(capsys, "hooks", "plan", "experiment.yaml")
    monkeypatch.setitem(sys.modules, "rich.console", None)  # as if not installed
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown(capsys, "hooks", "plan", "experiment.yaml") == text


def test_plan_draws_boxes_in_a_terminal(tmp_path: Path) -> None:
    """In a terminal of 80 columns, the channels are nested boxes without a wrapped source."""
    command = [sys.executable, "-m", "robo_orchard_lab"]
    subprocess.run([*command, "config", "init"], cwd=tmp_path, check=True, capture_output=True)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color"}
    environment.pop("COLUMNS", None)
    with subprocess.Popen(
        [*command, "hooks", "plan", "experiment.yaml"],
        cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, env=environment,
    ) as process:  # fmt: skip
        os.close(theirs)
        parts: list[bytes] = []
        with suppress(OSError):  # the end of a terminal on Linux
            while part := os.read(ours, 65536):
                parts.append(part)
    os.close(ours)
    assert process.returncode == 0
    text = re.sub(r"\x1b\](.*?)\x1b\\|\x1b\[[0-9;]*m", "", b"".join(parts).decode())
    lines = text.splitlines()
    assert {len(line) for line in lines} == {80}
    assert lines[0].startswith("╭─ on_loop  one call of the trainer ─")
    assert any(line.startswith("│ │ │ ╭─ on_batch  ") for line in lines)


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
