"""Snapshot of a run at a commit point: capture for a checkpoint, and restore from one.

State shared by all ranks is saved once, and every rank saves its own state. Model weights and
optimizer state are parts of their own, with tensors by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from robo_orchard_lab.pipeline.checkpoint import (
    FiniteCheck,
    Ranks,
    SavedState,
    load_named_optimizer_state,
    named_optimizer_state,
    non_finite_names,
    save_checkpoint,
)
from robo_orchard_lab.pipeline.checkpoint.manifest import LOSSES
from robo_orchard_lab.pipeline.context import PipelineRun, Snapshot
from robo_orchard_lab.pipeline.data import TrainingData
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.model import plain_model, plain_name, plain_state, plain_weights
from robo_orchard_lab.pipeline.progress import TrainerProgress
from robo_orchard_lab.pipeline.run.run_info import describe_run
from robo_orchard_lab.pipeline.sharding import reshard
from robo_orchard_lab.pipeline.trainer.accumulation import AccumulationWindows
from robo_orchard_lab.pipeline.trainer.rank_state import (
    RankStates,
    adopt_replaced_parameters,
    check_keys,
    check_tensors,
    checked_rank_state,
    trained_names,
)

STATE_VERSION = 4
_KEYS = {
    "data",
    "lr_scheduler",
    "model_extra",
    "processes",
    "progress",
    "scaler",
    "types",
    "version",
    "window",
}


_GRADIENTS = "own_gradients.", "reduced_gradients."


class RunSnapshots:
    """Captures a run, and restores a run from a snapshot.

    ``check_weights`` raises an error if the weights differ between ranks.
    """

    def __init__(
        self,
        run: PipelineRun,
        hooks: PipelineHooks,
        data: TrainingData,
        windows: AccumulationWindows,
        check_weights: Callable[[], None],
    ) -> None:
        self._run = run
        self._check_weights = check_weights
        self._hooks = hooks
        self._data = data
        self._window = windows.length
        self.rank_states = RankStates(run, hooks, data, windows)
        """State of this rank; after :meth:`load`, restore its RNG and reduce its gradients."""
        buffers = {
            plain_name(name): buffer
            for name, buffer in plain_model(run).named_buffers()
            if not buffer.is_meta
        }
        run.constants = frozenset(non_finite_names(buffers))  # a device sync

    def take(self) -> Snapshot:
        """Capture the run at a commit point; tensors are references. All ranks call it.

        A collective if metrics are pending, and to compare the weights of DDP's ranks.
        """
        self._check_weights()
        reshard(plain_model(self._run))
        return Snapshot(
            parts=self._parts(),
            of_rank={"state": self.rank_states.take()},
            about=self._about,
            finite=self._finite_check(),
        )

    def _finite_check(self) -> FiniteCheck:
        """Return the check of weights, optimizer state and losses; syncs the device for losses."""
        are_finite = [check() for check in self._run.loss_checks.values()]  # resets all of them
        return FiniteCheck(self._should_be_finite, [] if all(are_finite) else [LOSSES])

    def _should_be_finite(self, name: str) -> bool:
        # Of a rank's state, parameters outside the model and gradients of an open window. An fp16
        # scaler expects overflowing gradients. Buffers come from the first rank.
        part, _, tensor = name.partition("/")
        if part == "state":
            has_scaler = self._run.accelerator.scaler is not None
            kinds = ("beside.",) if has_scaler else ("beside.", *_GRADIENTS)
            return tensor.startswith(kinds)
        return part == "optimizer" or (part == "model" and tensor not in self._run.constants)

    @cached_property
    def _about(self) -> dict[str, Any]:
        """Description of the run, from the first snapshot, since it costs milliseconds."""
        return describe_run(self._run, self._hooks)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a snapshot into a new directory. All ranks call it."""
        snapshot = self.take()
        with ranks_of(self._run) as ranks:
            save_checkpoint(
                folder,
                self._run.progress.global_step_id,
                snapshot.parts,
                snapshot.of_rank,
                metadata=snapshot.about,
                ranks=ranks,
                finite=snapshot.finite,
            )

    def load(self, saved: SavedState) -> None:
        """Restore the run from a snapshot, up to the RNG and the gradients of sharded parameters.

        All comparisons come before the first change of a live object. If a hook refuses its state,
        all hooks get their previous states back. The checkpoint is read with
        :meth:`RankStates.part_of`.

        Raises:
            StateError: the snapshot belongs to a different model, optimizer, LR scheduler or set
                of hooks, to an open accumulation window of a different length, or can't be
                restored at this world size.
        """
        run, parts = self._run, saved.parts
        trainer = _checked_trainer_state(parts)
        own = checked_rank_state(saved.rank_parts)
        self._check_compatible(saved, trainer)
        if saved.rank_results:
            key = f"{trainer['data']['seed']}/{saved.info.step}"
            own = self.rank_states.redistribute(own, saved.rank_results, key)
        if own["window"]["within"] and trainer["window"] != self._window:
            raise StateError(
                f"the run was saved within an accumulation window of {trainer['window']} batches, "
                f"which can't continue with {self._window}; resume with "
                f"gradient_accumulation_steps={trainer['window']}"
            )
        model = plain_model(run)
        entries = {plain_name(name): name for name in model.state_dict()}
        found = {**parts["model"], **trainer["model_extra"]}
        check_tensors(
            "the saved model is different",
            model.state_dict(),
            {entries.get(n, n): value for n, value in found.items()},
        )
        TrainerProgress().load_state_dict(trainer["progress"])
        optimizer_state = (
            load_named_optimizer_state(run.optimizer, trained_names(run), parts["optimizer"])
            if run.optimizer
            else None
        )
        self.rank_states.check(own, trainer["data"])

        self.rank_states.load_hooks(own)
        run.progress.load_state_dict(trainer["progress"])
        found |= {name: value for name, value in own["buffers"].items() if name in entries}
        before = dict(model.named_parameters())
        model.load_state_dict({entries[name]: value for name, value in found.items()})
        adopt_replaced_parameters(run, before)
        if run.optimizer is not None:
            run.optimizer.load_state_dict(optimizer_state)  # type: ignore[arg-type]  # one has both
        if run.lr_scheduler is not None:
            run.lr_scheduler.load_state_dict(trainer["lr_scheduler"])
        if run.accelerator.scaler is not None:
            run.accelerator.scaler.load_state_dict(trainer["scaler"])
        self.rank_states.load(own, trainer["data"])

    def _check_compatible(self, saved: SavedState, trainer: Mapping[str, Any]) -> None:
        """Check parts, ranks, and the classes of optimizer, LR scheduler and scaler."""
        run, parts = self._run, saved.parts
        if "model" not in parts or ("optimizer" in parts) != (run.optimizer is not None):
            optimizer = "an" if run.optimizer else "no"
            raise StateError(
                f"the saved parts are {', '.join(sorted(parts))}; this run has a model and "
                f"{optimizer} optimizer"
            )
        if trainer["processes"] != saved.info.ranks:
            raise StateError(
                f"expected the states of {trainer['processes']} ranks, found {saved.info.ranks}; "
                "call save_checkpoint on all ranks"
            )
        for part, live in _types_of(run).items():
            if (type_then := trainer["types"].get(part)) != live:
                raise StateError(
                    f"expected the {part} of the saved run, {type_then or 'none'}; "
                    f"found {live or 'none'}"
                )

    def _parts(self) -> dict[str, Any]:
        """Return the state shared by all ranks, by file."""
        run = self._run
        weights = plain_weights(run)
        scaler = run.accelerator.scaler
        parts: dict[str, Any] = {
            "model": weights,
            "trainer": {
                "version": STATE_VERSION,
                "processes": run.accelerator.num_processes,
                "progress": run.progress.state_dict(),
                "model_extra": {n: v for n, v in plain_state(run).items() if n not in weights},
                "window": self._window,
                "lr_scheduler": run.lr_scheduler.state_dict() if run.lr_scheduler else None,
                "scaler": scaler.state_dict() if scaler else None,
                "types": _types_of(run),
                "data": self._data.state_dict(),
            },
        }
        if run.optimizer is not None:
            parts["optimizer"] = named_optimizer_state(run.optimizer, trained_names(run))
        return parts


def ranks_of(run: PipelineRun) -> Ranks:
    """Return the ranks that save and load together; a collective for several ranks."""
    several = run.accelerator.num_processes > 1
    return Ranks.of_job(in_background=False) if several else Ranks.alone()


def _types_of(run: PipelineRun) -> dict[str, str | None]:
    """Return the class names of optimizer, LR scheduler and scaler."""
    parts = {
        "optimizer": run.optimizer,
        "lr_scheduler": run.lr_scheduler,
        "scaler": run.accelerator.scaler,
    }
    return {name: None if part is None else type(part).__qualname__ for name, part in parts.items()}


def _checked_trainer_state(parts: Mapping[str, Any]) -> Mapping[str, Any]:
    trainer = parts.get("trainer")
    found_version = trainer.get("version") if isinstance(trainer, dict) else None
    if not isinstance(trainer, dict) or found_version != STATE_VERSION:
        raise StateError(
            f"expected a trainer state of version {STATE_VERSION}, found {found_version!r}; resume "
            "with the release that wrote the checkpoint"
        )
    check_keys("the trainer's state", trainer, _KEYS)
    return trainer
