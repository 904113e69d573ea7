"""Script of ``test_job_log.py`` on each rank: a run that stops, resumes and logs."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.hooks import (
    EMAConfig,
    FreezeHookConfig,
    KeepBestConfig,
    MetricsLoggerConfig,
    ModelSummaryConfig,
    ProgressBarHookConfig,
    SaveCheckpointConfig,
    SaveModelConfig,
    TimeLimitConfig,
    ValidationHookConfig,
)
from robo_orchard_lab.pipeline.sinks import LogSinkConfig
from tiny import make_loader, make_model, make_trainer


def make(folder: Path, rank: int, stop_at: int) -> HookBasedTrainer:
    watch = PipelineHooks("watch")
    watch.on_loop.before(lambda args: args.requests.allow_rank_local())

    @watch.on_step.after(when=f"at steps {stop_at}")
    def stop(args: PipelineHookArgs) -> None:
        if rank == 1:
            args.requests.stop("it is enough", rank_local=True)

    @watch.on_loop.after
    def too_late(args: PipelineHookArgs) -> None:
        args.requests.log("too late")
        if rank == 1:
            args.requests.save("too late, alone", rank_local=True)

    model = make_model()
    unseen = make_loader(2, rest=1, drop_last=True)
    hooks: list[Any] = [
        ModelSummaryConfig(),
        FreezeHookConfig(patterns=["*"]),
        TimeLimitConfig(limit="1 d"),
        SaveCheckpointConfig(every="5 steps"),
        SaveModelConfig(),
        EMAConfig(decay=0.9),
        ProgressBarHookConfig(),
        MetricsLoggerConfig(every="5 steps", sinks=[LogSinkConfig()]),
        ValidationHookConfig(every="5 steps")(dataloaders={"val": unseen}),
        KeepBestConfig(monitor="eval/val/loss", mode="min", path=folder / "best.safetensors"),
        watch,
    ]
    return make_trainer(
        hooks,
        model=model,
        loader=list(make_loader(20)),
        # Parameters outside the model.
        optimizer=torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1),
        max_epoch=3,
        run_folder=folder / "run",
        resume_from="auto",
        agree_every=2,
    )


def main(folder: Path) -> None:
    logging.basicConfig(level=logging.INFO, format="%(name)s %(levelname)s %(message)s")
    rank = PartialState(cpu=True).process_index
    for stop_at in (7, 15):
        trainer = make(folder, rank, stop_at)
        trainer()
        trainer()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
