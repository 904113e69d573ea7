"""Script of test_several_optimizers_on_ranks.py: a GAN on two ranks, and a plain loop."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from gan import CACHES_CASTS, GAN, Batch, JointGAN, loss_d, loss_g, make_batches, make_model
from robo_orchard_lab.pipeline import (
    HookBasedTrainer,
    NamedSteps,
    PipelineHooks,
    SimpleBatchProcessor,
)
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.hooks import (
    GradientClippingHookConfig,
    LossTrackerConfig,
    MetricsLoggerConfig,
    SaveCheckpointConfig,
)


def make_net(seed: int) -> torch.nn.ModuleDict:
    """Return a GAN with parameters ``bias``, in the loss of rank 0 only, and ``unused``."""
    model = make_model()
    torch.manual_seed(seed)
    for layer in model.values():
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, 0.0, 0.1)
        layer.bias = torch.nn.Parameter(torch.zeros(1))
        layer.unused = torch.nn.Parameter(torch.ones(1))
    return model


def rank_loss_d(model: Any, batch: Batch, fake: torch.Tensor) -> torch.Tensor:
    loss = loss_d(model, batch[0], fake)
    is_first = torch.distributed.get_rank() == 0
    return loss + (model["d"].bias - 1).square().sum() if is_first else loss


class Steps(SimpleBatchProcessor):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Batch] = []

    def forward(self, model: Any, batch: Batch) -> NamedSteps:
        self.seen.append(batch)
        fake = model["g"](batch[1])
        yield "d", rank_loss_d(model, batch, fake)
        yield "g", loss_g(model, fake)


class Joint(Steps):
    def forward(self, model: Any, batch: Batch) -> Any:
        self.seen.append(batch)
        fake = model["g"](batch[1])
        return None, {"d": rank_loss_d(model, batch, fake), "g": loss_g(model, fake)}


def optimizers_of(model: Any) -> dict[str, torch.optim.Optimizer]:
    return {
        name: torch.optim.AdamW(model[name].parameters(), lr=0.01, weight_decay=0.5)
        for name in ("d", "g")
    }


def loader(batches: int = 8) -> DataLoader[Any]:
    real, noise = (torch.cat(part) for part in zip(*make_batches(batches), strict=True))
    return DataLoader(TensorDataset(real, noise), batch_size=4)


def train(
    processor: SimpleBatchProcessor,
    window: int = 1,
    precision: str = "no",
    hooks: Any = (),
    batches: int = 8,
    **options: Any,
) -> HookBasedTrainer:
    AcceleratorState._reset_state()  # another precision
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=window, mixed_precision=precision
    )
    model = make_net(seed=accelerator.process_index)
    trainer = HookBasedTrainer(
        accelerator,
        model,
        loader(batches),
        processor,
        optimizers_of(model),
        hooks=list(hooks),
        max_epoch=1,
        **options,
    )
    trainer()
    return trainer


def reduce(parameters: list[torch.nn.Parameter]) -> None:
    """Average gradients, as a plain loop does; parameters without any gradient keep None."""
    for parameter in parameters:
        has_gradient = torch.tensor(float(parameter.grad is not None))
        torch.distributed.all_reduce(has_gradient)
        if has_gradient:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= torch.distributed.get_world_size()


def plain(seen: list[Batch], window: int, precision: str, *, joint: bool) -> torch.nn.ModuleDict:
    model = make_net(seed=0)
    by_name = optimizers_of(model)
    options = {"enabled": precision == "bf16", "cache_enabled": CACHES_CASTS}
    for step, batch in enumerate(seen, start=1):
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)
        with torch.autocast("cpu", torch.bfloat16, **options):
            fake = model["g"](batch[1])
            losses = {"d": rank_loss_d(model, batch, fake)}
            if joint:
                losses["g"] = loss_g(model, fake)
        due = list(losses)
        for name in ("d", "g"):
            if name not in losses:
                with torch.autocast("cpu", torch.bfloat16, **options):
                    losses[name] = loss_g(model, fake)
            parameters = list(model[name].parameters())
            scaled = losses[name] / window if window > 1 else losses[name]
            scaled.backward(inputs=parameters, retain_graph=True)
            if step % window == 0 and not joint:
                update(by_name[name], parameters)
        if step % window == 0 and joint:
            for name in due:
                update(by_name[name], list(model[name].parameters()))
    return model


def update(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> None:
    reduce(parameters)
    optimizer.step()
    optimizer.zero_grad()


def differences(found: Any, expected: Any) -> list[str]:
    """Return the names of tensors that differ."""
    own, other = found.state_dict(), expected.state_dict()
    assert own.keys() == other.keys()
    return [name for name in own if not torch.equal(own[name], other[name])]


def other_ranks(trainer: HookBasedTrainer) -> list[str]:
    """Return the names of parameters that differ between ranks."""
    different = []
    for name, parameter in trainer.model.named_parameters():
        first = parameter.detach().clone()
        torch.distributed.broadcast(first, 0)
        if not torch.equal(first, parameter):
            different.append(name)
    return different


class Other(GAN):
    """GAN whose second rank leaves out the generator's loss in the third step."""

    calls = 0

    def forward(self, model: Any, batch: Batch) -> NamedSteps:
        self.calls += 1
        for name, loss in super().forward(model, batch):
            if name == "g" and self.calls == 3 and torch.distributed.get_rank() == 1:
                return
            yield name, loss


