"""Tests of the command ``completion``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.running import PROGRAM, environment

from robo_orchard_lab.cli.main import main

BASH = """
source <(robo-orchard-lab completion bash)
complete -p robo-orchard-lab >/dev/null || exit 9
complete_words() {
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
    _robo_orchard_lab_completion robo-orchard-lab
    echo "${COMPREPLY[@]}"
}
"""


@pytest.fixture
def path_with_program(tmp_path: Path) -> str:
    """A PATH on which the program is found by its name."""
    (tmp_path / "program.py").write_text(PROGRAM)
    script = tmp_path / "robo-orchard-lab"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/program.py "$@"\n')
    script.chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


def completed(words: str, path: str, cwd: Path) -> str:
    done = subprocess.run(
        ["bash", "-c", f"{BASH}\ncomplete_words {words}"],
        env=environment({"PATH": path}),
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.strip()


def test_bash_completes_commands(path_with_program: str, tmp_path: Path) -> None:
    """The printed script completes commands and options in bash."""
    assert completed("robo-orchard-lab doc", path_with_program, tmp_path) == "doctor"
    assert completed("robo-orchard-lab doctor --js", path_with_program, tmp_path) == "--json"
    assert completed("robo-orchard-lab completion z", path_with_program, tmp_path) == "zsh"


def test_bash_completes_hooks_fields_and_files(path_with_program: str, tmp_path: Path) -> None:
    """The printed script completes hook names, fields of experiments and file names in bash."""
    (tmp_path / "digits.yaml").write_text("")

    def of(words: str) -> str:
        return completed(f"robo-orchard-lab {words}", path_with_program, tmp_path)

    assert of("hooks show Stat") == "StatsMonitor"
    assert of("config show --trainer.max_s") == "--trainer.max_step"
    assert of("config show --trust x --origins --hook") == "--hooks"
    # An empty answer of this kind makes bash complete files itself.
    answer = subprocess.run(
        ["robo-orchard-lab"],
        env=environment(
            {
                "PATH": path_with_program,
                "COMP_WORDS": "robo-orchard-lab config show --seed 3 dig",
                "COMP_CWORD": "5",
                "_ROBO_ORCHARD_LAB_COMPLETE": "bash_complete",
            }
        ),
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout == "file,dig\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_accepts_its_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The script names the program; an installed shell finds no syntax error in it."""
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "robo-orchard-lab" in script
    assert f"_ROBO_ORCHARD_LAB_COMPLETE={shell}_complete" in script
    if (found := shutil.which(shell)) is not None:
        subprocess.run([found, "-n", "-c", script], check=True, capture_output=True)
