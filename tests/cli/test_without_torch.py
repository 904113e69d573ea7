"""Commands that import neither torch nor accelerate."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.cli.running import environment

from robo_orchard_lab.cli.main import main
from robo_orchard_lab.experiment.inspection import hook, hook_names, hook_summaries
from robo_orchard_lab.pipeline.checkpoint import CheckpointStore

EACH_COMMAND = """
import json, sys
from robo_orchard_lab.cli.main import main
for command in json.loads(sys.argv[1]):
    code = main(command)
    print(code, "torch" in sys.modules, "accelerate" in sys.modules, *command, file=sys.stderr)
"""

RUNS = 50
COMMANDS = [
    ["hooks", "list"],
    ["checkpoint", "list", "run"],
    ["checkpoint", "list", "run/checkpoints", "--json"],
    ["checkpoint", "list", "runs/7"],
    ["runs", "runs"],
    ["config", "init"],
    ["train", "--help"],
    ["config", "check", "--help"],
]


def test_inventories_import_no_torch(tmp_path: Path) -> None:
    """Lists of hooks, of checkpoints and of runs import neither torch nor accelerate."""
    with CheckpointStore(tmp_path / "run" / "checkpoints") as store:
        trainer = {"progress": {"version": 1, "epoch_id": 3}, "best": torch.ones(2)}
        store.save(7, {"model": {"weight": torch.ones(2)}, "trainer": trainer})
    write_runs(tmp_path)
    done = run_each(COMMANDS, tmp_path)
    expected = [f"0 False False {' '.join(command)}" for command in COMMANDS]
    assert done.stderr.splitlines() == expected
    lines = done.stdout.splitlines()
    listed = next(line for line in lines if line.startswith("7 "))
    assert listed.split()[:2] == ["7", "3"]  # the step and the epoch
    assert "complete" in listed
    assert sum(" completed " in line for line in lines) == RUNS


def write_runs(folder: Path) -> None:
    """Write runs in `folder`/runs, copies of a trained one."""
    run = folder / "runs" / "0"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["config", "init", "first.yaml"]) == 0
        options = ["--hooks.report=null", "--trainer.max_step", "2", "--run_folder", "runs/0"]
        assert main(["train", "first.yaml", *options]) == 0
    for number in range(1, RUNS):
        shutil.copytree(run, run.with_name(str(number)))


def run_each(commands: list[list[str]], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run commands in a process that prints the exit code and the imports of each."""
    return subprocess.run(
        [sys.executable, "-c", EACH_COMMAND, json.dumps(commands)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )


MISTAKES = {
    "--trainer.max_epoch=one": "trainer.max_epoch",
    "--trainer.max_epochs=1": "trainer.max_epochs",
    "--data.train.num_workers=-1": "data.train.num_workers",
    "--data.order.keyed_by=bach": "data.order.keyed_by",
    "--accelerator.mixed_precision=bf8": "accelerator.mixed_precision",
    "--init_from.path=": "init_from.path",
    "--optimizer.class_type=torch.optim:AdamV": "optimizer.class_type",
    "--hooks.bar.class_type=ProgresBarHook": "hooks.bar.class_type",
}


def test_a_mistake_in_a_file_is_found_without_torch(tmp_path: Path) -> None:
    """`train` refuses wrong names and values of the file's own fields before torch is imported."""
    commands = [["config", "init", "a.yaml"], *(["train", "a.yaml", wrong] for wrong in MISTAKES)]
    lines = run_each(commands, tmp_path).stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == len(MISTAKES)
    for (typed, field), error in zip(MISTAKES.items(), errors, strict=True):
        assert f": --{field}: " in error or f"--{field}" in error, error
        assert f"2 False False train a.yaml {typed}" in lines


def test_check_prints_mistakes_before_it_imports_code(tmp_path: Path) -> None:
    """Errors of the file's own fields are printed first, those of arguments after the import."""
    Path(tmp_path, "own_parts.py").write_text(
        "import pathlib, time\n"
        "until = time.monotonic() + 60\n"
        "while not pathlib.Path('first_line_was_read').exists():\n"
        "    assert time.monotonic() < until\n"
        "    time.sleep(0.01)\n"
        "import torch\n"
        "class Net(torch.nn.Linear):\n"
        "    def __init__(self, width: int) -> None:\n"
        "        super().__init__(2, width)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert main(["config", "init", "base.yaml"]) == 0
    Path(tmp_path, "own.yaml").write_text(
        "base: base.yaml\nmodel: {class_type: own_parts:Net, width: wide}\nseed: -1\n"
    )
    command = ["-m", "robo_orchard_lab", "config", "check", "own.yaml", "--trust", "own_parts"]
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        Path(tmp_path, "first_line_was_read").touch()
        rest = process.stdout.read().splitlines()
    assert process.returncode == 2
    assert first.startswith("error: own.yaml:3: seed: ")
    assert [line.split(": ")[:3] for line in rest] == [["error", "own.yaml:2", "model.width"]]


def test_summaries_are_read_from_the_source() -> None:
    """The list of hooks has the summaries that `hooks show` reads from the imported classes."""
    found = hook_summaries()
    assert [*found] == hook_names()
    assert found == {name: hook(name).summary for name in found}
