"""Script of ``test_rank_consistency.py`` on each rank: trainers that differ on rank 1."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler

from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHooks, SimpleBatchProcessor
from robo_orchard_lab.pipeline.data import DataOrder
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.hooks import (
    GradientClippingHookConfig,
    SaveCheckpointConfig,
    ValidationHookConfig,
)
from tiny import loss_of, make_loader, make_model, make_trainer


def other_loss(model: Any, batch: Any) -> Any:
    return loss_of(model, batch)


class Numbers(IterableDataset[Any]):
    """A stream of `count` samples."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Any:
        return iter([(torch.zeros(4), torch.zeros(2))] * self.count)


def make(kind: str, other: bool, folder: Path) -> HookBasedTrainer:
    """Return a trainer that differs on the other rank in the setting named by `kind`."""
    differs = kind if other else ""
    model = make_model()
    if differs == "model":
        model = torch.nn.Sequential(*model.children(), torch.nn.Linear(2, 2))
    if differs == "frozen":
        model.get_parameter("0.bias").requires_grad_(False)
    if differs == "type":
        model.double()
    parameters = list(model.parameters())
    optimizer: torch.optim.Optimizer = torch.optim.SGD(
        parameters, lr=0.2 if differs == "rate" else 0.1
    )
    if differs == "optimizer":
        optimizer = torch.optim.Adam(parameters)
    if differs == "order of parameters":
        optimizer = torch.optim.SGD(parameters[::-1], lr=0.1)
    hooks: list[Any] = [SaveCheckpointConfig(every="7 steps" if differs == "hook" else "5 steps")]
    watch = PipelineHooks("watch")
    watch.on_step.after(when="3 steps")(lambda args: None)
    hooks.insert(0 if differs == "order of hooks" else 1, watch)
    if kind == "loaders":
        name = "test" if other else "val"
        hooks.append(ValidationHookConfig()(dataloaders={name: make_loader(3 if other else 2)}))
    if differs == "hooks":
        hooks.append(GradientClippingHookConfig(max_norm=1.0))
    loader: Any = make_loader(6 if differs == "length" else 8, shuffle=differs == "sampler")
    if kind == "stream":
        loader = DataLoader(Numbers(16 if other else 20), batch_size=2)
    if kind == "weights":
        weights = torch.ones(32, dtype=torch.float64)
        weights[0] += other
        sampler = WeightedRandomSampler(weights.tolist(), 32)
        loader = DataLoader(make_loader(8).dataset, batch_size=4, sampler=sampler)
    return make_trainer(
        hooks,
        model=model,
        loader=loader,
        optimizer=optimizer,
        lr_scheduler=StepLR(optimizer, 2 if differs == "schedule" else 1),
        batch_processor=SimpleBatchProcessor.from_callable(
            other_loss if differs == "processor" else loss_of
        ),
        accumulate=2 if differs == "accumulation" else 1,
        max_step=5 if differs == "limit" else 4,
        data_order=DataOrder(seed=2 if differs == "seed" else 1),
        run_folder=folder / (f"{kind}-{differs}" if differs == "folder" else kind),
        resume_from="auto" if differs == "resume" else None,
    )


def outcome(kind: str, other: bool, folder: Path) -> list[str]:
    """Return the place and the text of the refusal."""
    place = "made"
    try:
        trainer = make(kind, other, folder)
        place = "called"
        trainer()
    except PipelineConfigError as error:
        return [place, str(error)]
    return ["runs", ""]


def main(folder: Path, kinds: list[str]) -> None:
    rank = PartialState(cpu=True).process_index
    found: dict[str, Any] = {}
    for kind in [*kinds, "nothing"]:
        began_at = time.monotonic()
        found[kind] = outcome(kind, rank == 1, folder)
        assert time.monotonic() - began_at < 20, kind
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    make("hooks", rank == 1, folder)()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
