"""What a run that is gone on with by another configuration would be.

A change is ``harmless`` where the weights after each step stay what they would have been, though
the run may end earlier or later; it ``changes the trajectory`` where they don't; and it is
``impossible`` where a checkpoint can't go on that way, or would undo the change without a word, as
with the options of an optimizer, which are in its state.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

from robo_orchard_core.utils.config.errors import dotted
from robo_orchard_core.utils.config.parts import PART_KEYS

Resume: TypeAlias = Literal["harmless", "trajectory", "impossible"]
RESUMES: tuple[Resume, ...] = ("impossible", "trajectory", "harmless")
"""The worst first."""

MISSING = "not there"
"""What stands for a value in the document that lacks it."""

_SAVED = "a checkpoint holds it, and a resumed run takes it from there"
_OTHER = "the checkpoint is that of another one"
_ORDER = "the order of samples follows from it"
_RULES: tuple[tuple[str, Resume, str], ...] = (
    # The first that fits counts; what none fits changes the trajectory.
    ("name", "harmless", ""),
    ("resume", "harmless", ""),
    ("run_folder", "harmless", ""),
    ("seed", "impossible", f"{_ORDER}, and what a run draws is in its checkpoints"),
    ("model", "impossible", _OTHER),
    ("model.class_type", "impossible", _OTHER),
    ("model.func", "impossible", _OTHER),
    ("model.*", "trajectory", "refused where weights of other names or shapes follow of it"),
    ("data.evaluation*", "harmless", ""),
    ("data.order.keyed_by", "impossible", f"{_ORDER} together with the seed"),
    ("data.order.*", "harmless", ""),
    ("data.train.dataset*", "trajectory", "refused where it has another number of samples"),
    ("data.train.batch_size", "trajectory", "within an epoch, data.order.allow_other_batch_size"),
    ("data.train.shuffle", "impossible", _ORDER),
    ("data.train.*sampler*", "impossible", _ORDER),
    ("data.train.pin_memory", "harmless", ""),
    ("data.train.timeout", "harmless", ""),
    ("data.train.prefetch_factor", "harmless", ""),
    ("data.train.persistent_workers", "harmless", ""),
    ("optimizer*", "impossible", _SAVED),
    ("lr_scheduler", "impossible", _OTHER),
    ("lr_scheduler.class_type", "impossible", _OTHER),
    ("lr_scheduler.func", "impossible", _OTHER),
    ("lr_scheduler.every", "trajectory", ""),
    ("lr_scheduler.schedulers*", "impossible", _SAVED),
    ("trainer.max_*", "harmless", ""),
    ("trainer.agree_every", "harmless", ""),
    ("trainer.stall_timeout_s", "harmless", ""),
    ("accelerator.mixed_precision", "trajectory", "refused where one of the two is fp16"),
    ("accelerator.find_unused_parameters", "harmless", ""),
    ("accelerator.cpu", "trajectory", "refused where the devices are of another kind"),
    ("checkpoint", "impossible", "the hook's state is in the checkpoint"),
    ("checkpoint.folder", "impossible", "checkpoints would be looked for in another folder"),
    ("checkpoint.*", "harmless", ""),
)


@dataclass(frozen=True, slots=True)
class Difference:
    """One value that two configurations of a run differ in."""

    path: tuple[str, ...]
    before: Any
    """Plain data, or `MISSING`."""
    after: Any
    resume: Resume
    why: str = ""
    """Why that is so, where it isn't plain."""

    @property
    def field(self) -> str:
        """The dotted path."""
        return dotted(self.path)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """What two resolved documents of experiments differ in, the worst first.

    Args:
        before: of the run that is to go on, as plain data.
        after: of what it is to go on as.

    Returns:
        Of a part whose class is another one, the class alone; of a list, the whole list.

    >>> [str(d.place) for d in differences({"seed": 0, "name": "a"}, {"seed": 1, "name": "b"})]
    ['seed', 'name']
    """
    found = [
        Difference(path, one, other, *_judged(path, one, other, before, after))
        for path, one, other in _changed(before, after, ())
    ]
    found += _order_of_hooks(before, after)
    return sorted(found, key=lambda difference: RESUMES.index(difference.resume))


