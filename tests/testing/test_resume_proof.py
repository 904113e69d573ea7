"""Tests of ``prove_resume`` with correct trainings and planted faults."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from robo_orchard_lab.pipeline import (
    HookBasedTrainer,
    PipelineHookArgs,
    PipelineHooks,
    SimpleBatchProcessor,
)
from robo_orchard_lab.pipeline.hooks import EMAConfig, SaveCheckpointConfig
from robo_orchard_lab.testing import ResumeProof, StraightRunError, prove_resume
from robo_orchard_lab.testing.resume_proof import file_differences
from robo_orchard_lab.testing.resume_worker import find_function

_SEEN = 0
"""Count of a batch processor outside the run's state."""


class Samples(Dataset[Any]):
    """Samples with noise from torch's generator, or from new unseeded generators."""

    def __init__(self, unseeded: bool) -> None:
        self.unseeded = unseeded

    def __len__(self) -> int:
        return 14

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.rand(3)
        if self.unseeded:
            noise += torch.from_numpy(np.random.default_rng().random(3))
        return noise + index, torch.full((1,), float(index))


class Warmup(PipelineHooks):
    """Lowers the loss weight with each counted step, and saves the count if requested."""

    def __init__(self, saves: bool) -> None:
        super().__init__("Warmup")
        self.seen = 0
        self.saves = saves
        self.on_step.before(self.count)

    def count(self, args: PipelineHookArgs) -> None:
        self.seen += 1
        args.batch[1].mul_(1 / self.seen)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen} if self.saves else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = state.get("seen", 0)


class ByTheClock(PipelineHooks):
    """Moves the weights by the time of day."""

    def __init__(self) -> None:
        super().__init__()
        self.on_step.after(self.move)

    def move(self, args: PipelineHookArgs) -> None:
        with torch.no_grad():
            next(args.model.parameters()).add_(time.time() % 1.0)


