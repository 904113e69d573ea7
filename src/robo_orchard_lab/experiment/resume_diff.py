"""Differences between two configurations of a run, and their effects on a resumed run."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, get_args

from robo_orchard_core.utils.config import Config
from robo_orchard_core.utils.config.errors import dotted
from robo_orchard_core.utils.config.formats import first_difference
from robo_orchard_core.utils.config.parts import PART_KEYS
from robo_orchard_core.utils.config.references import union_members
from robo_orchard_lab.experiment.overrides import OPTIMIZERS, are_named_parts, walk
from robo_orchard_lab.experiment.parts import (
    AUTO,
    HARMLESS,
    ExperimentFields,
    OnResume,
    ResumeEffect,
)

EFFECTS: tuple[ResumeEffect, ...] = get_args(ResumeEffect)[::-1]
"""The effects of changes, the worst first."""

MISSING = "not there"
"""Stand-in for the value of a document without the field."""

_CHANGES_TRAJECTORY = OnResume("trajectory")


@dataclass(frozen=True, slots=True)
class Difference:
    """Difference of one value between two configurations of a run, as plain data.

    Attributes:
        before: Plain data, or `MISSING`; likewise ``after``.
        why: Reason of the effect; empty where the reason is obvious.
    """

    path: tuple[str, ...]
    before: Any
    after: Any
    resume: ResumeEffect
    why: str = ""

    @property
    def field(self) -> str:
        """Dotted path of the value."""
        return dotted(self.path)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """Compare two resolved experiments and return the differences, the worst first.

    A part of another class is one difference, and so is a list.

    Args:
        before: Plain data of the run to resume.
        after: Plain data of the resumed run.

    >>> [d.field for d in differences({"seed": 0, "name": "a"}, {"seed": 1, "name": "b"})]
    ['seed', 'name']
    """
    found = []
    has_new_lr = lr_settings(before) != lr_settings(after)
    for path, old, new in _changed_values(before, after, ()):
        rule = _rule(path, old, new, after, has_new_lr)
        found.append(Difference(path, old, new, rule.effect, rule.why))
    old_hooks, hooks = _at(before, "hooks") or {}, _at(after, "hooks") or {}
    common = [name for name in old_hooks if name in hooks]
    moved = [name for name in hooks if name in old_hooks]
    if common != moved:
        effect = _effect_of(_class_of(hooks[name]) for name in moved).effect
        found.append(
            Difference(("hooks",), common, moved, effect, "hooks are nested in this order")
        )
    return sorted(found, key=lambda difference: EFFECTS.index(difference.resume))


def lr_settings(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the learning rates and LR schedulers of a resolved experiment.

    A run that resumes with other settings keeps its own learning rates and LR schedulers.

    >>> lr_settings({"optimizer": {"class_type": "a:B", "lr": 0.1, "betas": [0.9, 0.99]}})
    {'optimizer': {'lr': 0.1}, 'lr_scheduler': None}
    """
    curves: Any = _curve(document.get("lr_scheduler"))
    if are_named_parts(curves):
        curves = {name: _curve(each) for name, each in curves.items()}
    return {"optimizer": _learning_rates(document.get("optimizer")), "lr_scheduler": curves}


