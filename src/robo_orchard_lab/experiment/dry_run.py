"""Trials of an experiment in temporary folders: dry run, fast run, resume proof."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import RandomSampler, SequentialSampler, Subset

from robo_orchard_core.utils.config import Config
from robo_orchard_core.utils.config.model import field_values
from robo_orchard_lab.experiment.build import BuiltExperiment, building, make_loader
from robo_orchard_lab.experiment.catalogue import ExperimentTrust
from robo_orchard_lab.experiment.config import ExperimentConfig
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
    """Trigger of a hook, with the number of due times in the run."""

    hook: str
    field: str
    trigger: str
    times: int | None
    """None if unknown before the run."""


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Memory of a process in bytes."""

    parameters: int
    gradients: int
    optimizer: int
    """State of the optimizer after an update."""
    peak: int
    """Peak until the first update."""
    peak_on: str
    """Device of the peak; ``"process"`` for the host memory of the process."""


@dataclass(frozen=True, slots=True)
class DryRun:
    """Facts about a run, found with its first batch."""

    run_folder: Path
    device: str
    processes: int
    parameters: int
    trained_parameters: int
    length: RunLength | None
    """None if unknown before the run."""
    loss: float | None
    """Loss of the first batch."""
    evaluated: Mapping[str, float]
    """Loss of the first batch of each evaluation set."""
    hooks: tuple[PlannedTrigger, ...]
    memory: MemoryUse


def dry_run(experiment: ExperimentConfig) -> DryRun:
    """Build an experiment, train one batch, and evaluate one batch of each evaluation set.

    The batch is trained without hooks, including its update. Files are written to a temporary
    folder.

    Raises:
        ConfigError: A part can't be built.
        Exception: Errors of the parts.
    """
    with TemporaryDirectory(prefix="dry-run-") as folder:
        built = experiment.build(run_folder=folder, resume="never")
        length = run_length(built.dataloader, built.accelerator, built.trainer.limits)
        losses: list[float] = []
        trainer = _trainer_of_one_step(built, losses)
        if built.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(built.accelerator.device)
        trainer()
        memory = _memory(trainer)
        first = {name: list(islice(iter(loader), 1)) for name, loader in built.evaluation.items()}
        evaluated: dict[str, float] = {}
        if first:
            evaluator = Evaluator(
                trainer.model, built.batch_processor, first, accelerator=built.accelerator
            )
            evaluated = {k.removesuffix("/loss"): v for k, v in evaluator.evaluate().items()}
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
        tuple(_planned(experiment, length)),
        memory,
    )


def fast_run(experiment: ExperimentConfig) -> list[str]:
    """Run two steps of an experiment, save, resume, and run a third step, in a temporary folder.

    An epoch and each evaluation set have two batches, and all triggers are due in every step.

    Returns:
        Lines of a report.

    Raises:
        ConfigError: A part can't be built.
        Exception: Errors of the parts.
    """
    fast = _fast(experiment)
    done: list[str] = []
    with TemporaryDirectory(prefix="debug-fast-") as folder:
        run_folder = Path(folder)
        first = fast.build(run_folder=run_folder, resume="never", **_short_data(fast))
        first.trainer()
        done.append(f"trained to {first.trainer.progress}")
        found = {value.name: value.value for value in first.trainer.metrics.last_values()}
        done += [f"found {name} = {value:.6g}" for name, value in sorted(found.items())]
        written = sorted(
            str(path.relative_to(run_folder)) for path in run_folder.rglob("*") if path.is_file()
        )
        tops = sorted({Path(path).parts[0] for path in written})
        done.append(f"wrote {len(written)} files: {', '.join(tops)}")
        if fast.checkpoint is not None:
            longer = fast.replace(trainer=fast.trainer.replace(max_step=STEPS + 1))
            again = longer.build(run_folder=run_folder, resume="auto", **_short_data(fast))
            resumed_at = again.trainer.progress.global_step_id
            again.trainer()
            done.append(
                f"saved, and resumed from step {resumed_at} to "
                f"{again.trainer.progress.global_step_id}"
            )
    return done


def _trainer_of_one_step(built: BuiltExperiment, losses: list[float]) -> HookBasedTrainer:
    """Build a trainer of one step without the hooks of the run; its loss is appended."""
    bundle = PipelineHooks("dry_run")

    @bundle.on_step.after
    def collect_loss(args: Any) -> None:
        if args.loss is not None:
            losses.append(float(args.loss))

    return HookBasedTrainer(
        built.accelerator,
        built.trainer.model,
        built.dataloader,
        built.batch_processor,
        built.trainer.optimizer,
        hooks=[bundle],
        max_step=1,
    )


def _memory(trainer: HookBasedTrainer) -> MemoryUse:
    parameters = [*trainer.model.parameters()]
    state = [] if trainer.optimizer is None else [*trainer.optimizer.state.values()]
    device = trainer.accelerator.device
    peak_on = "process"
    if device.type == "cuda":
        peak, peak_on = torch.cuda.max_memory_allocated(device), str(device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return MemoryUse(
        sum(map(_bytes, parameters)),
        sum(_bytes(p) for p in parameters if p.requires_grad),
        sum(
            _bytes(value)
            for of_parameter in state
            for value in of_parameter.values()
            if isinstance(value, torch.Tensor)
        ),
        peak,
        peak_on,
    )


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _planned(experiment: ExperimentConfig, length: RunLength | None) -> Iterator[PlannedTrigger]:
    hooks = dict(experiment.hooks)
    if experiment.checkpoint is not None:
        hooks[CHECKPOINT] = experiment.checkpoint
    for name, config in hooks.items():
        for field, value in _triggers(config):
            # A run that reaches its limit is saved there, whatever the trigger.
            due = (value | Last()) if isinstance(config, SaveCheckpointConfig) else value
            times = None if length is None else count_due(due, length)
            yield PlannedTrigger(name, field, str(due), times)


def _triggers(config: Config) -> Iterator[tuple[str, Trigger]]:
    for name, value in field_values(config).items():
        if isinstance(value, Trigger):
            yield name, value


def _fast(experiment: ExperimentConfig) -> ExperimentConfig:
    """Limit an experiment to a few steps, with all triggers due in every step."""
    hooks = {name: _in_every_step(config) for name, config in experiment.hooks.items()}
    checkpoint = experiment.checkpoint
    return experiment.replace(
        hooks=hooks,
        checkpoint=None if checkpoint is None else _in_every_step(checkpoint),
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


def _in_every_step(config: Any) -> Any:
    changes = {name: EverySteps(1) for name, _ in _triggers(config)}
    return config.replace(**changes) if changes else config


def build_for_resume_proof(
    run_folder: Path,
    resume_from: str | os.PathLike[str] | None,
    document: Mapping[str, Any],
    trust: Sequence[str],
) -> HookBasedTrainer:
    """Build the trainer of an experiment, in the processes of `prove_resume`.

    Args:
        run_folder: Folder of this run.
        resume_from: Checkpoint, as in `prove_resume`.
        document: Plain data of the experiment.
        trust: Names of trusted packages and classes.
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
