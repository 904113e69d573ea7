"""Script of ``test_compiled_processes.py`` on each rank: compiled and checkpointed models."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from robo_orchard_lab.pipeline import PipelineHooks
from robo_orchard_lab.pipeline.hooks import EMAConfig, SaveCheckpointConfig
from sharded_on_ranks import Training, make_model

Wrap = Callable[[Accelerator, Any], Any]


def compiled(backend: str) -> Wrap:
    return lambda accelerator, model: torch.compile(model, backend=backend)


def prepared_then_compiled(accelerator: Accelerator, model: Any) -> Any:
    return torch.compile(accelerator.prepare(model), backend="eager")


def in_ddp(accelerator: Accelerator, model: Any) -> Any:
    return DistributedDataParallel(model)


def ddp_then_compiled(accelerator: Accelerator, model: Any) -> Any:
    return torch.compile(DistributedDataParallel(model), backend="eager")


def compiled_in_ddp(accelerator: Accelerator, model: Any) -> Any:
    return DistributedDataParallel(torch.compile(model, backend="eager"))


WAYS: dict[str, Wrap] = {
    "compiled": compiled("eager"),
    "compiled ahead of time": compiled("aot_eager"),
    "prepared, then compiled": prepared_then_compiled,
    "in DDP": in_ddp,
    "in DDP, then compiled": ddp_then_compiled,
    "compiled, in DDP": compiled_in_ddp,
}
WITHOUT_DDP = ("compiled", "compiled ahead of time", "prepared, then compiled")


class Dropped(torch.nn.Module):
    """Two layers with dropout in between, optionally with gradient checkpointing."""

    def __init__(self, *, twice: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(4, 7)
        self.second = torch.nn.Linear(7, 2)
        self.twice = twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = checkpoint(self._first, x, use_reentrant=False) if self.twice else self._first(x)
        return self.second(hidden)  # type: ignore[no-any-return]  # a module's call

    def _first(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(self.first(x).tanh(), 0.3)


class Reductions(PipelineHooks):
    """Records the steps in which DDP reduces gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.made = 0
        self.on_step.after(self._note)

    def _note(self, args: Any) -> None:
        if self.made:
            self.steps.append(args.global_step_id)
        self.made = 0

    def watch(self, model: Any) -> None:
        ddp = getattr(model, "_orig_mod", model)
        ddp.register_comm_hook(None, lambda state, bucket: self._reduce(bucket))

    def _reduce(self, bucket: Any) -> Any:
        self.made += 1
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]  # None is all processes


def train(folder: Path, name: str, **options: Any) -> dict[str, Any]:
    torch.manual_seed(5)
    saves = SaveCheckpointConfig(folder=folder / name, every=None)
    training = Training(accumulate=3, hooks=[EMAConfig(decay=0.5), saves], **options)
    kinds = [type(module).__name__ for module in training.trainer.model.modules()]
    return {**training.result(), "compiled": "OptimizedModule" in kinds}


def reductions(wrap: Wrap) -> list[int]:
    counts = Reductions()

    def watched(accelerator: Accelerator, model: Any) -> Any:
        wrapped = wrap(accelerator, model)
        counts.watch(wrapped)
        return wrapped

    Training(sharded=False, accumulate=3, wrap=watched, hooks=[counts], max_step=7)
    return counts.steps


def main(folder: Path) -> None:
    torch.set_default_dtype(torch.float64)
    accelerator = Accelerator(cpu=True)
    found: dict[str, Any] = {"plain": train(folder, "plain", sharded=False)}
    for way, wrap in WAYS.items():
        found[way] = train(folder, way, sharded=False, wrap=wrap)
        torch._dynamo.reset()
    for kind, sharded in (("ddp", False), ("sharded", True)):
        for twice in (False, True):
            model = Dropped(twice=twice)
            blocks = [model.first, model.second]
            found[f"{kind} dropped {twice}"] = train(
                folder, f"{kind}{twice}", sharded=sharded, model=model, blocks=blocks
            )
    found["sharded, then compiled"] = train(folder, "sharded", wrap=compiled("eager"))
    found["reductions"] = {
        "in DDP": reductions(in_ddp),
        "in DDP, then compiled": reductions(ddp_then_compiled),
    }
    torch.set_default_dtype(torch.float32)  # autocast leaves float64 alone
    normed = make_model(torch.nn.LayerNorm)
    found["single"] = train(folder, "single", sharded=False, model=normed)
    AcceleratorState._reset_state()  # it keeps the precision
    for kind, sharded in (("ddp", False), ("sharded", True)):
        normed = make_model(torch.nn.LayerNorm)
        found[f"{kind} bf16"] = train(
            folder, f"{kind} bf16", sharded=sharded, model=normed, precision="bf16"
        )
    torch.save(found, folder / f"rank{accelerator.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
