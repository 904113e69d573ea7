"""The quick start of the page on the command line works as printed."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from tests.cli.running import PROGRAM, environment

from robo_orchard_lab.experiment import ExperimentConfig
from robo_orchard_lab.pipeline.run.run_state import read_run_state

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/how_to/command_line.md").read_text("utf-8")
SECTION = PAGE.split("## Train, interrupt, resume\n")[1].split("\n## ")[0]
INTERRUPTED = "# press Ctrl-C"
LONGEST_S = 240


def commands(block: str) -> list[str]:
    """Return the command lines of a block, with backslash continuations joined."""
    lines = block.replace("\\\n", "").splitlines()
    return [line for line in lines if line]


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", SECTION, re.S)
    assert found is not None
    return found[1]


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    """Return an environment with the program installed, as by pip."""
    scripts = tmp_path / "bin"
    scripts.mkdir()
    program = scripts / "robo-orchard-lab"
    python = shlex.quote(sys.executable)
    program.write_text(f'#!/bin/sh\nexec {python} -c {shlex.quote(PROGRAM)} "$@"\n', "utf-8")
    program.chmod(0o755)
    path = [str(scripts), str(Path(sys.executable).parent), os.environ["PATH"]]
    # Threads that wait for each other spin, which is slow on shared cores.
    return environment({"PATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"})


def test_pip_installs_the_program() -> None:
    """The README's program name is the entry point of the command line."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["scripts"] == {"robo-orchard-lab": "robo_orchard_lab.cli.main:main"}


def test_the_quick_start_works(tmp_path: Path, variables: dict[str, str]) -> None:
    """The quick start's commands work in order in an empty folder, with one Ctrl-C.

    They create, train with overrides, stop, resume, evaluate, export, and read with plain
    safetensors.
    """
    folder = tmp_path / "empty"
    folder.mkdir()
    lines = commands(block("text"))
    assert len([line for line in lines if line.startswith(INTERRUPTED)]) == 1
    printed = ""
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("#"):
            continue
        with subprocess.Popen(
            ["bash", "-c", line],
            cwd=folder,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            if following.startswith(INTERRUPTED):
                wait_for_text(folder / "runs/spirals/metrics.jsonl", process)
                os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all of it
            printed, stderr = process.communicate(timeout=LONGEST_S)
        assert process.returncode == (130 if following.startswith(INTERRUPTED) else 0), stderr
        if following.startswith(INTERRUPTED):
            assert read_run_state(folder / "runs/spirals").state == "preempted"
    assert sorted(printed.split()) == [
        *("layers.0.bias", "layers.0.weight", "layers.2.bias"),
        *("layers.2.weight", "layers.4.bias", "layers.4.weight"),
    ]
    assert read_run_state(folder / "runs/spirals").state == "completed"
    config = ExperimentConfig.load(folder / "runs/spirals/config.yaml")
    assert config.trainer.max_epoch == 200
    assert config.to_dict()["lr_scheduler"]["max_lr"] == 0.01
    assert str(config.hooks["log"].every) == "100 steps"

    (folder / "wide.yaml").write_text(block("yaml"), "utf-8")
    wide = ExperimentConfig.load(folder / "wide.yaml")
    assert "stats" not in wide.hooks
    assert [*wide.hooks][-1] == "clip"
    assert type(wide.optimizer).__name__ == "SGDConfig"
    for line in re.findall(r"`((?:robo-orchard-lab )?[a-z -]* wide\.yaml[^`]*)`", SECTION):
        words = ["robo-orchard-lab", *shlex.split(line.removeprefix("robo-orchard-lab "))]
        done = subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) > 10
    assert not (folder / "runs/wide").exists()


def wait_for_text(path: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a file written by a process has content."""
    ends_at = time.monotonic() + LONGEST_S
    while not (path.exists() and path.stat().st_size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < ends_at
        time.sleep(0.05)
