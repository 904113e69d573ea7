"""A small experiment file and a user's module next to it."""

from __future__ import annotations

from pathlib import Path

EXPERIMENT = """\
name: spirals
model: {class_type: MLP, inputs: 2, hidden: [8], outputs: 3}
data:
  train:
    dataset: {class_type: Spirals, size: 80}
    batch_size: 8
    shuffle: true
  evaluation:
    val: {dataset: {class_type: Spirals, size: 40, seed: 1}, batch_size: 16}
batch_processor:
  class_type: SupervisedProcessor
  loss: {class_type: "torch.nn:CrossEntropyLoss"}
optimizer: {class_type: "torch.optim:SGD", lr: 0.1, momentum: 0.9}
hooks:
  validation: {class_type: ValidationHook}
  log:
    class_type: MetricsLogger
    every: 5 steps
    sinks: [{class_type: JsonLinesSink, path: metrics.jsonl}]
  preemption: {class_type: Preemption}
trainer: {max_epoch: 3}
"""
"""Ten steps an epoch."""

MODULE = '''\
"""Parts of an experiment in a module of the user."""

import os
import time

import torch
from torch.utils.data import Dataset

from robo_orchard_lab.pipeline import PipelineHooks, SupervisedProcessor


class Slow(PipelineHooks):
    def __init__(self, seconds: float = 0.1, fail_at: int | None = None) -> None:
        super().__init__()

        def wait(args) -> None:
            if args.global_step_id == fail_at:
                raise RuntimeError(f"no step {fail_at}")
            time.sleep(seconds)

        self.on_step.before(wait)


class Measured(SupervisedProcessor):
    """A processor with named values in evaluations."""

    def __init__(self, says: list[str]) -> None:
        super().__init__(torch.nn.functional.cross_entropy)
        self.says = says

    def evaluation_forward(self, model, batch):
        outputs, loss = self.forward(model, batch)
        return outputs, dict.fromkeys(self.says, loss)


class Unsaved(PipelineHooks):
    """A hook whose state can't be saved."""

    def state_dict(self) -> dict:
        return {"seen": [{1, 2}]}


class Noise(Dataset):
    """Other points each time."""

    def __len__(self) -> int:
        return 80

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([*os.urandom(2)]) / 255, index % 3
'''
"""``mine``, which has to be trusted."""

SLOW = "--hooks.slow={class_type: 'mine:Slow'}"
"""A hook that takes a tenth of a second a step."""


def write_experiment(folder: Path) -> Path:
    """The file, and the module."""
    (folder / "mine.py").write_text(MODULE)
    file = folder / "spirals.yaml"
    file.write_text(EXPERIMENT)
    return file
