"""Script of each process of ``test_sharded_processes.py``: training runs of a sharded model."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from robo_orchard_lab.pipeline import (
    HookBasedTrainer,
    PipelineHookArgs,
    PipelineHooks,
    SimpleBatchProcessor,
)
from robo_orchard_lab.pipeline.checkpoint import Ranks, save_checkpoint
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.hook_set import HookLike
from robo_orchard_lab.pipeline.hooks import (
    EMAConfig,
    FreezeHookConfig,
    GradientClippingHookConfig,
    KeepBestConfig,
    NonFiniteGuardConfig,
    SaveCheckpointConfig,
    SaveModelConfig,
    ValidationHookConfig,
)
from robo_orchard_lab.pipeline.hooks.ema import EMA
from robo_orchard_lab.pipeline.hooks.model_summary import summarize
from robo_orchard_lab.pipeline.metrics import MetricValue
from robo_orchard_lab.pipeline.sharded_tensors import gather_full_tensors
from tiny import loss_of, make_loader

SAMPLES_PER_STEP = 6  # of the job, where it has one process, two or three


def make_model(norm: type[torch.nn.Module] = torch.nn.BatchNorm1d) -> torch.nn.Module:
    """Return a model with buffers, and with sizes not divisible by two or three."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 7), torch.nn.Tanh(), norm(7), torch.nn.Linear(7, 2)
    )


def shard(
    model: torch.nn.Module, mesh: DeviceMesh, blocks: Iterable[torch.nn.Module] | None = None
) -> torch.nn.Module:
    for block in blocks or (model[0], model[3]):  # type: ignore[index]  # a Sequential
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


class OwnValues(PipelineHooks):
    """Hook with a plain tensor on each rank, named and shaped like a parameter; a step adds 1."""

    def __init__(self) -> None:
        super().__init__()
        self.values = {"0.weight": self.first_of(int(os.environ.get("RANK", "0")))}

        @self.on_step.after
        def count(args: PipelineHookArgs) -> None:
            self.values["0.weight"] += 1

    @staticmethod
    def first_of(rank: int) -> torch.Tensor:
        return torch.arange(28.0).reshape(7, 4) + 100 * rank

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.values = dict(state["values"])


