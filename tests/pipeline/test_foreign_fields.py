"""Names and fields of scripts for RoboOrchardLab: accepted, or refused with our field."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from robo_orchard_core.utils.config import ConfigFieldError
from robo_orchard_core.utils.hook import RemovableHandle
from robo_orchard_lab.experiment import ExperimentConfig
from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline import SimpleTrainer as Simple
from robo_orchard_lab.pipeline.hook_set import PipelineHooksConfig
from robo_orchard_lab.pipeline.hooks import (
    EMAConfig,
    GradientClippingHookConfig,
    MetricsLoggerConfig,
    SaveCheckpointConfig,
    StatsMonitorConfig,
)
from robo_orchard_lab.utils import as_sequence, seed_everything
from tiny import make_trainer


@pytest.mark.parametrize(
    ("config", "fields", "remedy"),
    [
        (SaveCheckpointConfig, {"save_step_freq": 500}, "write every='500 steps'"),
        (SaveCheckpointConfig, {"save_epoch_freq": 1}, "write every='1 epoch'"),
        (SaveCheckpointConfig, {"save_step_freq": None}, "write every='100 steps'"),
        (SaveCheckpointConfig, {"save_root": "ckpt"}, "write folder='ckpt'"),
        (StatsMonitorConfig, {"step_log_freq": 25}, "write every='25 steps'"),
        (MetricsLoggerConfig, {"epoch_log_freq": 2}, "write every='2 epochs'"),
        (GradientClippingHookConfig, {"clip_mode": "norm", "max_norm": 2.0}, "max_norm=1.0"),
        (GradientClippingHookConfig, {"clip_mode": "value"}, "write max_value=0.5"),
        (GradientClippingHookConfig, {"clip_value": 0.1}, "write max_value=0.1"),
        (GradientClippingHookConfig, {"grad_max_norm": 3.0}, "write max_norm=3.0"),
        (SaveCheckpointConfig, {"resume_share_dir": "x"}, "resume_from='auto'"),
    ],
)
def test_config_names_our_field(
    config: type[PipelineHooksConfig[Any]], fields: dict[str, Any], remedy: str
) -> None:
    """A field of another framework is refused with our field and the given value."""
    with pytest.raises(ValidationError) as error:
        config(**fields)
    assert remedy in str(error.value)
    assert "errors.pydantic.dev" not in str(error.value).splitlines()[1]
    with pytest.raises(ConfigFieldError) as in_file:
        config.from_dict(fields)
    name = next(iter(fields))
    assert in_file.value.path == (name,)
    if "=" in remedy and "resume" not in remedy:  # YAML has colons
        assert remedy.partition("=")[2].removeprefix("'").rstrip("'") in str(in_file.value)


def test_all_foreign_fields_are_in_one_error() -> None:
    """One error lists all fields of another framework in a configuration."""
    with pytest.raises(ValidationError, match=r"save_step_freq(?s:.*)also save_root.*folder='a'"):
        SaveCheckpointConfig(save_step_freq=5, save_root="a")  # type: ignore[call-arg]  # foreign


def test_own_field_of_a_user_is_accepted() -> None:
    """A user's configuration may declare a field of such a name."""

    class Mine(PipelineHooks):
        def __init__(self, cfg: Any) -> None:
            super().__init__()

    class MineConfig(PipelineHooksConfig[Mine]):
        class_type: type[Mine] = Mine
        step_log_freq: int = 5

    assert MineConfig(step_log_freq=7).step_log_freq == 7


@pytest.mark.parametrize(
    ("argument", "value", "remedy"),
    [
        ("grad_max_norm", 10.0, r"hooks=\[GradientClippingHookConfig\(max_norm=10.0\)\]"),
        ("grad_clip_mode", "value", r"hooks=\[GradientClippingHookConfig\(max_value=0.5\)\]"),
        ("clip_value", 0.3, r"GradientClippingHookConfig\(max_value=0.3\)"),
        ("grad_accumulate", 4, r"Accelerator\(gradient_accumulation_steps=4\)"),
        ("val_dataloader", [1], "ValidationHookConfig"),
        ("step_eval_freq", 200, r"ValidationHookConfig\(every='200 steps'\)"),
        ("save_epoch_freq", 2, r"SaveCheckpointConfig\(every='2 epochs'\)"),
        ("step_log_freq", 10, r"MetricsLoggerConfig\(every='10 steps', sinks="),
        ("lr_scheduler_step_at", "epoch", "lr_scheduler_every='epoch'"),
        ("save_root", "runs/a", "run_folder='runs/a'"),
        ("resume_share_dir", "x", "resume_from='auto'"),
        ("max_steps", 5, "max_step=5"),
    ],
)
def test_trainer_names_our_argument(argument: str, value: Any, remedy: str) -> None:
    """An argument of another framework's trainer is refused with ours, before anything runs."""
    with pytest.raises(TypeError, match=rf"no argument '{argument}'.*{remedy}"):
        Simple(**{argument: value})