def _learning_rates(part: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in part.items() if isinstance(part, Mapping) else ():
        if key == "lr":
            found[key] = value
        elif inner := _learning_rates(value):
            found[key] = inner
    return found


def _curve(scheduler: Any) -> Any:
    """Return an LR scheduler without its interval, which may change alone."""
    if not isinstance(scheduler, Mapping):
        return scheduler
    return {key: value for key, value in scheduler.items() if key not in ("every", "monitor")}


def _changed_values(
    before: Any, after: Any, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        if first_difference(before, after) is not None:
            yield path, before, after
        return
    for key in PART_KEYS:
        old, new = before.get(key, MISSING), after.get(key, MISSING)
        if first_difference(old, new) is not None:
            if MISSING in (old, new):
                yield path, before, after
            else:
                yield (*path, key), old, new
            return
    for key in [*before, *(key for key in after if key not in before)]:
        old, new = before.get(key, MISSING), after.get(key, MISSING)
        if old == MISSING:
            old = _default_argument(before, key, new)
        elif new == MISSING:
            new = _default_argument(after, key, old)
        yield from _changed_values(old, new, (*path, str(key)))


def _default_argument(part: Mapping[str, Any], argument: str, other: Any) -> Any:
    """Return ``other`` if equal to the default of an omitted argument, else `MISSING`."""
    cls = _class_of(part)
    try:
        default = inspect.signature(cls).parameters[argument].default if cls else MISSING
    except (KeyError, TypeError, ValueError):  # no such parameter, or no signature
        return MISSING
    if isinstance(default, tuple):
        default = [*default]
    is_default = default == other and isinstance(default, bool) == isinstance(other, bool)
    return other if is_default else MISSING


def _rule(
    path: tuple[str, ...], old: Any, new: Any, document: Mapping[str, Any], has_new_lr: bool
) -> OnResume:
    """Return the resume rule of a changed value; ``document`` belongs to the resumed run."""
    if path[:1] in OPTIMIZERS and are_named_parts(_at(document, path[0])):
        path = (path[0], *path[2:])  # the rule of an optimizer does not depend on its name
    match path:
        case ("hooks", _, *inner):
            return _hook_rule(path[:2], inner, old, new, document)
        case ("trainer", limit) if limit.startswith("max_"):
            scheduler: Any = document.get("lr_scheduler")
            if has_new_lr:
                return _declared_rule(path)  # the new curve is computed with the new limit
            values = [value for _, value in walk(scheduler)]
            if AUTO in values:
                why = (
                    f"auto in lr_scheduler keeps the checkpoint's number, counted for {limit} "
                    f"{old}: its curve ends there; start a new run for {new}"
                )
                parts = [value for value in values if isinstance(value, dict)]
                if any("func" in part and AUTO in part.values() for part in parts):
                    why = (
                        f"auto in lr_scheduler is counted again for {limit} {new}: functions of a "
                        "LambdaLR follow the new curve, other LR schedulers end at the "
                        f"checkpoint's number; start a new run for {new}"
                    )
                return OnResume("trajectory", why)
            schedulers = [scheduler, *(scheduler.values() if are_named_parts(scheduler) else ())]
            totals = (_at(s, key) for s in schedulers for key in ("total_steps", "total_iters"))
            total = next((total for total in totals if isinstance(total, int)), None)
            if total is not None:
                why = f"lr_scheduler still ends after {total} steps; start a new run to change it"
                return OnResume(_declared_rule(path).effect, why)
        case ("data", "train", "num_workers"):
            if _at(document, "data", "order", "keyed_by") == "none":
                why = "with data.order.keyed_by none, each worker has its own RNG"
                return OnResume("trajectory", why)
            dataset = _class_of(_at(document, "data", "train", "dataset"))
            if dataset is not None and _is_iterable_only(dataset):
                why = "each worker reads its shard of an iterable dataset"
                return OnResume("trajectory", why)
    return _declared_rule(path)


def _is_iterable_only(dataset: type) -> bool:
    from torch.utils.data import IterableDataset

    return issubclass(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")


def _declared_rule(path: tuple[str, ...]) -> OnResume:
    """Return the declared rule of a field."""
    rule = _CHANGES_TRAJECTORY
    config: type[Config] | None = ExperimentFields
    for key in path:
        if config is None:
            if key not in PART_KEYS:
                rule = rule.within.get(key, rule.within.get("*", rule))
        elif (field := config.model_fields.get(key)) is None:
            return _CHANGES_TRAJECTORY
        else:
            marks = (mark for mark in field.metadata if isinstance(mark, OnResume))
            rule = next(marks, rule)
            kinds = (kind for kind in union_members(field.annotation) if isinstance(kind, type))
            config = next((kind for kind in kinds if issubclass(kind, Config)), None)
    return rule


def _hook_rule(
    path: tuple[str, ...], inner: list[str], old: Any, new: Any, document: Mapping[str, Any]
) -> OnResume:
    """Return the rule of an added, removed, replaced or changed hook."""
    if inner and inner[0] not in PART_KEYS:
        return _effect_of([_class_of(_at(document, *path))])
    from robo_orchard_lab.pipeline.hook_set import PipelineHooks

    classes = [_class_of(value) for value in (old, new) if value is not MISSING]
    without_state = PipelineHooks.state_dict
    if any(getattr(cls, "state_dict", without_state) is not without_state for cls in classes):
        return OnResume("impossible", "the checkpoint holds the state of each hook by name")
    return _effect_of(classes)


def _effect_of(classes: Iterable[type | None]) -> OnResume:
    """Return the rule of changes of hooks, from the promise of their classes."""
    keeps = all(getattr(cls, "keeps_trajectory", False) for cls in classes)
    return HARMLESS if keeps else _CHANGES_TRAJECTORY


def _class_of(part: Any) -> type | None:
    """Return the class of a part if already imported, or a built-in hook."""
    reference = part.get("class_type") if isinstance(part, Mapping) else part
    if not isinstance(reference, str) or ":" not in reference:
        return None
    name, _, attribute = reference.partition(":")
    if name.startswith("robo_orchard_lab.pipeline.hooks."):
        with suppress(ImportError):  # a hook of another version
            importlib.import_module(name)
    found = getattr(sys.modules.get(name), attribute, None)
    return found if isinstance(found, type) else None


def _at(document: Any, *keys: str) -> Any:
    for key in keys:
        document = document.get(key) if isinstance(document, Mapping) else None
    return document