def _changed(
    before: Any, after: Any, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        if not _same(before, after):
            yield path, before, after
        return
    for key in PART_KEYS:
        one, other = before.get(key, MISSING), after.get(key, MISSING)
        if not _same(one, other):
            if MISSING in (one, other):
                yield path, before, after
            else:
                yield (*path, key), one, other
            return
    for key in [*before, *(key for key in after if key not in before)]:
        one, other = before.get(key, MISSING), after.get(key, MISSING)
        if one == MISSING:
            one = _unsaid(before, key, other)
        elif other == MISSING:
            other = _unsaid(after, key, one)
        yield from _changed(one, other, (*path, str(key)))


def _unsaid(part: Mapping[str, Any], argument: str, said: Any) -> Any:
    """The default of an argument that a part doesn't say, as the other one says it."""
    cls = _class_at(part)
    try:
        default = inspect.signature(cls).parameters[argument].default if cls else MISSING
    except (KeyError, TypeError, ValueError):  # it has none of this name, or doesn't tell
        return MISSING
    if isinstance(default, tuple):
        default = [*default]
    is_said = default == said and isinstance(default, bool) == isinstance(said, bool)
    return said if is_said else MISSING


def _same(one: Any, other: Any) -> bool:
    """Whether two values are written alike, which 1 and True are not, nor 1 and 1.0."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return [*one] == [*other] and all(_same(one[key], other[key]) for key in one)
    return type(one) is type(other) and bool(one == other)


def _judged(
    path: tuple[str, ...],
    before: Any,
    after: Any,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
) -> tuple[Resume, str]:
    place = dotted(path)
    if path[0] == "hooks" and len(path) > 1:
        return _of_hook(path, before, after, new)
    if place.startswith("trainer.max_") and _has_auto(new.get("lr_scheduler")):
        return "trajectory", "the schedule's length, which is auto, stays that of the checkpoint"
    if place == "data.train.num_workers":
        return _of_workers(old, new)
    if path[0] == "lr_scheduler" and len(path) > 1 and path[1] not in (*PART_KEYS, "every"):
        return ("trajectory", "") if _is_code(before) or _is_code(after) else ("impossible", _SAVED)
    for pattern, resume, why in _RULES:
        if fnmatchcase(place, pattern):
            return resume, why
    return "trajectory", ""


def _of_workers(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[Resume, str]:
    """Other workers load the same, but for streams that each has a part of."""
    keyed = _at(new, "data", "order", "keyed_by")
    if keyed == "none":
        return "trajectory", "with data.order.keyed_by none, what workers draw is their own"
    dataset = _class_at(_at(new, "data", "train", "dataset"))
    if dataset is not None and _has_no_index(dataset):
        return "trajectory", "each worker has its part of an iterable dataset"
    return "harmless", ""


def _of_hook(
    path: tuple[str, ...], before: Any, after: Any, new: Mapping[str, Any]
) -> tuple[Resume, str]:
    """Of a hook that is there before and after, or in one of them."""
    whole = len(path) == 2 or path[2] in PART_KEYS
    if whole:
        classes = [_class_at(value) for value in (before, after) if value is not MISSING]
        if any(cls is not None and _keeps_state(cls) for cls in classes):
            return "impossible", "the state of each hook is in the checkpoint, by its name"
    else:
        classes = [_class_at(_at(new, *path[:2]))]
    if all(getattr(cls, "keeps_trajectory", False) for cls in classes):
        return "harmless", ""
    return "trajectory", ""


def _order_of_hooks(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Difference]:
    """Where the same hooks are nested in another order."""
    old, new = _at(before, "hooks") or {}, _at(after, "hooks") or {}
    common = [name for name in old if name in new]
    moved = [name for name in new if name in old]
    if common != moved:
        kept = all(getattr(_class_at(new[name]), "keeps_trajectory", False) for name in moved)
        why = "hooks are nested in their order"
        yield Difference(("hooks",), common, moved, "harmless" if kept else "trajectory", why)


def _keeps_state(cls: type) -> bool:
    from robo_orchard_lab.pipeline.hook_set import PipelineHooks

    own = PipelineHooks.state_dict
    return getattr(cls, "state_dict", own) is not own


def _has_no_index(dataset: type) -> bool:
    from torch.utils.data import IterableDataset

    return issubclass(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")


def _is_code(value: Any) -> bool:
    """Whether a value of a schedule is code, such as a ``lr_lambda``, which no checkpoint holds."""
    return isinstance(value, Mapping) or (isinstance(value, str) and ":" in value)


def _has_auto(lr_scheduler: Any) -> bool:
    if isinstance(lr_scheduler, Mapping):
        return any(map(_has_auto, lr_scheduler.values()))
    return (
        any(map(_has_auto, lr_scheduler))
        if isinstance(lr_scheduler, list)
        else lr_scheduler == "auto"
    )


def _class_at(part: Any) -> type | None:
    """The class that a part names, if that is imported already or one of ours; None otherwise."""
    reference = part.get("class_type") if isinstance(part, Mapping) else part
    if not isinstance(reference, str) or ":" not in reference:
        return None
    name, _, attribute = reference.partition(":")
    if name.startswith("robo_orchard_lab.pipeline.hooks."):
        with suppress(ImportError):  # of a hook that another version had
            importlib.import_module(name)
    found = getattr(sys.modules.get(name), attribute, None)
    return found if isinstance(found, type) else None


def _at(document: Any, *keys: str) -> Any:
    for key in keys:
        document = document.get(key) if isinstance(document, Mapping) else None
    return document
