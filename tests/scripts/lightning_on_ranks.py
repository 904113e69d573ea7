"""Train LightningModules on the ranks of a job; rank 0 writes weights and logged values."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from launching import end_group
from robo_orchard_lab.pipeline import HookBasedTrainer
from robo_orchard_lab.pipeline.hooks import MetricsLoggerConfig, ValidationHookConfig
from robo_orchard_lab.pipeline.lightning import LightningModuleProcessor
from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig, read_metrics
from tiny import make_model

LightningModule: Any = pl.LightningModule


class Regression(LightningModule):  # type: ignore[misc]  # of any type
    def __init__(self, is_manual: bool) -> None:
        super().__init__()
        self.automatic_optimization = not is_manual
        self.net = make_model()

    def loss(self, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        return torch.nn.functional.mse_loss(self.net(inputs), targets)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=False, on_epoch=True)
        self.log("largest", loss, on_step=False, on_epoch=True, reduce_fx="max")
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def on_validation_epoch_end(self) -> None:
        self.log("rank", float(self.global_rank))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def train(folder: Path, is_manual: bool) -> dict[str, Any]:
    accelerator = Accelerator(cpu=True)
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(
        torch.randn(27, 4, generator=generator), torch.randn(27, 2, generator=generator)
    )
    size = 8 // accelerator.num_processes
    module = Regression(is_manual)
    adapter = LightningModuleProcessor(module)
    sink = JsonLinesSinkConfig(path=str(folder / f"manual_{is_manual}.jsonl"))
    HookBasedTrainer(
        accelerator,
        module,
        DataLoader(data, batch_size=size),
        adapter,
        **adapter.optimizers(),
        hooks=[
            adapter.hooks(),
            MetricsLoggerConfig(every="1 epoch", sinks=[sink]),
            ValidationHookConfig()(dataloaders={"val": DataLoader(data, batch_size=2)}),
        ],
        max_epoch=2,
    )()
    if not accelerator.is_main_process:
        return {}
    values = [v for record in read_metrics(sink.path) for v in record.values]
    return {
        "weights": [value for p in module.parameters() for value in p.flatten().tolist()],
        "values": {f"{value.step} {value.name}": value.value for value in values},
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = {str(is_manual): train(folder, is_manual) for is_manual in (False, True)}
    if found["True"]:
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    end_group()
