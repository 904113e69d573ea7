"""Script of test_ddp_processes.py: batch processors that use the model in several ways."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHooks, SimpleBatchProcessor
from robo_orchard_lab.pipeline.hooks import SaveCheckpointConfig, ValidationHookConfig
from tiny import make_loader


class Net(torch.nn.Module):
    """Model with a method that computes the loss, and an attribute that DDP has as well."""

    dim = 4

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2)
        )
        self.unused = torch.nn.Linear(1, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layers(inputs)
        return result

    def training_step(self, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        return torch.nn.functional.mse_loss(self(inputs), targets)


def loss_of(kind: str, accelerator: Accelerator, model: Any, batch: Any) -> torch.Tensor:
    result: torch.Tensor
    inputs, targets = batch
    if kind == "call":
        return torch.nn.functional.mse_loss(model(inputs), targets)
    if kind in ("method", "unused"):
        assert isinstance(model, Net)
        assert model.dim == 4
        return model.training_step(batch)
    if kind == "module":
        result = model.module.training_step(batch)
        return result
    if kind == "unwrapped":
        result = accelerator.unwrap_model(model).training_step(batch)
        return result
    assert kind == "items"
    assert "layers" in model
    assert len(model) == len(list(model)) == 2
    return torch.nn.functional.mse_loss(model["layers"](inputs), targets)


def train(kind: str, precision: str = "no") -> dict[str, Any]:
    """Train, and return this rank's weights, and outputs and inputs that a forward hook saw."""
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision, kwargs_handlers=[unused])
    net = Net()
    if kind != "unused":
        net.unused.requires_grad_(False)
    model = net
    if kind == "items":
        model = torch.nn.ModuleDict({"layers": net.layers, "unused": net.unused})  # type: ignore[assignment]
    seen: list[Any] = []
    hooks = PipelineHooks("forward hook")

    @hooks.on_loop.before
    def register(args: Any) -> None:
        args.model.register_forward_hook(
            lambda module, given, outputs: seen.append([len(given), list(outputs.shape)])
        )

    processor = SimpleBatchProcessor.from_callable(
        lambda model, batch: (None, loss_of(kind, accelerator, model, batch))
    )
    values: list[list[float]] = []

    @hooks.on_loop.before
    def listen(args: Any) -> None:
        args.metrics.listen(lambda record: values.append([v.value for v in record.values]))

    validation = ValidationHookConfig(every="1 epoch")(dataloaders={"val": make_loader(3)})
    trainer = HookBasedTrainer(
        accelerator,
        model,
        make_loader(6, 2),
        processor,
        torch.optim.SGD(model.parameters(), lr=0.1),
        hooks=[hooks, validation],
        max_epoch=2,
    )
    trainer()
    weights = {n: p.tolist() for n, p in accelerator.unwrap_model(trainer.model).named_parameters()}
    return {"weights": weights, "seen": seen, "values": values}


class OwnUpdates:
    """Batch processor that trains a model of its own, on the data of this rank."""

    need_backward = False

    def __init__(self) -> None:
        self.critic = Net()
        self.optimizer = torch.optim.SGD(self.critic.parameters(), lr=0.1)

    def forward(self, model: Any, batch: Any) -> Any:
        with torch.enable_grad():
            self.critic.training_step(batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return None, None


def drift(kind: str) -> None:
    """Train with gradients or weights that differ between ranks."""
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    net = Net()
    net.unused.requires_grad_(False)
    scale = torch.nn.Parameter(torch.ones(()))
    hooks = PipelineHooks("drift")

    @(hooks.on_loop.after if kind == "closed" else hooks.on_optimizer_step.after(when="at steps 5"))
    def change_weights(args: Any) -> None:
        if kind not in ("outside", "processor") and rank == 1:
            with torch.no_grad():
                [*net.layers.parameters()][-1][1] += 1e-6

    def forward(model: Any, batch: Any) -> Any:
        loss = model.training_step(batch)
        return None, loss * scale.to(loss.dtype) if kind == "outside" else loss

    trainer = HookBasedTrainer(
        accelerator,
        net,
        make_loader(40, 2),
        OwnUpdates() if kind == "processor" else SimpleBatchProcessor.from_callable(forward),
        None if kind == "processor" else torch.optim.SGD([*net.parameters(), scale], lr=0.1),
        hooks=[hooks, *([SaveCheckpointConfig(every="6 steps")] if kind == "saved" else [])],
        max_step=None if kind in ("epoch", "closed") else 12,
        max_epoch=2,
        run_folder=sys.argv[1],
    )
    trainer()


def main(folder: Path, kinds: list[str]) -> None:
    if kinds[0] == "drift":
        return drift(kinds[1])
    found = {kind: train(kind) for kind in kinds}
    rank = Accelerator(cpu=True).process_index
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
