"""Script of ``test_build_processes.py`` on each rank: an experiment, and its equivalent script."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from robo_orchard_lab.experiment import (
    AcceleratorConfig,
    DataConfig,
    ExperimentConfig,
    LoaderConfig,
    TrainerConfig,
    config_of,
)
from robo_orchard_lab.experiment.samples import MLP, Spirals
from robo_orchard_lab.pipeline import (
    HookBasedTrainer,
    PipelineHookArgs,
    PipelineHooks,
    SupervisedProcessor,
)
from robo_orchard_lab.pipeline.hooks import (
    LossTrackerConfig,
    MetricsLoggerConfig,
    ValidationHookConfig,
)
from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig
from tiny import equal, weights


class Fetched(Spirals):
    """Data that only the first process downloads, before the other process reads."""

    def __init__(self, folder: str, size: int) -> None:
        fetched = Path(folder, "fetched")
        if PartialState().is_main_process:
            time.sleep(0.3)
            fetched.touch()
        elif not fetched.exists():
            raise FileNotFoundError("the first process hasn't fetched it yet")
        super().__init__(size)


class MissingOnTheFirst(Spirals):
    """Data missing on the first process, which would download the data."""

    def __init__(self) -> None:
        if PartialState().is_main_process:
            raise FileNotFoundError("no such folder: 'images'")
        super().__init__(8)


def experiment(folder: Path) -> ExperimentConfig:
    fetched = config_of(Fetched, folder=str(folder), size=39)
    others = config_of(Spirals, size=39, seed=1)
    return ExperimentConfig(
        run_folder=str(folder / "run"),
        seed=3,
        model=config_of(MLP, inputs=2, hidden=[8], outputs=3),
        data=DataConfig(
            train=LoaderConfig(dataset=fetched, batch_size=4, shuffle=True),
            evaluation={"val": LoaderConfig(dataset=others, batch_size=4)},
        ),
        batch_processor=config_of(SupervisedProcessor, loss=config_of(torch.nn.CrossEntropyLoss)),
        optimizer=config_of(torch.optim.SGD, lr=0.1),
        lr_scheduler=config_of(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps="auto"),
        hooks={
            "log": MetricsLoggerConfig(sinks=[JsonLinesSinkConfig()]),
            "losses": LossTrackerConfig(),
            "val": ValidationHookConfig(),
        },
        trainer=TrainerConfig(max_epoch=2, agree_every=4),
        accelerator=AcceleratorConfig(cpu=True, gradient_accumulation_steps=2),
    )


def by_script() -> torch.nn.Module:
    set_seed(3)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = DataLoader(Spirals(39), batch_size=4, shuffle=True)
    model = MLP(2, [8], 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    HookBasedTrainer(
        accelerator,
        model,
        loader,
        SupervisedProcessor(torch.nn.CrossEntropyLoss()),
        optimizer,
        lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=2 * 3),
        max_epoch=2,
    )()
    return model


def main(folder: Path) -> None:
    config = experiment(folder)
    watching = PipelineHooks()
    exchanged_at = []

    @watching.on_loop.before
    def watch(args: PipelineHookArgs) -> None:
        def find() -> int:
            exchanged_at.append(args.progress.global_step_id)
            return 0

        args.run.agreement.topic("watched", find=find, tell=lambda number: None)

    built = config.build(hooks={"watching": watching})
    built.trainer()
    found = {
        "same": equal(weights(built.model), weights(by_script())),
        "moves": [built.lr_scheduler.last_epoch, built.lr_scheduler.total_steps],  # type: ignore[union-attr]
        "updates": built.trainer.progress.optimizer_step_id,
        "exchanged_at": exchanged_at,
        "loss": built.trainer.metrics.latest("eval/val/loss"),
    }
    rank = PartialState().process_index
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    missing = LoaderConfig(dataset=config_of(MissingOnTheFirst))
    config.replace(data=DataConfig(train=missing)).build()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
