"""Equal trainings from a file, from a script, and in plain torch, to the end of the first step.

`python -m benchmarks.training_start bare` or `script FOLDER`; the file is `FILE`, for
`robo-orchard-lab train`. Each prints the wall and CPU seconds of its process; BEGAN_NS in the
environment is the machine's clock at the start of the process.
"""

import os
import sys
from time import perf_counter_ns, process_time

import torch
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from benchmarks.workload import BATCH_SIZE, Batch, BatchesInMemory, TinyModel, identity_collate

BEGAN_NS = "BEGAN_NS"
STEPS = 2

FILE = f"""\
name: start
model: {{class_type: benchmarks.training_start:TimedModel}}
data:
  train:
    dataset: {{class_type: benchmarks.workload:BatchesInMemory, steps: {STEPS}}}
    batch_size: {BATCH_SIZE}
    collate_fn: benchmarks.workload:identity_collate
batch_processor:
  class_type: SupervisedProcessor
  loss: {{class_type: torch.nn:CrossEntropyLoss}}
optimizer: {{class_type: torch.optim:SGD, lr: 0.1}}
lr_scheduler: {{class_type: torch.optim.lr_scheduler:StepLR, step_size: 100}}
hooks:
  report: {{class_type: Report}}
  bar: {{class_type: ProgressBarHook}}
  log:
    class_type: MetricsLogger
    every: 50 steps | 1 epoch
    sinks:
      file: {{class_type: JsonLinesSink, path: metrics.jsonl}}
  loss: {{class_type: LossTracker}}
  stats: {{class_type: StatsMonitor}}
  guard: {{class_type: NonFiniteGuard}}
  preemption: {{class_type: Preemption}}
trainer: {{max_epoch: 1}}
accelerator: {{cpu: true}}
checkpoint: {{every: 5 epochs, keep_last: 2}}
"""
"""The hooks of the file that `config init` writes."""


class TimedModel(TinyModel):
    """Model that prints the time of its process when the second forward pass begins."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # the base class's name
        if len(self.forward_began_ns) == 1:
            wall = (perf_counter_ns() - int(os.environ[BEGAN_NS])) / 1e9
            sys.stdout.write(f"\nseconds {wall} {process_time()}\n")
        return super().forward(input)


def bare() -> None:
    """Train in plain torch."""
    torch.manual_seed(0)
    model = TimedModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = StepLR(optimizer, step_size=100)
    loss_of = torch.nn.CrossEntropyLoss()
    model.train()
    for inputs, labels in _loader():
        optimizer.zero_grad()
        loss_of(model(inputs), labels).backward()
        optimizer.step()
        scheduler.step()


def script(folder: str) -> None:
    """Train with the objects that `FILE` describes, built by hand."""
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from robo_orchard_lab.pipeline import HookBasedTrainer, SupervisedProcessor
    from robo_orchard_lab.pipeline.hooks import (
        LossTrackerConfig,
        MetricsLoggerConfig,
        NonFiniteGuardConfig,
        PreemptionConfig,
        ProgressBarHookConfig,
        ReportConfig,
        SaveCheckpointConfig,
        StatsMonitorConfig,
    )
    from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig

    set_seed(0)
    accelerator = Accelerator(cpu=True, project_dir=folder)
    loader = _loader()
    model = TimedModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    HookBasedTrainer(
        accelerator,
        model,
        loader,
        SupervisedProcessor(torch.nn.CrossEntropyLoss()),
        optimizer,
        StepLR(optimizer, step_size=100),
        {
            "report": ReportConfig(),
            "bar": ProgressBarHookConfig(),
            "log": MetricsLoggerConfig(
                every="50 steps | 1 epoch",
                sinks={"file": JsonLinesSinkConfig(path=f"{folder}/metrics.jsonl")},
            ),
            "loss": LossTrackerConfig(),
            "stats": StatsMonitorConfig(),
            "guard": NonFiniteGuardConfig(),
            "preemption": PreemptionConfig(),
            "checkpoint": SaveCheckpointConfig(every="5 epochs", keep_last=2),
        },
        max_epoch=1,
        run_folder=folder,
    )()


def _loader() -> DataLoader[Batch]:
    return DataLoader(
        BatchesInMemory(STEPS),
        batch_size=BATCH_SIZE,
        collate_fn=identity_collate,  # type: ignore[arg-type]  # as in the workload
    )


if __name__ == "__main__":
    script(sys.argv[2]) if sys.argv[1] == "script" else bare()