class Training:
    """Training run of a model, sharded or in DDP, and its result."""

    def __init__(
        self,
        *,
        sharded: bool = True,
        mesh: tuple[int, ...] | None = None,
        accumulate: int = 1,
        hooks: list[HookLike] | dict[str, HookLike] | None = None,
        stop_at: int | None = None,
        wrap: Callable[[Accelerator, Any], Any] = lambda accelerator, model: model,
        model: torch.nn.Module | None = None,
        blocks: Iterable[torch.nn.Module] | None = None,
        batch_size: int = 2,
        precision: str = "no",
        **options: Any,
    ) -> None:
        accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision
        )
        self.model = make_model() if model is None else model
        if sharded:
            names = ("replicas", "shards")[-len(mesh or "1") :]
            sizes = mesh or (accelerator.num_processes,)
            shard(self.model, init_device_mesh("cpu", sizes, mesh_dim_names=names), blocks)
        self.losses: list[torch.Tensor] = []
        self.own_values = OwnValues()
        watch = PipelineHooks()
        watch.on_step.after(lambda args: self.losses.append(args.loss))
        self.samples: list[list[int]] = []
        watch.on_step.after(lambda args: self.samples.append(list(args.sample_indices)))
        if stop_at is not None:
            when = f"at steps {stop_at}"
            watch.on_step.after(when=when)(lambda args: args.requests.stop("enough"))
        self.trainer = HookBasedTrainer(
            accelerator,
            wrap(accelerator, self.model),
            make_loader(60 // batch_size, batch_size, shuffle=True),
            SimpleBatchProcessor.from_callable(loss_of),
            torch.optim.AdamW(self.model.parameters(), lr=0.05),
            hooks=(
                {"watch": watch, "own": self.own_values, **hooks}
                if isinstance(hooks, dict)
                else [watch, self.own_values, *(hooks or [])]
            ),
            max_step=options.pop("max_step", 9),
            **options,
        )
        self.trainer()

    def result(self) -> dict[str, Any]:
        weights = gather_full_tensors(self.model.state_dict(), keep=True)
        # With FSDP2 each rank keeps its own buffers; DDP broadcasts the first rank's.
        first = self.trainer.accelerator.is_main_process
        return {
            "weights": {name: v for name, v in weights.items() if first or "running" not in name},
            "losses": torch.stack(self.losses),
            "samples": self.samples,
            "progress": self.trainer.progress.state_dict(),
            "own values": self.own_values.values["0.weight"],
        }


def saving(folder: Path, **options: Any) -> list[HookLike]:
    """Return hooks with state, and hooks that write files."""
    return [
        EMAConfig(decay=0.5, export_path=str(folder / "ema.safetensors")),
        GradientClippingHookConfig(max_norm=0.5),
        SaveModelConfig(folder=folder / "model"),
        SaveCheckpointConfig(folder=folder / "checkpoints", keep_last=None, **options),
    ]


def uninterrupted_and_resumed(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, sharded in (("sharded", True), ("ddp", False)):
        for accumulate in (1, 3):
            part = folder / f"{name}{accumulate}"
            options: dict[str, Any] = {"sharded": sharded, "accumulate": accumulate}
            found[f"{name}{accumulate}"] = Training(hooks=saving(part), **options).result()
            Training(hooks=saving(part / "stopped"), stop_at=4, **options)  # within a window of 3,
            # which a sharded model completes before it stops
            last = part / "stopped" / "checkpoints" / "last"
            hooks = saving(part / "resumed")
            resumed = Training(hooks=hooks, resume_from=last, **options)
            found[f"{name}{accumulate} resumed"] = resumed.result()
    last = folder / "sharded1" / "stopped" / "checkpoints" / "last"
    crossed = Training(sharded=False, hooks=saving(folder / "to_ddp"), resume_from=last)
    found["sharded to ddp"] = crossed.result()
    last = folder / "ddp1" / "stopped" / "checkpoints" / "last"
    crossed = Training(hooks=saving(folder / "to_sharded"), resume_from=last)
    found["ddp to sharded"] = crossed.result()
    last = folder / "ddp3" / "stopped" / "checkpoints" / "last"  # within a window
    crossed = Training(hooks=saving(folder / "to_sharded3"), accumulate=3, resume_from=last)
    found["ddp to sharded within a window"] = crossed.result()
    found["replicas"] = Training(mesh=(2, 1), hooks=saving(folder / "replicas")).result()
    hooks = saving(folder / "background", every="2 steps", in_background=True)
    found["background"] = Training(hooks=hooks).result()
    return found


def saves_within_windows(folder: Path) -> dict[str, Any]:
    """Request a save after each step of three windows, and judge values within windows."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("robo_orchard_lab")
    logger.addHandler(handler)
    values = ValidationHookConfig(every="2 steps")(dataloaders={"val": make_loader(3, 2)})
    saves = SaveCheckpointConfig(
        folder=folder / "every_step",
        every="1 step",
        keep_last=None,
        keep_best=1,
        monitor="eval/val/loss",
        mode="min",
    )
    Training(accumulate=3, hooks=[values, saves])
    logger.removeHandler(handler)
    return {"not kept": [line for line in lines if "no checkpoint is kept" in line]}


def in_any_number(folder: Path, stop_at: int | None, resume_from: Path | None) -> dict[str, Any]:
    """Run a training whose result does not depend on the world size; one process does not shard."""
    processes = Accelerator(cpu=True).num_processes
    return Training(
        sharded=processes > 1,
        model=make_model(torch.nn.LayerNorm),
        batch_size=SAMPLES_PER_STEP // processes,
        hooks=saving(folder),
        stop_at=stop_at,
        resume_from=resume_from,
    ).result()


def other_hooks(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, sharded in (("sharded", True), ("ddp", False)):
        frozen = FreezeHookConfig(patterns=["0.*"], until_optimizer_step=4)
        found[f"{name} frozen"] = Training(sharded=sharded, hooks=[frozen]).result()
        clip = GradientClippingHookConfig(max_value=0.01)
        found[f"{name} by value"] = Training(sharded=sharded, hooks=[clip]).result()
        clip = GradientClippingHookConfig(max_norm=0.1, norm_type=3.0)
        found[f"{name} by another norm"] = Training(sharded=sharded, hooks=[clip]).result()
        spoil = PipelineHooks()
        spoil.on_batch.before(when="at steps 3")(spoil_on_the_second_rank)
        guarded = Training(sharded=sharded, hooks=[spoil, NonFiniteGuardConfig(policy="skip")])
        found[f"{name} skipped"] = guarded.result()
    try:
        Training(hooks=[spoil, NonFiniteGuardConfig()])
    except FloatingPointError as error:
        found["not finite"] = str(error)
    return found


def evaluations(folder: Path) -> dict[str, Any]:
    """Evaluate an average and the model on data with unequal numbers of batches per rank."""
    found: dict[str, Any] = {}
    for name, sharded in (("sharded", True), ("ddp", False)):
        values: list[tuple[str, int, float]] = []

        class Recorder(PipelineHooks):
            def __init__(self, *names: str) -> None:
                super().__init__()

                @self.on_loop.before
                def subscribe(args: PipelineHookArgs) -> None:
                    for name in names:
                        args.metrics.subscribe(name, self.record, who="Recorder")

            def record(self, value: MetricValue) -> None:
                values.append((value.name, value.step, value.value))  # noqa: B023  # of this turn

        loaders: dict[str, Any] = {
            "odd": make_loader(3, 2),
            "one": make_loader(1, 4),
            "stream": list(make_loader(5, 2)),
            "even": make_loader(4, 2),
        }
        recorder = Recorder(*(f"eval/{loader}/loss" for loader in loaders))
        config = ValidationHookConfig(every="2 steps", weights="EMA")
        own = ValidationHookConfig(every="3 steps")(dataloaders={"own": make_loader(3, 2)})
        best = KeepBestConfig(
            monitor="eval/own/loss", mode="min", path=folder / f"{name}.safetensors"
        )
        ema = EMAConfig(decay=0.5)()
        training = Training(
            sharded=sharded,
            hooks={
                "EMA": ema,
                "recorder": recorder,
                "own": own,
                "averaged": config(dataloaders=loaders),
                "best": best,
            },
        )
        found[f"{name} evaluated"] = training.result()
        found[f"{name} values"] = values
        found[f"{name} by hand"] = by_hand(training.model, ema)
    return found


@torch.no_grad()
def by_hand(model: torch.nn.Module, ema: EMA) -> list[torch.Tensor]:
    """Return outputs with the model's weights, with the average, and with the model's again."""
    model.eval()
    inputs = torch.ones(1, 4)
    outputs = [model(inputs)]
    with ema.applied():
        outputs.append(model(inputs))
    return [*outputs, model(inputs)]


def spoil_on_the_second_rank(args: Any) -> None:
    if args.accelerator.process_index == 1:
        args.batch[0][0] = torch.nan


def exchanges() -> dict[str, Any]:
    """Count collectives of gradients in accumulation windows of three steps, and of updates."""
    counted: list[int] = []
    modes: list[CommDebugMode] = []

    def begin(args: Any) -> None:
        modes.append(CommDebugMode())
        modes[-1].__enter__()

    def end(args: Any) -> None:
        modes[-1].__exit__(None, None, None)
        counts = modes[-1].get_comm_counts()
        counted.append(sum(n for what, n in counts.items() if "reduce_scatter" in str(what)))

    watch = PipelineHooks()
    watch.on_model_backward.before(begin)
    watch.on_model_backward.after(end)
    Training(accumulate=3, hooks=[watch], max_step=7)
    sync_flags: list[bool] = []
    model: Any = make_model()

    def note(synchronise: bool, recurse: bool) -> None:
        sync_flags.append(synchronise)
        FSDPModule.set_requires_gradient_sync(model, synchronise, recurse=recurse)

    model.set_requires_gradient_sync = note
    Training(accumulate=3, model=model, stop_at=5)
    updates: list[int] = []

    def end_update(args: Any) -> None:
        modes[-1].__exit__(None, None, None)
        updates.append(modes[-1].get_total_counts())

    watch = PipelineHooks()
    watch.on_optimizer_step.before(begin)
    watch.on_optimizer_step.after(end_update)
    clip = GradientClippingHookConfig(max_norm=0.1)
    Training(hooks=[watch, NonFiniteGuardConfig(), clip], max_step=3)
    return {"gradients": counted, "sync flags": sync_flags, "updates": updates}


def refusals() -> dict[str, Any]:
    accelerator = Accelerator(cpu=True)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    processor = SimpleBatchProcessor.from_callable(loss_of)
    found = {"summary": str(summarize(shard(make_model(), init_device_mesh("cpu", (2,)))))}
    os.environ["ACCELERATE_USE_FSDP"] = "true"  # as Accelerate does for a plugin
    try:
        HookBasedTrainer(accelerator, model, make_loader(), processor, optimizer, max_step=1)
    except PipelineConfigError as error:
        found["not sharded"] = str(error)
    del os.environ["ACCELERATE_USE_FSDP"]
    shard(model, init_device_mesh("cpu", (2,)))
    try:
        HookBasedTrainer(accelerator, model, make_loader(), processor, optimizer, max_step=1)
    except PipelineConfigError as error:
        found["stale optimizer"] = str(error)
    model = make_model()
    fully_shard(model[0], mesh=init_device_mesh("cpu", (2,)))  # type: ignore[index]  # a Sequential
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        HookBasedTrainer(accelerator, model, make_loader(), processor, optimizer, max_step=1)
    except PipelineConfigError as error:
        found["in part"] = str(error)
    return found


def stored(folder: Path) -> None:
    """Save sharded tensors without a model, one of them empty, of the job and of each rank."""
    mesh = init_device_mesh("cpu", (2,))
    rows, nothing = (
        distribute_tensor(value, mesh, [Shard(0)])
        for value in (torch.arange(3.0), torch.ones(0, 2))
    )
    parts = {"model": {"rows": rows, "nothing": nothing}}
    with Ranks.of_job(in_background=False) as ranks:
        save_checkpoint(folder / "stored", 1, parts, {"own": {"rows": rows}}, ranks=ranks)


def main(folder: Path) -> None:
    torch.set_default_dtype(torch.float64)
    accelerator = Accelerator(cpu=True)
    stopped = folder / "of two" / "checkpoints" / "last"
    if accelerator.num_processes == 2:
        stored(folder)
        found = {
            **uninterrupted_and_resumed(folder),
            **saves_within_windows(folder),
            **other_hooks(folder),
            **evaluations(folder),
            "exchanges": exchanges(),
            "refusals": refusals(),
            "any": in_any_number(folder / "any", None, None),
            "stopped": in_any_number(folder / "of two", 4, None),
        }
    else:
        found = {"any": in_any_number(folder / "of three", None, stopped)}
    count, index = accelerator.num_processes, accelerator.process_index
    torch.save(found, folder / f"rank{index} of {count}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
