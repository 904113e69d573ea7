"""Trials of an experiment in temporary folders: dry run, fast run, resume proof."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import RandomSampler, SequentialSampler, Subset

from robo_orchard_core.utils.config import Config
from robo_orchard_core.utils.config.model import field_values
from robo_orchard_lab.experiment.build import make_loader, with_data
from robo_orchard_lab.experiment.catalogue import ExperimentTrust
from robo_orchard_lab.experiment.config import ExperimentConfig
from robo_orchard_lab.experiment.construction import building
from robo_orchard_lab.experiment.parts import CHECKPOINT, TrainerConfig
from robo_orchard_lab.experiment.run_plan import RunLength, count_due, run_length
from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHooks
from robo_orchard_lab.pipeline.data.loader import copy_loader, is_map_style
from robo_orchard_lab.pipeline.evaluator import Evaluator
from robo_orchard_lab.pipeline.hooks import SaveCheckpointConfig
from robo_orchard_lab.pipeline.trigger import EverySteps, Last, Trigger

STEPS = 2
"""Steps of a fast run, and batches of each of its data sets."""


@dataclass(frozen=True, slots=True)
class PlannedTrigger:
    """Trigger of a hook, with the number of due times in the run; None if unknown before."""

    hook: str
    field: str
    trigger: str
    times: int | None


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Memory of a process in bytes.

    Attributes:
        optimizer: State of the optimizers after an update.
        peak: Peak until the first update.
        peak_on: Device of the peak; ``"process"`` for the host memory of the process.
    """

    parameters: int
    gradients: int
    optimizer: int
    peak: int
    peak_on: str

    @classmethod
    def of(cls, trainer: HookBasedTrainer) -> MemoryUse:
        """Measure the memory of a trainer after an update."""

        def size(tensors: Iterable[Any]) -> int:
            return sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t))

        parameters = [*trainer.model.parameters()]
        states = [state for each in trainer.optimizers.values() for state in each.state.values()]
        device = trainer.accelerator.device
        if device.type == "cuda":
            peak, peak_on = torch.cuda.max_memory_allocated(device), str(device)
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            peak_on = "process"
        return cls(
            size(parameters),
            size(p for p in parameters if p.requires_grad),
            size(value for state in states for value in state.values()),
            peak,
            peak_on,
        )


@dataclass(frozen=True, slots=True)
class DryRun:
    """Facts about a run, found with its first batch.

    Attributes:
        length: None if unknown before the run.
        loss: Loss of the first batch.
        evaluated: Loss of the first batch of each evaluation set.
    """

    run_folder: Path
    device: str
    processes: int
    parameters: int
    trained_parameters: int
    length: RunLength | None
    loss: float | None
    evaluated: dict[str, float]
    hooks: tuple[PlannedTrigger, ...]
    memory: MemoryUse


def dry_run(experiment: ExperimentConfig) -> DryRun:
    """Build an experiment, train one batch, and evaluate one batch of each evaluation set.

    The batch is trained without hooks, including its update and a step of the LR scheduler. Files
    are written to a temporary folder. Errors are those of `ExperimentConfig.build` and of the
    parts.
    """
    losses: list[float] = []
    bundle = PipelineHooks("dry_run")

    @bundle.on_step.after
    def collect_loss(args: Any) -> None:
        if args.loss is not None:
            losses.append(float(args.loss))

    with TemporaryDirectory(prefix="dry-run-") as folder:
        built = experiment.build(run_folder=folder, resume="never")
        length = run_length(built.dataloader, built.accelerator, built.trainer.limits)
        trainer = HookBasedTrainer(
            built.accelerator,
            built.trainer.model,
            built.dataloader,
            built.batch_processor,
            built.trainer.optimizer or built.trainer.optimizers or None,
            built.trainer.lr_scheduler or built.trainer.lr_schedulers or None,
            hooks=[bundle],
            max_step=1,
            locate=experiment.locate,
        )
        if built.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(built.accelerator.device)
        trainer()
        memory = MemoryUse.of(trainer)
        first = {name: list(islice(iter(loader), 1)) for name, loader in built.evaluation.items()}
        evaluated: dict[str, float] = {}
        if first:
            evaluator = Evaluator(
                trainer.model, built.batch_processor, first, accelerator=built.accelerator
            )
            evaluated = {k.removesuffix("/loss"): v for k, v in evaluator.evaluate().items()}
    planned = []
    for name, config in {**experiment.hooks, CHECKPOINT: experiment.checkpoint}.items():
        for field, trigger in _triggers(config).items():
            # A run that reaches its limit is saved there, whatever the trigger.
            due = (trigger | Last()) if isinstance(config, SaveCheckpointConfig) else trigger
            times = None if length is None else count_due(due, length)
            planned.append(PlannedTrigger(name, field, str(due), times))
    parameters = [*built.model.parameters()]
    return DryRun(
        experiment.folder(),
        str(built.accelerator.device),
        built.accelerator.num_processes,
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
        length,
        losses[0] if losses else None,
        evaluated,
        tuple(planned),
        memory,
    )


