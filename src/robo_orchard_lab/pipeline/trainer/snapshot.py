"""Snapshot of a run at a commit point: capture for a checkpoint, and restore from one.

State shared by all ranks is saved once, and every rank saves its own state. Model weights and
optimizer state are parts of their own, with tensors by name.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from robo_orchard_lab.pipeline.checkpoint import (
    FiniteCheck,
    Ranks,
    SavedState,
    load_named_optimizer_state,
    named_optimizer_state,
    non_finite_names,
    save_checkpoint,
)
from robo_orchard_lab.pipeline.checkpoint.manifest import LOSSES, FileName
from robo_orchard_lab.pipeline.data import TrainingData
from robo_orchard_lab.pipeline.errors import CheckpointError, StateError
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.model import plain_model, plain_name, plain_state, plain_weights
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun, Snapshot
from robo_orchard_lab.pipeline.progress import TrainerProgress
from robo_orchard_lab.pipeline.run.run_info import describe_run, of_each
from robo_orchard_lab.pipeline.sharding import reshard
from robo_orchard_lab.pipeline.state_schema import Count, StateSchema, Text, check_similar
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
_SCHEMA = StateSchema(
    STATE_VERSION,
    data=dict[Text, Any],
    lr_scheduler=dict[Text, Any] | None,
    model_extra=dict[Text, Any],
    processes=Count,
    progress=dict[Text, Any],
    scaler=dict[Text, Any] | None,
    types=dict[Text, Text | None],
    window=Count,
)


_GRADIENTS = "own_gradients.", "reduced_gradients."


class RunSnapshots:
    """Capture of a run, and restore of a run from a snapshot.

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

    def load(self, saved: SavedState, *, with_lr_schedulers: bool = True) -> None:
        """Restore the run from a snapshot, up to the RNG and the gradients of sharded parameters.

        All checks come before the first change of a live object. If an object's own
        ``load_state_dict`` fails nevertheless, all objects get their previous states back. The
        checkpoint is read with :meth:`RankStates.part_of`.

        Args:
            saved: the snapshot.
            with_lr_schedulers: False leaves the LR schedulers as they are, also other ones.

        Raises:
            CheckpointError: the snapshot belongs to a different model, optimizer, LR scheduler or
                set of hooks, to an open accumulation window of a different length, or can't be
                restored at this world size; the message has the file and the path of the value.
        """
        run, parts = self._run, saved.parts
        model = plain_model(run)
        entries = {plain_name(name): name for name in model.state_dict()}
        rank = min(run.accelerator.process_index, saved.info.ranks - 1)
        of_rank = FileName("state", rank, is_json=True)
        with _in_file(saved, "trainer.json"):
            trainer = _checked_trainer_state(parts)
            stateful = {
                kind: live_by_name
                for kind, live_by_name in _stateful(run).items()
                if with_lr_schedulers or kind != "lr_scheduler"
            }
            self._check_compatible(saved, trainer, stateful)
            progress = TrainerProgress()
            progress.optimizer_steps = dict.fromkeys(run.optimizer_names, 0)
            progress.load_state_dict(trainer["progress"])
            _check_similar_states(run, trainer, stateful)
        with _in_file(saved, str(of_rank)):
            own = checked_rank_state(saved.rank_parts)
            if saved.rank_results:
                key = f"{trainer['data']['seed']}/{saved.info.step}"
                own = self.rank_states.redistribute(own, saved.rank_results, key)
            self._check_window(own, trainer)
        with _in_file(saved, "model.safetensors"):
            found = {**parts["model"], **trainer["model_extra"]}
            found |= {name: value for name, value in own["buffers"].items() if name in entries}
            check_tensors(
                "the saved model is different",
                model.state_dict(),
                {entries.get(n, n): value for n, value in found.items()},
            )
        with _in_file(saved, "optimizer.json"):
            names = trained_names(run)
            optimizer_states = {
                name: load_named_optimizer_state(optimizer, names, of_one, _path(name))
                for name, optimizer in run.optimizers.items()
                for of_one in [_of_name(parts["optimizer"], name)]
            }
        with _in_file(saved, str(of_rank)):
            self.rank_states.check(own, trainer["data"])

        with ExitStack() as undo:
            self.rank_states.load_hooks(own, undo)
            _load_into(run.progress, "progress", trainer["progress"], undo)
            before = dict(model.named_parameters())
            weights = {entries[name]: value for name, value in found.items()}
            _load_into(model, "model", weights, undo)
            adopt_replaced_parameters(run, before)
            for name, optimizer in run.optimizers.items():
                _load_into(optimizer, _path(name), optimizer_states[name], undo)
            for kind, live_by_name in stateful.items():
                for name, live in live_by_name.items():
                    _load_into(live, _path(name, kind), _of_name(trainer[kind], name), undo)
            self.rank_states.load(own, trainer["data"])
            undo.pop_all()

    def _check_window(self, own: Mapping[str, Any], trainer: Mapping[str, Any]) -> None:
        if own["window"].get("within") and trainer["window"] != self._window:
            raise StateError(
                f"the run was saved within an accumulation window of {trainer['window']} batches, "
                f"which can't continue with {self._window}; resume with "
                f"gradient_accumulation_steps={trainer['window']}"
            )

    def _check_compatible(
        self,
        saved: SavedState,
        trainer: Mapping[str, Any],
        stateful: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Check parts, ranks, and the classes of optimizers and of other objects with a state."""
        run, parts = self._run, saved.parts
        if not isinstance(parts.get("model"), Mapping) or ("optimizer" in parts) != bool(
            run.optimizers
        ):
            optimizer = "an" if run.optimizers else "no"
            raise StateError(
                f"the saved parts are {', '.join(sorted(parts))}; this run has a model and "
                f"{optimizer} optimizer"
            )
        if trainer["processes"] != saved.info.ranks:
            raise StateError(
                f"expected the states of {trainer['processes']} ranks, found {saved.info.ranks}; "
                "call save_checkpoint on all ranks"
            )
        types, live_types = trainer["types"], _types_of(run)
        kinds = ("optimizer", *stateful)
        for part in (p for p in {**live_types, **types} if p.partition(".")[0] in kinds):
            live, type_then = live_types.get(part), types.get(part)
            if type_then != live:
                raise StateError(
                    f"expected the {part} of the saved run, {type_then or 'none'}; "
                    f"found {live or 'none'}"
                )

    def _parts(self) -> dict[str, Any]:
        """Return the state shared by all ranks, by file."""
        run = self._run
        weights, names = plain_weights(run), trained_names(run)
        parts: dict[str, Any] = {
            "model": weights,
            "trainer": {
                "version": STATE_VERSION,
                "processes": run.accelerator.num_processes,
                "progress": run.progress.state_dict(),
                "model_extra": {n: v for n, v in plain_state(run).items() if n not in weights},
                "window": self._window,
                **{
                    kind: of_each(live, lambda each: each.state_dict())
                    for kind, live in _stateful(run).items()
                },
                "types": _types_of(run),
                "data": self._data.state_dict(),
            },
        }
        if run.optimizers:
            parts["optimizer"] = of_each(
                run.optimizers, lambda each: named_optimizer_state(each, names)
            )
        return parts


def ranks_of(run: PipelineRun) -> Ranks:
    """Return the ranks that save and load together; a collective for several ranks."""
    several = run.accelerator.num_processes > 1
    return Ranks.of_job(in_background=False) if several else Ranks.alone()


def _stateful(run: PipelineRun) -> dict[str, Mapping[str, Any]]:
    """Return LR schedulers and scalers by the names of their optimizers."""
    return {"lr_scheduler": run.lr_schedulers, "scaler": run.scalers}


def _of_name(saved: Any, name: str) -> Any:
    """Return the state of an optimizer from the form of :func:`of_each`; None if missing."""
    return saved.get(name) if name and isinstance(saved, Mapping) else saved


def _path(name: str, kind: str = "optimizer") -> str:
    return f"{kind}.{name}" if name else kind


def _types_of(run: PipelineRun) -> dict[str, str | None]:
    """Return the class names of optimizers, LR schedulers and scalers."""
    found: dict[str, str | None] = dict.fromkeys(("optimizer", "lr_scheduler", "scaler"))
    for kind, by_name in {"optimizer": run.optimizers, **_stateful(run)}.items():
        found |= {_path(name, kind): type(each).__qualname__ for name, each in by_name.items()}
    return found


def _checked_trainer_state(parts: Mapping[str, Any]) -> Mapping[str, Any]:
    trainer = parts.get("trainer")
    found_version = trainer.get("version") if isinstance(trainer, dict) else None
    if not isinstance(trainer, dict) or found_version != STATE_VERSION:
        raise StateError(
            f"expected a trainer state of version {STATE_VERSION}, found {found_version!r}; resume "
            "with the release that wrote the checkpoint"
        )
    check_keys("the trainer's state", trainer, {*_SCHEMA.names})
    _SCHEMA.check(trainer, "trainer")
    return trainer


@contextmanager
def _in_file(saved: SavedState, name: str) -> Iterator[None]:
    """Raise errors of a saved state with its file."""
    try:
        yield
    except CheckpointError:
        raise
    except StateError as error:
        raise CheckpointError(f"{saved.info.path / name}: {error}") from error


def _check_similar_states(
    run: PipelineRun, trainer: Mapping[str, Any], stateful: Mapping[str, Mapping[str, Any]]
) -> None:
    """Compare the saved states of LR schedulers and scalers with the live ones."""
    found = [
        (_path(name, kind), name, live, _of_name(trainer[kind], name))
        for kind, by_name in stateful.items()
        for name, live in (by_name or {"": None}).items()
    ]
    for path, name, live, saved in found:
        if (live is None) != (saved is None):
            expected = "no state, found one" if live is None else "a state, found none"
            raise StateError(f"{path}: expected {expected}; pass the objects of the saved run")
        if live is None:
            continue
        if not isinstance(saved, Mapping):
            raise StateError(f"{path}: expected a mapping, found {type(saved).__name__}")
        own = live.state_dict()
        is_of_torch = type(live).__module__.startswith("torch.")
        check_similar(own, saved, path, strict=is_of_torch)
        # Releases of torch differ in private entries.
        if lost := sorted(key for key in own if key not in saved and not key.startswith("_")):
            raise StateError(f"{path}.{lost[0]}: expected a value, found none")
        for key in saved:
            if key == "optimizer" or (key not in own and callable(getattr(live, key, None))):
                raise StateError(f"{path}.{key}: expected no such entry, found one")
        optimizer = run.optimizers.get(name)
        groups = 0 if optimizer is None else len(optimizer.param_groups)
        for key in ("base_lrs", "_last_lr"):
            if key in own and len(own[key]) == groups != len(saved.get(key, own[key])):
                found_values = len(saved[key])
                raise StateError(f"{path}.{key}: expected {groups} values, found {found_values}")


def _load_into(live: Any, name: str, state: Any, undo: ExitStack) -> None:
    """Load a state; ``undo`` restores the previous one, from a copy until the end of the load.

    A copy of the weights needs less memory than the gradients, which do not exist yet.
    """
    previous = {
        key: value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
        for key, value in live.state_dict().items()
        if not is_lazy(value)
    }

    def restore() -> None:
        with suppress(Exception):  # the error of the load is raised
            live.load_state_dict(previous)

    undo.callback(restore)
    try:
        live.load_state_dict(state)
    except Exception as error:
        raise CheckpointError(
            f"load_state_dict of the {name}, a {type(live).__qualname__}, failed: "
            f"{type(error).__name__}: {error}"
        ) from error