def squared_error(model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = model(batch[0])
    return outputs, torch.nn.functional.mse_loss(outputs, batch[1])


def counted_error(model: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    global _SEEN
    _SEEN += 1
    outputs, loss = squared_error(model, batch)
    return outputs, loss * _SEEN


def build(
    run_folder: Path, resume_from: Any, fault: str = "", saves: bool = False
) -> HookBasedTrainer:
    """A training of two epochs of four steps, with one thing that is wrong."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.2), torch.nn.Linear(4, 1))
    rate = 0.02 if fault == "rate" and resume_from is not None else 0.01
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    loses = fault == ("unsaved on rank 1" if accelerator.process_index else "unsaved")
    hooks: list[Any] = [EMAConfig(decay=0.9), Warmup(saves=not loses)]
    if fault == "clock":
        hooks.append(ByTheClock())
    if fault == "raises" or (fault == "does not resume" and resume_from is not None):
        raise OSError("the data is not there")
    if fault == "hangs":
        time.sleep(60)
    if fault == "loses" and resume_from is not None:
        for newest in sorted((run_folder / "checkpoints").glob("step_*"))[-2:]:
            shutil.rmtree(newest)
    if saves:
        hooks.append(SaveCheckpointConfig(every="1 step"))
    trainer = HookBasedTrainer(
        accelerator,
        model,
        DataLoader(Samples(unseeded=fault == "noise"), batch_size=4, shuffle=True),
        SimpleBatchProcessor.from_callable(counted_error if fault == "global" else squared_error),
        optimizer,
        hooks=hooks,
        max_epoch=2,
        run_folder=run_folder,
        resume_from=None if fault == "begins anew" else resume_from,
    )
    for group in optimizer.param_groups:
        group["lr"] = rate
    (run_folder / "who.txt").write_text(fault or "nobody", encoding="utf-8")
    return trainer


def prove(
    fault: str = "", stops: tuple[int, ...] = (3,), kill: bool = False, **options: Any
) -> ResumeProof:
    trainer = partial(build, fault=fault, saves=kill)
    return prove_resume(trainer, None, stops, kill=kill, **options)


def test_a_correct_run_passes(tmp_path: Path) -> None:
    """Stopped at every commit point and after the end, the run equals an uninterrupted run."""
    proof = prove(stops=tuple(range(1, 10)), folder=tmp_path / "proof", files=["who.txt"])
    proof.check()
    assert proof.passed
    assert proof.steps == 8
    assert "resumed exactly: 8 steps, stopped at 1, 2, 3, 4, 5, 6, 7, 8, 9" in str(proof)
    assert (tmp_path / "proof" / "resumed" / "who.txt").exists()
    assert sorted(path.name for path in (tmp_path / "proof" / "checkpoints").iterdir()) == [
        f"stop-{number}" for number in range(9)
    ]


@pytest.mark.parametrize(
    ("fault", "step", "name", "message"),
    [
        ("unsaved", 3, "batch[1]", "Warmup.seen is 1 before step 3, was 4"),
        ("noise", 0, "batch[0]", "float32 (4, 3) of size"),
        ("global", 3, "loss", "float32"),
        ("clock", 1, "weights 0.weight", "float32 (4, 3) of size"),
        ("rate", 3, "optimizer group 0.lr", "uninterrupted: 0.01\n    resumed:       0.02"),
        ("does not resume", 3, "the process", "OSError: the data is not there"),
        ("begins anew", 0, "resume_from", "does build pass its resume_from to the trainer?"),
    ],
)
def test_each_fault_is_found_at_its_first_step(
    fault: str, step: int, name: str, message: str
) -> None:
    """The first difference in time has its name, both values, and a hint."""
    proof = prove(fault)
    assert not proof.passed
    assert (proof.differences[0].step, proof.differences[0].name) == (step, name)
    assert message in str(proof)
    assert f"first difference: step {step}: {name}" in str(proof)
    steps = [difference.step for difference in proof.differences]
    assert steps == sorted(steps)
    with pytest.raises(AssertionError, match="differs from the uninterrupted run"):
        proof.check()


def test_each_rank_is_compared() -> None:
    """Two correct ranks pass; lost state of one rank is reported with the rank."""
    proof = prove(stops=(1, 2, 3), processes=2)
    proof.check()
    assert proof.steps == 4
    lost = prove("unsaved on rank 1", processes=2)
    assert (lost.differences[0].step, lost.differences[0].name) == (3, "rank 1: batch[1]")
    assert "rank 1: Warmup.seen is 1 before step 3, was 4" in str(lost)


def test_a_failed_rank_is_reported() -> None:
    """The error has the output of the rank."""
    with pytest.raises(StraightRunError, match="OSError: the data is not there"):
        prove("raises", processes=2)
    with pytest.raises(ValueError, match="processes must be at least 1, got 0"):
        prove(processes=0)


def test_a_correct_run_passes_with_kills() -> None:
    """Killed several times, also in one step, the run resumes from its checkpoints."""
    proof = prove(stops=(1, 3, 3, 6), kill=True)
    proof.check()
    assert proof.kills  # fewer than 4, where this process is slow to look
    assert f"resumed exactly: 8 steps, killed {proof.kills} times" in str(proof)


def test_faults_of_killed_runs_are_found() -> None:
    """State that was not saved, and a listed checkpoint that is missing."""
    proof = prove("unsaved", stops=(4,), kill=True)
    first = proof.differences[0]
    assert first.name == "batch[1]"
    assert first.step in range(3, 7)  # later, where this process is slow to look
    proof = prove("loses", stops=(5,), kill=True)
    assert "checkpoint" in [difference.name for difference in proof.differences]
    assert "run_state.json lists a checkpoint at step" in str(proof)
    with pytest.raises(StraightRunError, match="a run that is to be killed must save"):
        prove_resume(build, None, [3], kill=True)


def test_files_are_compared(tmp_path: Path) -> None:
    """A different file is reported with line and position, or as missing."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    straight.mkdir()
    resumed.mkdir()
    (straight / "log").write_text("a\n" + "b" * 90 + "c\n")
    (resumed / "log").write_text("a\n" + "b" * 90 + "d\n")
    (straight / "one").write_text("a\n")
    found = [*file_differences(straight, resumed, ["log", "one", "none"], 0)]
    assert [str(difference) for difference in found] == ["step 0: file log", "step 0: file one"]
    assert found[0].straight == f"line 2 has at 60: b'{'b' * 30}c\\n'"
    assert found[0].resumed == f"line 2 has at 60: b'{'b' * 30}d\\n'"
    assert (found[1].straight, found[1].resumed) == (
        "line 1 has at 0: b'a\\n'",
        "line 1 is missing",
    )


def test_ignored_names_may_differ() -> None:
    """The run ends after ``steps``."""
    names = ["batch*", "weights *", "optimizer *", "loss", "hook EMA.*", "gradients *"]
    assert prove("noise", ignore=names).passed
    assert prove_resume(build, 5, [5]).steps == 5


def test_a_failed_uninterrupted_run_is_an_error() -> None:
    """The error has its output, also after the time limit."""
    with pytest.raises(StraightRunError, match="OSError: the data is not there"):
        prove("raises")
    with pytest.raises(StraightRunError, match=r"(?s)Timeout.*in build"):
        prove("hangs", timeout_s=0.5)


def test_ctrl_c_ends_a_proof() -> None:
    """Running processes end at once."""
    pressed_at: list[float] = []

    def press() -> None:
        pressed_at.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Timer(1.0, press).start()
    with pytest.raises(KeyboardInterrupt):
        prove("hangs", processes=2)
    assert time.monotonic() - pressed_at[0] < 40.0  # of 60, where servers have to start


@pytest.mark.parametrize(
    ("source", "stops", "message"),
    [
        (build, [], "at least one"),
        (build, [0], "from 1 to 8"),
        (build, [9], "from 1 to 8"),
        (lambda run_folder, resume_from: None, [1], "not a lambda"),
        (partial(build, Path()), [1], "arguments that JSON can write"),
        (len, [1], "another process can't find"),
        ("build", [1], "'module:name'"),
    ],
)
def test_invalid_arguments_are_refused(source: Any, stops: list[int], message: str) -> None:
    """Invalid stops and functions that another process cannot find, before any run."""
    with pytest.raises((ValueError, TypeError), match=message):
        prove_resume(source, 8, stops)


def test_a_missing_function_is_an_error() -> None:
    """An unknown name is a failure of the uninterrupted run."""
    with pytest.raises(StraightRunError, match="has no function 'nobody'"):
        prove_resume("robo_orchard_lab.testing.fixtures:nobody", 2, [1])


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    """No file is replaced."""
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(FileExistsError, match="is not empty"):
        prove(folder=tmp_path)


def test_functions_of_scripts_and_files_are_found(tmp_path: Path) -> None:
    """``build`` may be in ``__main__``, which does not run again, or in a file by name."""
    script = tmp_path / "train.py"
    script.write_text(
        "import json\n"
        "from robo_orchard_lab.testing import fixtures\n"
        "from robo_orchard_lab.testing.resume_worker import describe_function\n"
        "def build(run_folder, resume_from):\n"
        "    return fixtures.build_example(run_folder, resume_from)\n"
        "if __name__ == '__main__':\n"
        "    print(json.dumps(describe_function(build)))\n",
        encoding="utf-8",
    )
    run = [sys.executable, str(script)]
    output = subprocess.run(run, capture_output=True, text=True, timeout=120, check=True).stdout
    assert find_function(json.loads(output)).__module__ == "__mp_main__"
    assert prove_resume(f"{script}:build", 3, [1]).passed
