"""ARCHITECTURE.md lists the files of one step, in order."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

import robo_orchard_lab
from robo_orchard_lab.pipeline import HookBasedTrainer, SimpleBatchProcessor

ROOT = Path(__file__).parents[3]
SRC = Path(robo_orchard_lab.__file__).parents[1]
STEADY = 5
MOST_FILES = 7
TRAINER = "robo_orchard_lab/pipeline/trainer/trainer.py"  # the loop, entered before the step


class Samples(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((3,), float(index))


class Mean(SimpleBatchProcessor):
    def forward(self, model: Any, batch: Any) -> tuple[Any, torch.Tensor]:
        outputs = model(batch)
        return outputs, outputs.mean()


def test_a_steady_step_passes_the_files_that_the_architecture_lists() -> None:
    """A step without hooks passes the files of ARCHITECTURE.md, in its order: seven at most."""
    section = (
        (ROOT / "ARCHITECTURE.md").read_text().partition("## One step")[2].partition("\n## ")[0]
    )
    listed = re.findall(r"^[0-9]\. \[[^]]*\]\(src/([^)]*)\)", section, re.MULTILINE)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = HookBasedTrainer(
        accelerator=Accelerator(cpu=True),
        model=model,
        dataloader=DataLoader(Samples(), batch_size=4, shuffle=True),
        batch_processor=Mean(),
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 100),
        hooks=[],
        max_epoch=1,
    )
    passed: list[str] = []

    def record(frame: FrameType, event: str, argument: object) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and trainer.progress.global_step_id == STEADY:
            name = file.relative_to(SRC).as_posix() if file.is_relative_to(SRC) else None
            if name is not None and name not in passed:
                passed.append(name)

    before = sys.getprofile()
    sys.setprofile(record)
    try:
        trainer()
    finally:
        sys.setprofile(before)
    begin = passed.index(listed[1])  # after the commit point of the step before
    in_order = passed[begin:] + passed[:begin]
    assert listed[0] == TRAINER
    assert TRAINER in passed
    assert [name for name in in_order if name != TRAINER] == listed[1:]
    assert len(passed) <= MOST_FILES
