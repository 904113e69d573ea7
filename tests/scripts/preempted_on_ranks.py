"""Script of each process in ``test_preemption_processes.py``: a sequence of trainings.

Each training is interrupted at another position. There, a rank writes its process id to a file,
and waits for the file that confirms the signal.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # accelerate brings it
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader, Dataset

from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.checkpoint import CheckpointStore
from robo_orchard_lab.pipeline.errors import RunPreempted
from robo_orchard_lab.pipeline.hooks import (
    PreemptionConfig,
    SaveCheckpointConfig,
    TimeLimitConfig,
    ValidationHookConfig,
)
from robo_orchard_lab.testing import count_collectives
from tiny import equal, make_loader, make_model, make_trainer, weights


class Waiting(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Dataset with one sample per rank that waits for the signal while loading."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank, self.process = folder, rank, os.getpid()

    def __len__(self) -> int:
        return 80

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index in (40, 44):  # one for each rank
            wait_for_signal(self.folder, "data", self.rank, self.process)
        return torch.full((4,), float(index)), torch.zeros(2)


def wait_for_signal(folder: Path, kind: str, rank: int, process: int) -> None:
    temporary = folder / f"{kind}.rank{rank}.tmp"
    temporary.write_text(str(process))
    temporary.rename(folder / f"{kind}.rank{rank}")
    end_at = time.monotonic() + 20
    while not (folder / f"{kind}.sent").exists() and time.monotonic() < end_at:
        time.sleep(0.01)


class Planted(PipelineHooks):
    """Hook that waits for the signal at a given position."""

    def __init__(self, folder: Path, kind: str, rank: int) -> None:
        super().__init__()
        self.wait = partial(wait_for_signal, folder, kind, rank, os.getpid())
        self.kind = kind
        self.saves = 0
        self.on_step.before(lambda args: time.sleep(0.001))
        self.on_step.after(when="at steps 5")(self.at_step)
        self.on_evaluation.before(lambda args: self.wait())

    def at_step(self, args: PipelineHookArgs) -> None:
        if self.kind in ("step", "one rank", "launcher"):
            self.wait()
        elif self.kind == "save":
            args.requests.save("it is time")

    def state_dict(self) -> dict[str, Any]:
        self.saves += 1
        if self.kind == "save" and self.saves == 2:  # the first is the check at the start
            self.wait()
        return {}

    def load_state_dict(self, state: Any) -> None:
        assert state == {}


def make(folder: Path, kind: str, rank: int, **options: Any) -> HookBasedTrainer:
    """Build the trainer for a kind of interruption."""
    hooks: list[Any] = [PreemptionConfig(), SaveCheckpointConfig(every=None)]
    hooks.append(Planted(folder, kind, rank))
    loader: Any = make_loader(40, batch_size=2, shuffle=True)
    if kind == "evaluation":
        val = make_loader(4, num_workers=2)
        hooks.append(ValidationHookConfig(every="at steps 5")(dataloaders={"val": val}))
    elif kind == "data":
        loader = DataLoader(Waiting(folder, rank), batch_size=4, num_workers=2, prefetch_factor=1)
    elif kind == "time":  # only the first rank's limit counts
        age_s = time.time() - psutil.Process().create_time()
        limit_s = round(age_s) + 12  # equal on both ranks, started together
        hooks.append(TimeLimitConfig(limit=broadcast_object_list([limit_s])[0], margin=10))
    model = torch.nn.Sequential(make_model(), torch.nn.Dropout(0.5))
    return make_trainer(hooks, loader=loader, model=model, **options)


def train(folder: Path, kind: str, rank: int) -> dict[str, Any]:
    """Train until the signal or the time limit; return the end and the checkpoints."""
    run_folder = folder / kind
    trainer = make(folder, kind, rank, max_epoch=10_000, run_folder=run_folder)
    code = None
    with count_collectives() as calls:
        try:
            trainer()
        except RunPreempted as stopped:
            code = stopped.code
    if rank == 0:
        (folder / "states" / kind).mkdir(parents=True)
        shutil.copy(run_folder / "run_state.json", folder / "states" / kind)
    stopped_at = trainer.progress.global_step_id
    return {
        "code": code,
        "stopped": stopped_at,
        "checkpoints": [info.step for info in CheckpointStore(run_folder / "checkpoints").list()],
        "exchanges": sum(call.places[-1].function == "Agreement.settle" for call in calls),
        "resumes": resumes_exactly(folder, kind, rank, stopped_at),
    }


def resumes_exactly(folder: Path, kind: str, rank: int, stopped_at: int) -> bool:
    """Return True if a resumed run equals an uninterrupted run five steps later."""
    if kind == "time":
        return True  # a new limit would stop it
    limit = stopped_at + 5
    uninterrupted = make(
        folder, kind, rank, max_step=limit, run_folder=folder / "uninterrupted" / kind
    )
    uninterrupted()
    resumed = make(folder, kind, rank, max_step=limit, run_folder=folder / kind, resume_from="auto")
    assert resumed.progress.global_step_id == stopped_at
    resumed()
    return equal(weights(resumed.model), weights(uninterrupted.model))


def main(folder: Path, kinds: list[str]) -> None:
    rank = PartialState(cpu=True).process_index
    found: dict[str, Any] = {}
    for kind in kinds:
        found[kind] = train(folder, kind, rank)
        (folder / f"found{rank}.json").write_text(json.dumps(found))
    sys.exit(found[kinds[-1]]["code"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
