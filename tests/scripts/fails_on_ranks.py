"""A plain user script that trains on each rank and fails on rank 1 at one position.

The script does no cleanup: the group is neither destroyed nor waited for.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.utils.data import DataLoader, Dataset

from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks, SimpleBatchProcessor
from robo_orchard_lab.pipeline.hooks import (
    LossTrackerConfig,
    PreemptionConfig,
    SaveCheckpointConfig,
    ValidationHookConfig,
)
from robo_orchard_lab.pipeline.progress import CHANNEL_NAMES
from tiny import loss_of, make_loader, make_model, make_trainer

FAILS_AT = 3  # the step


def record_failure_time() -> None:
    """Write the time of the failure, from which the end of all ranks is measured."""
    if "FAILED_AT" in os.environ:
        Path(os.environ["FAILED_AT"]).write_text(str(time.monotonic()))


def go_wrong(place: str) -> None:
    """Record the time and fail."""
    record_failure_time()
    if place == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if place in ("stalled", "sleeps"):
        time.sleep(3600)
    raise ValueError("planted")


class Planted(PipelineHooks):
    """Hook that fails at one position of a channel, when saved, or when loaded."""

    def __init__(self, place: str, here: bool, slowly: bool) -> None:
        super().__init__("Planted")
        self.place = place
        self.here = here  # hooks are equal on all ranks
        for channel in CHANNEL_NAMES:
            decorators: Any = getattr(self, channel)
            for role in ("before", "after"):
                if place == f"{role} {channel}":
                    getattr(decorators, role)(self.fail)
        if slowly:
            self.on_step.before(lambda args: time.sleep(0.15))
        if place in ("step", "killed", "stalled"):
            self.on_step.before(when=f"at steps {FAILS_AT + 1}")(self.fail)

    def fail(self, args: PipelineHookArgs) -> None:
        in_step = args.batch is not None or args.evaluation is not None
        if (
            not self.here
            or args.exception is not None
            or (in_step and args.global_step_id < FAILS_AT)
        ):
            return
        go_wrong(self.place)

    def state_dict(self) -> dict[str, Any]:
        if self.here and self.place == "save":
            go_wrong("raises")
        return {}

    def load_state_dict(self, state: Any) -> None:
        if self.here and self.place == "resume":
            go_wrong("raises")


class Samples(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.fails and index > 8 * FAILS_AT:
            go_wrong("raises")
        return torch.full((4,), float(index)), torch.zeros(2)


class WaitsAfterwards(PipelineHooks):
    """A user's ``after`` that runs a collective even after an error."""

    def __init__(self) -> None:
        super().__init__("WaitsAfterwards")
        self.on_step.after(lambda args: torch.distributed.barrier())


def forward_of(place: str) -> Any:
    calls = 0

    def forward(model: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if place == "forward" and calls > FAILS_AT:
            go_wrong("raises")
        if place == "evaluation" and not torch.is_grad_enabled():
            go_wrong("raises")
        return loss_of(model, batch)

    return forward


def flush() -> None:
    """Simulate a tracker that sends its last values at exit."""
    time.sleep(5.0)
    print("flushed", flush=True)


def main(folder: Path, place: str, options: str) -> None:
    if "late" in options and os.environ["RANK"] == "1":
        atexit.register(flush)  # runs after the end of the process group
    if place == "resume":
        train(folder, "nowhere", options, max_step=2)
    train(folder, place, options, max_step=8)
    print("ended", flush=True)


def train(folder: Path, place: str, options: str, max_step: int) -> None:
    victim = "0" if "first" in options else "1"
    mine = place if os.environ["RANK"] == victim else "nowhere"
    hooks: list[Any] = [LossTrackerConfig(), SaveCheckpointConfig(every="2 steps", keep_last=2)]
    if "preemption" in options:
        hooks.append(PreemptionConfig())
    if "waits" in options:
        hooks.append(WaitsAfterwards())
    hooks += [
        Planted(place, mine == place, "slowly" in options),
        ValidationHookConfig(every="at steps 4")(dataloaders={"val": make_loader(2)}),
    ]
    if mine == "constructor":
        record_failure_time()
    trainer = make_trainer(
        hooks,
        model=torch.nn.Sequential(make_model(), torch.nn.Dropout(0.3)),
        loader=DataLoader(
            Samples(mine == "loader"), batch_size=4, shuffle=place != "loader", num_workers=1
        ),
        batch_processor=SimpleBatchProcessor.from_callable(forward_of(mine)),
        max_step=-1 if mine == "constructor" else max_step,
        run_folder=folder,
        resume_from="auto",
        stall_timeout_s=2.0 if place == "stalled" else None,
    )
    trainer()
    if trainer.accelerator.is_main_process:
        torch.save(trainer.accelerator.unwrap_model(trainer.model).state_dict(), folder / "end.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else "")
