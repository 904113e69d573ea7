"""What each process of ``test_preemption_processes.py`` runs: one training after another.

Each is interrupted in another place. There, a rank tells its process by a file, and waits for the
file that says that the signal was sent.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # accelerate brings it
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset

from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.errors import RunPreempted
from robo_orchard_lab.pipeline.hooks import (
    PreemptionConfig,
    TimeLimitConfig,
    ValidationHookConfig,
)
from robo_orchard_lab.testing import count_collectives
from tiny import make_loader, make_trainer


class Waiting(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples of which one waits for the signal, where it is loaded."""

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


def train(folder: Path, kind: str, rank: int) -> dict[str, Any]:
    """Until the signal, if it comes; what was saved, and how it ended."""
    saved: list[int] = []

    def wait() -> None:
        wait_for_signal(folder, kind, rank, os.getpid())

    hooks = PipelineHooks("planted")

    @hooks.on_loop.before
    def open_saver(args: PipelineHookArgs) -> None:
        def save(asked: object) -> None:
            if kind == "save" and not saved:
                wait()
            saved.append(args.global_step_id)

        args.run.savers["saver"] = save

    @hooks.on_step.after(when="at steps 5")
    def at_step(args: PipelineHookArgs) -> None:
        if kind in ("step", "one rank", "launcher"):
            wait()
        elif kind == "save":
            args.requests.save("it is time")

    @hooks.on_evaluation.before
    def evaluates(args: PipelineHookArgs) -> None:
        wait()

    hooks.on_step.before(lambda args: time.sleep(0.001))
    everything: list[Any] = [PreemptionConfig(), hooks]
    loader: Any = make_loader(40, batch_size=2)
    if kind == "evaluation":
        everything.append(
            ValidationHookConfig(every="at steps 5")(
                dataloaders={"val": make_loader(4, num_workers=2)}
            )
        )
    elif kind == "data":
        loader = DataLoader(Waiting(folder, rank), batch_size=4, num_workers=2, prefetch_factor=1)
    elif kind == "time":  # of which only the first rank's counts
        age_s = time.time() - psutil.Process().create_time()
        everything.append(TimeLimitConfig(limit="1 d" if rank else age_s + 12, margin=10))
    trainer = make_trainer(everything, loader=loader, max_epoch=10_000, run_folder=folder / kind)
    code = None
    with count_collectives() as calls:
        try:
            trainer()
        except RunPreempted as stopped:
            code = stopped.code
    return {
        "code": code,
        "saved": saved,
        "stopped": trainer.progress.global_step_id,
        "exchanges": Counter(call.hook for call in calls),
    }


def main(folder: Path, kinds: list[str]) -> None:
    rank = PartialState(cpu=True).process_index
    found: dict[str, Any] = {}
    for kind in kinds:
        found[kind] = train(folder, kind, rank)
        (folder / f"found{rank}.json").write_text(json.dumps(found))
    # gloo aborts a process that exits within half a second of its first exchange
    time.sleep(1)
    sys.exit(found[kinds[-1]]["code"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
