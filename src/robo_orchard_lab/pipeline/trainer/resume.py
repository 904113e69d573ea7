"""Resume: choice of a checkpoint, and restore of the run from it, with changed learning rates."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import OneCycleLR, PolynomialLR

from robo_orchard_lab.pipeline.checkpoint import CheckpointStore, Ranks, SavedState, load_checkpoint
from robo_orchard_lab.pipeline.checkpoint.manifest import (
    CHECKPOINTS_FOLDER,
    LAST,
    MANIFEST_FILE,
)
from robo_orchard_lab.pipeline.errors import CheckpointError, PipelineConfigError
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.hooks.optimizer import OptimizerHook
from robo_orchard_lab.pipeline.hooks.save_checkpoint import SaveCheckpoint
from robo_orchard_lab.pipeline.job_log import announce, job_logger
from robo_orchard_lab.pipeline.model import plain_model
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from robo_orchard_lab.pipeline.progress import remaining_steps
from robo_orchard_lab.pipeline.sharding import shares_of_model
from robo_orchard_lab.pipeline.trainer.snapshot import RunSnapshots, ranks_of

logger = job_logger(__name__)

AUTO = "auto"


def resume(
    run: PipelineRun,
    hooks: PipelineHooks,
    snapshots: RunSnapshots,
    resume_from: str | os.PathLike[str],
    lr_change: LRChange,
) -> bool:
    """Restore the run from a directory, or from the newest checkpoint with ``"auto"``.

    With other LR settings than the checkpoint's, the run has its own learning rates and LR
    schedulers. All ranks call it. Returns False if there is no checkpoint yet. Errors are those of
    :class:`HookBasedTrainer`.
    """
    with ranks_of(run) as ranks:
        share_of = shares_of_model(plain_model(run))
        each_rank = snapshots.rank_states.part_of
        is_auto = os.fspath(resume_from) == AUTO
        if is_auto:
            root = _root(hooks, run.folder)
            with CheckpointStore(root, ranks=ranks) as store:  # also cleans up after a crash
                newest = store.load_newest(share_of, each_rank)
            if newest is None:
                announce(logger, f"no checkpoint in {root}; starting a fresh run", is_routine=True)
                return False
            saved = newest
            for skipped, why in saved.skipped:
                logger.warning("resuming: skipped %s: %s", skipped, why)
        else:
            path = Path(resume_from)
            ranks.run_on_first(f"looking for {path}", lambda: _check_is_checkpoint(path))
            saved = load_checkpoint(path, ranks=ranks, share_of=share_of, each_rank=each_rank)
            if saved.info.poison:
                logger.warning("resuming from %s, which %s", saved.info.path, saved.info.poison)
        if has_new_lr := lr_change.is_due(saved):
            lr_change.prepare()
        load = partial(snapshots.load, saved, with_lr_schedulers=not has_new_lr)
        ranks.run_on_all("resuming", load)
        snapshots.rank_states.reduce_gradients()
        if is_auto:
            _prune(hooks, run.folder, ranks)
    run.resumed_from = saved.info.path
    announce(logger, f"resumed from {saved.info.path} at {run.progress}", is_routine=True)
    if has_new_lr:
        lr_change.apply()
    before, now = saved.info.ranks, run.accelerator.num_processes
    if before != now:
        announce(logger, f"the world size changed from {before} to {now}")
    _warn_of_short_lr_scheduler(run, hooks)
    return True


def _prune(hooks: PipelineHooks, run_folder: Path | None, ranks: Ranks) -> None:
    """Remove checkpoints that a killed run did not come to remove; errors are warnings."""
    for hook in hooks.all_hooks():
        if isinstance(hook, SaveCheckpoint):
            try:
                with hook.store(run_folder, ranks) as store:
                    store.prune()
            except CheckpointError as error:
                logger.warning("resumed; could not remove older checkpoints: %s", error)


def _warn_of_short_lr_scheduler(run: PipelineRun, hooks: PipelineHooks) -> None:
    """Warn if an LR scheduler of the checkpoint ends before the run."""
    for hook in hooks.all_hooks():
        if isinstance(hook, OptimizerHook):
            _warn_if_short(run, hook)


def _warn_if_short(run: PipelineRun, hook: OptimizerHook) -> None:
    scheduler, progress, per_epoch = hook.lr_scheduler, run.progress, run.steps_per_epoch
    total = {OneCycleLR: "total_steps", PolynomialLR: "total_iters"}.get(type(scheduler), "")
    window = run.accelerator.gradient_accumulation_steps
    left = remaining_steps(run.limits, progress, per_epoch, window)
    if scheduler is None or not total or not left or not per_epoch:
        return
    epochs, rest = divmod(progress.step_id + left, per_epoch)
    if hook.lr_scheduler_every == "optimizer_step":
        epochs *= -(-per_epoch // window)
        epochs += -(-rest // window) - progress.step_id // window
    end, length = scheduler.last_epoch + epochs, getattr(scheduler, total)
    if end > length:
        group = scheduler.optimizer.param_groups[0]
        logger.warning(
            "%s ends after %d steps (%s, saved in the checkpoint), the run after %d: it is at step "
            "%d, where the learning rate is %.3g, of at most %.3g, and stays at its last value "
            "after the end. For a longer curve, start a new run (--resume never, or another "
            "run_folder); to fine-tune, start one from these weights with its own LR scheduler",
            *(type(scheduler).__name__, length, total, end, scheduler.last_epoch, group["lr"]),
            group.get("max_lr", group.get("initial_lr", group["lr"])),
        )


def _check_is_checkpoint(path: Path) -> None:
    """Raise a ``CheckpointError`` for a directory of checkpoints."""
    for root in (path, path / CHECKPOINTS_FOLDER):
        if (root / LAST).exists() and not (path / MANIFEST_FILE).exists():
            raise CheckpointError(
                f"expected a checkpoint, found a directory of checkpoints, {path}; pass one of "
                f"them, such as {root / LAST}, or resume_from={AUTO!r}"
            )


def _root(hooks: PipelineHooks, run_folder: Path | None) -> Path:
    for hook in hooks.all_hooks():
        if isinstance(hook, SaveCheckpoint):
            return hook.root(run_folder)
    if run_folder is None:
        raise PipelineConfigError(
            "resume_from='auto' has no directory to search; register a SaveCheckpoint, or pass "
            "run_folder to the trainer"
        )
    return run_folder / CHECKPOINTS_FOLDER


_PREVIEW = 3  # learning rates after the next one
_CYCLED = ("momentum", "betas")  # by LR schedulers that add max_momentum to a group


class LRChange:
    """Learning rates and LR schedulers of this run, in place of those of a checkpoint.

    Created before the first step of the LR schedulers, whose states it copies.
    """

    def __init__(self, run: PipelineRun, hooks: PipelineHooks) -> None:
        self._run = run
        self._hooks = [hook for hook in hooks.all_hooks() if isinstance(hook, OptimizerHook)]
        self._begin = [_copied(hook) for hook in self._hooks] if run.lr_settings is not None else []

    def is_due(self, saved: SavedState) -> bool:
        """Return True if the checkpoint was saved with other settings than this run's."""
        about = saved.info.metadata.get("configuration")
        found = about.get("lr_settings") if isinstance(about, Mapping) else None
        return self._run.lr_settings is not None and found != self._run.lr_settings

    def prepare(self) -> None:
        """Remove the options that LR schedulers added to the groups: a checkpoint may lack them."""
        for hook in self._hooks:
            for group in hook.optimizer.param_groups:
                for option in group.keys() - hook.optimizer.defaults.keys() - {"params"}:
                    del group[option]

    def apply(self) -> None:
        """Set the learning rates of this run at the restored counters, and log them.

        Each LR scheduler is stepped from its begin to the counters, on the curve of this run.
        ReduceLROnPlateau, which depends on metrics, starts again.
        """
        lines = []
        for hook, (options, state) in zip(self._hooks, self._begin, strict=True):
            groups, kept = hook.optimizer.param_groups, hook.optimizer.defaults.keys() - {"lr"}
            before = [dict(group) for group in groups]
            for group, new in zip(groups, copy.deepcopy(options), strict=True):
                is_cycled = "max_momentum" in group or "max_momentum" in new
                own = {k: group[k] for k in kept if not (is_cycled and k in _CYCLED)}
                parameters = group["params"]
                group.clear()
                group.update({**new, **own, "params": parameters})
            with _without_warnings():
                if hook.lr_scheduler is not None:
                    hook.lr_scheduler.load_state_dict(copy.deepcopy(state))
                hook.step_lr_scheduler_to(self._run.progress)
                curves = _next_learning_rates(hook)
            for number, (old, curve) in enumerate(zip(before, curves, strict=True)):
                label = [hook.optimizer_name] if hook.optimizer_name else []
                label += [f"group {number}"] if len(groups) > 1 else []
                rates = ", ".join(f"{rate:.4g}" for rate in curve)
                prefix = f"{' '.join(label)}: " if label else ""
                lines.append(f"  {prefix}{float(old['lr']):.4g} -> {rates}, ...")
        announce(logger, f"the learning rate changes at {self._run.progress}, to")
        for line in lines:
            announce(logger, line)


def _copied(hook: OptimizerHook) -> tuple[list[dict[str, Any]], Any]:
    """Copy the options of the parameter groups, and the state of the LR scheduler."""
    groups = [{k: v for k, v in g.items() if k != "params"} for g in hook.optimizer.param_groups]
    with _without_warnings():
        state = None if hook.lr_scheduler is None else hook.lr_scheduler.state_dict()
    return copy.deepcopy((groups, state))


def _next_learning_rates(hook: OptimizerHook) -> list[list[float]]:
    """Return the next learning rates of each group; optimizer and LR scheduler stay the same."""
    options, state = _copied(hook)
    found = [[float(group["lr"])] for group in hook.optimizer.param_groups]
    for _ in range(_PREVIEW):
        hook.step_lr_scheduler(1)
        for group, rates in zip(hook.optimizer.param_groups, found, strict=True):
            rates.append(float(group["lr"]))
    for group, before in zip(hook.optimizer.param_groups, options, strict=True):
        group.update(before)
    if hook.lr_scheduler is not None:
        hook.lr_scheduler.load_state_dict(state)
    return found


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: the optimizer has made no step in this process
        yield