def is_refused(kind: str) -> bool:
    """Return True if the trainer refuses a model in DDP, a sharded one, or unequal ranks."""
    AcceleratorState._reset_state()
    accelerator, model = Accelerator(cpu=True), make_model()
    if kind == "sharded":
        for layer in model.values():
            fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    given = accelerator.prepare(model) if kind == "ddp" else model
    rates = {"d": 0.1, "g": 0.1 + (kind == "rates") * torch.distributed.get_rank()}
    optimizers = {n: torch.optim.SGD(model[n].parameters(), lr=rate) for n, rate in rates.items()}
    message = {
        "rates": "but must be equal, in the optimizer.",
        "ddp": "several optimizers need a model without DDP",
        "sharded": "need a replicated model on plain processes, found a model sharded by",
    }
    try:
        HookBasedTrainer(accelerator, given, loader(), Steps(), optimizers, max_epoch=1)
    except PipelineConfigError as error:
        return message[kind] in str(error)
    return False


def stop_after(step: int) -> PipelineHooks:
    hooks = PipelineHooks("stop")
    hooks.on_step.after(
        lambda args: args.requests.stop("here") if args.global_step_id + 1 == step else None
    )
    return hooks


def main(folder: Path, task: str) -> None:
    if task == "names":
        train(Other(), 1)
        return
    found: dict[str, Any] = {}
    for kind in (Steps, Joint):
        for window, precision in ((1, "no"), (2, "no"), (2, "bf16")):
            processor = kind()
            trainer = train(processor, window, precision)
            is_joint = kind is Joint
            expected = plain(processor.seen, window, precision, joint=is_joint)
            name = f"{kind.__name__} {window} {precision}"
            found[name] = differences(trainer.model, expected) + other_ranks(trainer)
    found["refused"] = [kind for kind in ("ddp", "sharded", "rates") if not is_refused(kind)]
    hooks = [
        LossTrackerConfig()(),
        GradientClippingHookConfig(max_norm=0.1)(),
        MetricsLoggerConfig(every="1 step")(),
    ]
    run = folder / "run"
    save = SaveCheckpointConfig(every=None)
    straight = train(Steps(), 2, hooks=[*hooks])
    train(Steps(), 2, hooks=[*hooks, save(), stop_after(3)], run_folder=run)
    resumed = train(Steps(), 2, hooks=[*hooks, save()], run_folder=run, resume_from="auto")
    found["resumed"] = differences(resumed.model, straight.model)
    uneven = train(JointGAN(), 2, batches=5)
    found["uneven"] = other_ranks(uneven)
    found["updates"] = uneven.progress.optimizer_steps
    found["seen"] = sorted(straight.metrics.names())
    rank = torch.distributed.get_rank()
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
