"""Script of ``test_gpu.py``: a job of one rank, with NCCL on one GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHooks, SimpleBatchProcessor
from robo_orchard_lab.pipeline.hooks import (
    EMAConfig,
    GradientClippingHookConfig,
    SaveCheckpointConfig,
)
from robo_orchard_lab.pipeline.sharded_tensors import gather_full_tensors
from tiny import loss_of, make_loader, make_model


def start_group() -> None:
    """Start the process group as torchrun would, without a network port."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    store = torch._C._distributed_c10d.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    torch.cuda.set_device(0)


def train(kind: str, folder: Path, stop_at: int | None, resume_from: Path | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if kind == "plugin":
        options["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2, cpu_ram_efficient_loading=False
        )
    accelerator = Accelerator(gradient_accumulation_steps=2, **options)
    model: Any = make_model().cuda()
    if kind == "sharded":
        fully_shard(model, mesh=init_device_mesh("cuda", (1,)))
    wrapped = DistributedDataParallel(model, device_ids=[0]) if kind == "ddp" else model
    watch = PipelineHooks()
    losses: list[torch.Tensor] = []
    watch.on_step.after(lambda args: losses.append(args.loss))

    @watch.on_step.before(when="at steps 2")
    def forbid(args: Any) -> None:  # the first steps may synchronize for their setup
        torch.cuda.set_sync_debug_mode("error")

    @watch.on_epoch.after
    def allow(args: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")

    if stop_at is not None:
        when = f"at steps {stop_at}"
        watch.on_step.after(when=when)(lambda args: args.requests.stop("enough"))
    trainer = HookBasedTrainer(
        accelerator,
        wrapped,
        make_loader(pin_memory=True),
        SimpleBatchProcessor.from_callable(loss_of),
        torch.optim.AdamW(wrapped.parameters(), lr=0.01, fused=True),
        hooks=[
            watch,
            EMAConfig(decay=0.5),
            GradientClippingHookConfig(max_norm=0.1),
            SaveCheckpointConfig(every=None, folder=folder),
        ],
        max_epoch=1,
        resume_from=resume_from,
    )
    try:
        trainer()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {
        "weights": gather_full_tensors(
            accelerator.unwrap_model(trainer.model).state_dict(), keep=True
        ),
        "losses": torch.stack(losses).cpu(),
    }


def main(kind: str, folder: Path) -> None:
    start_group()
    found = {"straight": train(kind, folder / "straight", None, None)}
    train(kind, folder / "stopped", 3, None)  # within an accumulation window
    found["resumed"] = train(kind, folder / "resumed", None, folder / "stopped" / "last")
    torch.save(found, folder / "found.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