def test_other_unknown_arguments_are_usual_errors() -> None:
    """An argument that no framework has gets Python's own error."""
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'max_epohc'"):
        make_trainer(max_epohc=3)


@pytest.mark.parametrize(
    ("section", "fields", "remedy"),
    [
        ("trainer", {"grad_max_norm": 1.5}, "class_type: GradientClippingHook, max_norm: 1.5"),
        ("trainer", {"save_step_freq": 50}, r"write checkpoint: \{every: 50 steps\}"),
        ("accelerator", {"grad_accumulate": 2}, r"accelerator: \{gradient_accumulation_steps: 2\}"),
        (None, {"grad_accumulate": 2}, r"accelerator: \{gradient_accumulation_steps: 2\}"),
        ("hooks", {"a": {"class_type": "StatsMonitor", "step_log_freq": 9}}, "every: '9 steps'"),
    ],
)
def test_file_names_our_field(
    section: str | None, fields: dict[str, Any], remedy: str, tmp_path: Path
) -> None:
    """A field of another framework in an experiment file is refused with the line to write."""
    document = {
        "model": {"class_type": "torch.nn:Linear", "in_features": 2, "out_features": 1},
        "data": {"train": {"dataset": {"class_type": "torchvision.datasets:FakeData"}}},
        "batch_processor": {"class_type": "SupervisedProcessor"},
        "optimizer": {"class_type": "torch.optim:SGD", "lr": 0.1},
        "trainer": {"max_epoch": 1},
        **({section: fields} if section else fields),
    }
    file = tmp_path / "run.json"
    file.write_text(json.dumps(document), "utf-8")
    with pytest.raises(ConfigFieldError, match=remedy) as error:
        ExperimentConfig.load(file)
    assert "run.json" in str(error.value)


def test_hooks_are_found_by_name() -> None:
    """``hooks[name]`` returns a bundle at any depth; an unknown name gets a suggestion."""
    inner, outer = PipelineHooks("inner"), PipelineHooks("outer")
    outer += inner
    trainer = make_trainer(PipelineHooks.from_hooks({"average": EMAConfig()}), max_step=1)
    trainer.hooks += outer
    assert trainer.hooks["average"].name == "average"
    assert trainer.hooks["inner"] is inner
    assert "inner" in trainer.hooks
    assert "EMA" not in trainer.hooks
    assert 3 not in trainer.hooks
    with pytest.raises(KeyError, match="no hook is named 'Outer'; did you mean 'outer'"):
        trainer.hooks["Outer"]
    with pytest.raises(KeyError, match="there is OptimizerHook, average, outer, inner"):
        trainer.hooks["zz"]
    with pytest.raises(TypeError, match=r"found by name.*named_hooks"):
        list(trainer.hooks)  # type: ignore[call-overload]  # Python's protocol of sequences


def test_begin_yields_the_arguments() -> None:
    """``with hooks.begin(channel, args) as args`` runs the hooks, and yields the same object."""
    hooks, seen, args = PipelineHooks("a"), list[str](), PipelineHookArgs()
    hooks.on_step.before(lambda _: seen.append("before"))
    hooks.on_step.after(lambda _: seen.append("after"))
    with hooks.begin("on_step", args) as given:
        seen.append("body")
    assert given is args
    assert seen == ["before", "body", "after"]


def test_names_of_scripts_exist() -> None:
    """The names that scripts import are those of this project's objects."""
    from robo_orchard_lab.pipeline import hooks
    from robo_orchard_lab.pipeline.hooks import mixin

    for name in ("HookContext", "PipelineHookArgs", "PipelineHooks", "PipelineHooksConfig"):
        assert getattr(hooks, name) is getattr(mixin, name)
    assert Simple is HookBasedTrainer
    assert hooks.RemoveableHandle is RemovableHandle
    assert isinstance(hooks.RemoveableHandle[int](lambda: None), RemovableHandle)  # type: ignore[misc]  # an alias


def test_seed_everything_seeds_all_libraries() -> None:
    """Equal seeds give equal random numbers of Python, NumPy and torch; a bad seed is an error."""

    def draw() -> tuple[float, float, float]:
        assert seed_everything(7) == 7
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draw() == draw()
    with pytest.raises(ValueError, match="expected a seed from 0 to 4294967295, found -1"):
        seed_everything(-1)


def test_as_sequence_wraps_single_values() -> None:
    """A list or tuple is unchanged; None is empty; anything else is the only item."""
    items = [1, 2]
    assert as_sequence(items) is items
    assert list(as_sequence(None)) == []
    assert as_sequence("ab") == ["ab"]