def fast_run(experiment: ExperimentConfig) -> list[str]:
    """Run two steps of an experiment, save, resume, and run a third step, in a temporary folder.

    An epoch and each evaluation set have two batches, and all triggers are due in every step.
    Errors are those of `ExperimentConfig.build` and of the parts.

    Returns:
        Lines of a report.
    """
    with experiment.located():
        fast = _fast(with_data(experiment))  # the short data below has no such values
    with TemporaryDirectory(prefix="debug-fast-") as folder:
        run_folder = Path(folder)
        first = fast.build(run_folder=run_folder, resume="never", **_short_data(fast))
        first.trainer()
        done = [f"trained to {first.trainer.progress}"]
        found = {value.name: value.value for value in first.trainer.metrics.last_values()}
        done += [f"found {name} = {value:.6g}" for name, value in sorted(found.items())]
        written = [path.relative_to(run_folder) for path in run_folder.rglob("*") if path.is_file()]
        tops = sorted({path.parts[0] for path in written})
        done.append(f"wrote {len(written)} files: {', '.join(tops)}")
        if fast.checkpoint is not None:
            longer = fast.replace(**{"trainer.max_step": STEPS + 1})
            again = longer.build(run_folder=run_folder, resume="auto", **_short_data(fast)).trainer
            resumed_at = again.progress.global_step_id
            again()
            reached = again.progress.global_step_id
            done.append(f"saved, and resumed from step {resumed_at} to {reached}")
    return done


def _triggers(config: Config | None) -> dict[str, Trigger]:
    """Return the triggers of a hook by the names of their fields."""
    fields = {} if config is None else field_values(config)
    return {name: value for name, value in fields.items() if isinstance(value, Trigger)}


def _fast(experiment: ExperimentConfig) -> ExperimentConfig:
    """Limit an experiment to a few steps, with all triggers due in every step."""

    def in_every_step(config: Any) -> Any:
        changes = dict.fromkeys(_triggers(config), EverySteps(1))
        return config.replace(**changes) if changes else config

    return experiment.replace(
        hooks={name: in_every_step(config) for name, config in experiment.hooks.items()},
        checkpoint=in_every_step(experiment.checkpoint),
        # Resuming within an epoch must also work with data that can't be seeked.
        **{"data.order.fast_forward": True},
        trainer=TrainerConfig(
            max_step=STEPS,
            agree_every=experiment.trainer.agree_every,
            stall_timeout_s=experiment.trainer.stall_timeout_s,
        ),
    )


def _short_data(experiment: ExperimentConfig) -> dict[str, Any]:
    """Build loaders of two batches each; iterable training data stays complete."""
    evaluation: dict[str, Iterable[Any]] = {}
    for name, config in experiment.data.evaluation.items():
        with building("data", "evaluation", name):
            evaluation[name] = [*islice(make_loader(config), STEPS)]
    train = experiment.data.train
    if train is None:  # refused by build()
        return {"evaluation": evaluation}
    with building("data", "train"):
        dataloader = make_loader(train)
    is_plain = is_map_style(dataloader) and train.sampler is None and train.batch_sampler is None
    if is_plain and train.batch_size is not None:
        samples = min(len(dataloader.dataset), STEPS * train.batch_size)  # type: ignore[arg-type]
        sampler = RandomSampler if train.shuffle else SequentialSampler
        few = Subset(dataloader.dataset, range(samples))
        dataloader = copy_loader(
            dataloader,
            dataset=few,
            batch_size=train.batch_size,
            sampler=sampler(few),
            drop_last=train.drop_last,
        )
    return {"dataloader": dataloader, "evaluation": evaluation}


def build_for_resume_proof(
    run_folder: Path,
    resume_from: str | os.PathLike[str] | None,
    document: Mapping[str, Any],
    trust: Sequence[str],
) -> HookBasedTrainer:
    """Build the trainer of an experiment, in the processes of `prove_resume`.

    ``document`` is the plain data of the experiment, ``trust`` the names of trusted packages and
    classes; the other arguments are as in `prove_resume`.
    """
    trusted = ExperimentTrust.of(trust, pyproject=False)
    trusted.make_local_modules_importable()
    experiment = ExperimentConfig.from_dict(document, trust=trusted.trust)
    return experiment.build(run_folder=run_folder, resume=resume_from or "never").trainer


def spread_stops(steps: int, stops: int) -> list[int]:
    """Spread a number of stops evenly over the steps of a run.

    >>> spread_stops(20, 3), spread_stops(3, 5)
    ([5, 10, 15], [1, 2])
    """
    found = {round(steps * (number + 1) / (stops + 1)) for number in range(stops)}
    return sorted(stop for stop in found if 0 < stop < steps)
