"""Resuming from checkpoints whose decoded state was changed."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from full_training import build
from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.checkpoint import SavedState, load_checkpoint, save_checkpoint
from robo_orchard_lab.pipeline.errors import CheckpointError

MISSING = object()
MAX_ITEMS = 3
"""Items of a long list, such as an RNG's, that are changed."""
STOP = 5
"""A step within an accumulation window, with pending metrics."""


class Stop(PipelineHooks):
    """Requests a stop after a step; has no state."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step
        self.on_step.after(self.ask)

    def ask(self, args: PipelineHookArgs) -> None:
        if args.global_step_id == self.step - 1:
            args.requests.stop("enough")


def make(folder: Path, resume_from: Any = None, **options: Any) -> HookBasedTrainer:
    torch.manual_seed(0)
    return build(folder, resume_from, saves="every step", more_hooks=True, **options)


def saved_state(folder: Path, **options: Any) -> SavedState:
    trainer = make(folder, **options)
    handle = trainer.hooks.register_pipeline_hooks(Stop(STOP))
    trainer()
    handle.remove()
    trainer.save_checkpoint(folder / "saved")
    return load_checkpoint(folder / "saved")


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of a tree's nodes, of long lists only a few."""
    yield path
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for index, item in list(enumerate(value))[:MAX_ITEMS]:
            yield from leaves(item, (*path, index))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return a tree with another value at a path; the rest is shared."""
    if not path:
        return new
    key, *rest = path
    found = dict(value) if isinstance(value, Mapping) else dict(enumerate(value))
    inner = changed(found.get(key), tuple(rest), new)
    if inner is MISSING:
        found.pop(key)
    else:
        found[key] = inner
    return found if isinstance(value, Mapping) else type(value)(found.values())


def others(value: Any) -> list[Any]:
    """Return values of other types, ranges, shapes and structures."""
    found: list[Any] = [MISSING, None, "x", True, -1, 2**62, 10**30, float("nan"), [], {}, {"x": 1}]
    found += [torch.zeros(0), torch.zeros(2, 3, 4), 0.5, (1,), [[1]], 0]
    if isinstance(value, torch.Tensor):
        found += [
            value.reshape(-1)[:0],
            value.unsqueeze(0),
            value.to(torch.complex64),
            value.tolist(),
        ]
    if isinstance(value, Mapping):
        found += [{**value, "optimizer": 1}, {**value, "step": "x"}, {**value, 3: 1}, [*value]]
    if isinstance(value, (list, tuple)):
        found += [[*value, "x"], [*value, *value], list(value)[:-1]]
    return [new for new in found if type(new) is not type(value) or new is not value]


def fingerprint(trainer: HookBasedTrainer) -> Any:
    """Return a copy of all state of a run."""
    snapshot = trainer._snapshots.take()
    return copy.deepcopy((snapshot.parts, snapshot.of_rank))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and one.dtype == other.dtype
            and one.shape == other.shape
            and bool(((one == other) | ((one != one) & (other != other))).all())
        )
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other or (one != one and other != other))


def variants(saved: SavedState, share: float) -> Iterator[tuple[str, SavedState]]:
    """Yield changed states, each with its name; a share of all changes."""
    r = random.Random(1)
    for kind, tree in (("parts", saved.parts), ("rank_parts", saved.rank_parts)):
        for path in leaves(tree):
            for new in others(at(tree, path)) if path else ():
                if r.random() < share:
                    name = f"{kind} {'.'.join(map(str, path))} = {new!r:.40}"
                    yield name, replace(saved, **{kind: changed(tree, path, new)})


def error_of(snapshots: Any, state: SavedState) -> Exception | None:
    try:
        snapshots.load(state)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize(
    ("options", "share"),
    [({}, 0.12), ({"plateau": True, "data": "own generator"}, 0.05), ({"data": "stream"}, 0.02)],
    ids=str,
)
def test_a_changed_state_is_refused_or_loaded(
    options: dict[str, Any], share: float, tmp_path: Path
) -> None:
    """Each changed value ends in an error with file and path and nothing changed, or is loaded."""
    saved = saved_state(tmp_path / "first", **options)
    trainer = make(tmp_path / "second", **options)
    snapshots = trainer._snapshots
    snapshots.load(saved)
    before, refused, loaded = fingerprint(trainer), 0, []
    for name, state in variants(saved, share):
        error = error_of(snapshots, state)
        if error is None:
            loaded.append(name)
            if error_of(snapshots, saved) is not None:  # compared with the changed objects
                trainer = make(tmp_path / "second", **options)
                snapshots = trainer._snapshots
                snapshots.load(saved)
        else:
            assert isinstance(error, CheckpointError), f"{name}: {error!r}"
            assert str(saved.info.path) in str(error), name
            assert len(str(error)) < 1500, name
            refused += 1
        assert same(fingerprint(trainer), before), f"{name} changed the run: {error}"
    assert refused > 100 * share
    assert refused > len(loaded), loaded


def test_a_run_ends_in_the_error_of_the_project(tmp_path: Path) -> None:
    """The error of a resumed run names the file and the path of the changed value."""
    saved = saved_state(tmp_path / "first")
    cases: list[tuple[str, str, tuple[Any, ...], Any]] = [
        ("trainer.json", "parts", ("trainer", "progress", "epoch_id"), "x"),
        ("trainer.json", "parts", ("trainer", "lr_scheduler", "last_epoch"), None),
        ("optimizer.json", "parts", ("optimizer", "state", "4.weight", "exp_avg"), 1.0),
        ("model.safetensors", "parts", ("model", "0.weight"), torch.zeros(1)),
        ("state.rank00000.json", "rank_parts", ("state", "hooks", "EMA", "updates"), -1),
        ("state.rank00000.json", "rank_parts", ("state", "random", "numpy", 2), 10**6),
        ("state.rank00000.json", "rank_parts", ("state", "metrics", "windows"), []),
    ]
    for file, kind, path, new in cases:
        trees = {"parts": saved.parts, "rank_parts": saved.rank_parts}
        trees[kind] = changed(trees[kind], path, new)
        folder = tmp_path / file / "".join(map(str, path))
        save_checkpoint(folder, saved.info.step, trees["parts"], trees["rank_parts"])
        with pytest.raises(CheckpointError) as caught:
            make(tmp_path / "second", folder)()
        assert str(folder / file) in str(caught.value)
        assert str(path[-1]).split(".")[0] in str(caught.value)


def test_an_object_that_refuses_its_state_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in a user's own ``load_state_dict`` names the component, and nothing changes."""

    trainer = make(tmp_path / "run")
    snapshots = trainer._snapshots
    saved = saved_state(tmp_path / "first")
    before = fingerprint(trainer)

    def broken(scheduler: Any, state: Mapping[str, Any]) -> None:
        if state["last_epoch"]:
            raise LookupError("lost")

    monkeypatch.setattr(torch.optim.lr_scheduler.OneCycleLR, "load_state_dict", broken)
    with pytest.raises(CheckpointError, match="lr_scheduler, a OneCycleLR, failed: LookupError"):
        snapshots.load(saved)
    assert same(fingerprint(trainer), before)
