"""Commands that import neither torch nor accelerate."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from tests.cli.running import environment

from robo_orchard_lab.experiment.inspection import hook, hook_names, hook_summaries
from robo_orchard_lab.pipeline.checkpoint import CheckpointStore

EACH_COMMAND = """
import json, sys
from robo_orchard_lab.cli.main import main
for command in json.loads(sys.argv[1]):
    code = main(command)
    print(code, "torch" in sys.modules, "accelerate" in sys.modules, *command, file=sys.stderr)
"""

COMMANDS = [
    ["hooks", "list"],
    ["checkpoint", "list", "run"],
    ["checkpoint", "list", "run/checkpoints", "--json"],
    ["runs", "."],
    ["config", "init"],
    ["train", "--help"],
    ["config", "check", "--help"],
]


def test_inventories_import_no_torch(tmp_path: Path) -> None:
    """Lists of hooks, of checkpoints and of runs import neither torch nor accelerate."""
    with CheckpointStore(tmp_path / "run" / "checkpoints") as store:
        trainer = {"progress": {"version": 1, "epoch_id": 3}, "best": torch.ones(2)}
        store.save(7, {"model": {"weight": torch.ones(2)}, "trainer": trainer})
    done = subprocess.run(
        [sys.executable, "-c", EACH_COMMAND, json.dumps(COMMANDS)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    expected = [f"0 False False {' '.join(command)}" for command in COMMANDS]
    assert done.stderr.splitlines() == expected
    listed = next(line for line in done.stdout.splitlines() if line.startswith("7 "))
    assert listed.split()[:2] == ["7", "3"]  # the step and the epoch
    assert "complete" in listed


def test_summaries_are_read_from_the_source() -> None:
    """The list of hooks has the summaries that `hooks show` reads from the imported classes."""
    found = hook_summaries()
    assert [*found] == hook_names()
    assert found == {name: hook(name).summary for name in found}
