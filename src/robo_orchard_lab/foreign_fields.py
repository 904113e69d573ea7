"""Fields of other training frameworks, mostly RoboOrchardLab, and what to write instead.

The fields are refused with an error that names this project's field and has a worked value; see
docs/how_to/migrate_robo_orchard_lab.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

Form: TypeAlias = Literal["python", "file"]
"""Form of a remedy: an argument in Python, or a line of an experiment file."""
Remedy: TypeAlias = Callable[[Any, Form], str]

_STEPS = r"(?:\w+_)?step_(?:\w+_)?freq\w*|(?:\w+_)?freq_steps?"
_EPOCHS = _STEPS.replace("step", "epoch")


def _set(name: str, value: Any, form: Form) -> str:
    return f"write {name}={value!r}" if form == "python" else f"write {name}: {value!r}"


def _every(unit: str, default: int) -> Remedy:
    def remedy(value: Any, form: Form) -> str:
        count = value if type(value) is int and value > 0 else default
        text = f"{count} {unit}{'' if count == 1 else 's'}"
        return f"{_set('every', text, form)}; triggers are joined by '|': '100 steps | 1 epoch'"

    return remedy


def _field(name: str, example: Any) -> Remedy:
    def remedy(value: Any, form: Form) -> str:
        return _set(name, example if value is None else value, form)

    return remedy


def _clip_mode(value: Any, form: Form) -> str:
    name, example = ("max_value", 0.5) if value == "value" else ("max_norm", 1.0)
    return f"{_set(name, example, form)}, which implies the mode"


def _number(value: Any, default: float) -> Any:
    return value if isinstance(value, int | float) and value else default


def _clipping(name: str, default: float) -> Remedy:
    def remedy(value: Any, form: Form) -> str:
        bound = _number(value, default)
        if form == "file":
            return f"add a hook, clip: {{class_type: GradientClippingHook, {name}: {bound}}}"
        return f"pass hooks=[GradientClippingHookConfig({name}={bound})]"

    return remedy


def _clipping_mode(value: Any, form: Form) -> str:
    name, example = ("max_value", 0.5) if value == "value" else ("max_norm", 1.0)
    return _clipping(name, example)(None, form)


def _hook(hook: str, unit: str, default: int, more: str = "") -> Remedy:
    def remedy(value: Any, form: Form) -> str:
        count = value if type(value) is int and value > 0 else default
        every = f"{count} {unit}{'' if count == 1 else 's'}"
        if form == "file":
            if hook == "SaveCheckpoint":
                return f"write checkpoint: {{every: {every}}}"
            return f"add a hook, {{class_type: {hook}, every: {every}}}"
        return f"pass hooks=[{hook}Config(every={every!r}{more})]"

    return remedy


def _validation(value: Any, form: Form) -> str:
    if form == "file":
        return (
            "write data: {evaluation: {val: {dataset: ...}}}, and add a hook, "
            "{class_type: ValidationHook, every: 1 epoch}"
        )
    return (
        "pass hooks=[ValidationHookConfig(every='1 epoch')(dataloaders={'val': val_dataloader}, "
        "metrics={'error': metric})]"
    )


def _accumulation(value: Any, form: Form) -> str:
    count = value if type(value) is int and value > 0 else 4
    if form == "file":
        return f"write accelerator: {{gradient_accumulation_steps: {count}}}"
    return f"pass accelerator=Accelerator(gradient_accumulation_steps={count})"


def _scheduler_unit(value: Any, form: Form) -> str:
    unit = "epoch" if "epoch" in str(value) else "optimizer_step"
    if form == "file":
        return f"write lr_scheduler: {{every: {unit}}}"
    return _set("lr_scheduler_every", unit, form)


def _resume(value: Any, form: Form) -> str:
    if form == "file":
        return "remove it: train FILE resumes the run of its folder"
    return "pass resume_from='auto' to the trainer, and a folder that all nodes see"


def _seed(value: Any, form: Form) -> str:
    seed = value if type(value) is int else 0
    if form == "file":
        return f"write seed: {seed} at the top level"
    return f"call seed_everything({seed}), and pass data_order=DataOrder(seed={seed})"


_IN_HOOKS: tuple[tuple[str, Remedy], ...] = (
    (_STEPS, _every("step", 100)),
    (_EPOCHS, _every("epoch", 1)),
    (r"save_(?:root|dir|path)", _field("folder", "checkpoints")),
    (r"max_to_keep|total_limit|save_total_limit", _field("keep_last", 3)),
    (r"(?:grad_)?clip_mode", _clip_mode),
    (r"(?:grad_)?clip_value", _field("max_value", 0.5)),
    (r"(?:grad_)?(?:clip_|max_)norm", _field("max_norm", 1.0)),
    (r"(?:grad_)?norm_type", _field("norm_type", 2.0)),
    (r"resume_\w+", _resume),
)
_IN_TRAINER: tuple[tuple[str, Remedy], ...] = (
    (r"(?:step_save|save_step)_freq", _hook("SaveCheckpoint", "step", 1000)),
    (r"(?:epoch_save|save_epoch)_freq", _hook("SaveCheckpoint", "epoch", 1)),
    (r"(?:step_eval|eval_step)_freq", _hook("ValidationHook", "step", 1000)),
    (r"(?:epoch_eval|eval_epoch)_freq", _hook("ValidationHook", "epoch", 1)),
    (_STEPS, _hook("MetricsLogger", "step", 100, ", sinks=[LogSinkConfig()]")),
    (_EPOCHS, _hook("MetricsLogger", "epoch", 1, ", sinks=[LogSinkConfig()]")),
    (r"val(?:idation)?_dataloader|eval_dataloader|metrics?", _validation),
    (r"save_(?:root|dir|path)|workspace_root|output_dir", _field("run_folder", "runs/1")),
    (r"(?:grad_)?clip_mode", _clipping_mode),
    (r"(?:grad_)?clip_value", _clipping("max_value", 0.5)),
    (r"(?:grad_)?(?:clip_|max_)norm", _clipping("max_norm", 1.0)),
    (r"(?:grad_)?norm_type", _clipping_mode),
    (r"grad_?accum\w*|gradient_accumulation\w*|accumulation_steps", _accumulation),
    (r"lr_scheduler_step_at", _scheduler_unit),
    (r"resume_\w+", _resume),
    (r"seed", _seed),
    (r"(?:max|num)_epochs?", _field("max_epoch", 10)),
    (r"(?:max|num)_steps?", _field("max_step", 1000)),
)


def foreign_remedy(owner: Literal["hook", "trainer"], name: str, value: Any, form: Form) -> str:
    """Return what to write instead of a field of another framework, or an empty text.

    >>> foreign_remedy("hook", "save_step_freq", 500, "python")
    "write every='500 steps'; triggers are joined by '|': '100 steps | 1 epoch'"
    >>> foreign_remedy("trainer", "grad_max_norm", 10.0, "file")
    'add a hook, clip: {class_type: GradientClippingHook, max_norm: 10.0}'
    >>> foreign_remedy("hook", "decay", 0.9, "python")
    ''
    """
    for pattern, remedy in _IN_HOOKS if owner == "hook" else _IN_TRAINER:
        if re.fullmatch(pattern, name):
            return remedy(value, form)
    return ""
