"""Effects of changed configurations on a resumed run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch  # noqa: F401 - whose classes tell their defaults once they are imported

from robo_orchard_lab.experiment.parts import ResumeEffect
from robo_orchard_lab.experiment.resume_diff import MISSING, differences

HOOKS = "robo_orchard_lab.pipeline.hooks"
STATS = {"class_type": f"{HOOKS}.stats_monitor:StatsMonitor", "every": "50 steps"}
BAR = {"class_type": f"{HOOKS}.progress_bar:ProgressBarHook"}
CLIP = {"class_type": f"{HOOKS}.gradient_clipping:GradientClippingHook", "max_norm": 1.0}


def document() -> dict[str, Any]:
    return {
        "name": "digits",
        "seed": 0,
        "run_folder": "runs/digits",
        "model": {"func": "torchvision.models.resnet:resnet18", "num_classes": 10},
        "data": {
            "train": {
                "dataset": {"class_type": "digits_parts:Digits", "train": True},
                "batch_size": 64,
                "shuffle": True,
                "num_workers": 0,
                "sampler": None,
            },
            "evaluation": {"val": {"dataset": {"class_type": "digits_parts:Digits"}}},
            "order": {"keyed_by": "batch"},
        },
        "optimizer": {
            "class_type": "torch.optim.sgd:SGD",
            "lr": 0.1,
            "groups": {"head": {"parameters": ["fc.*"], "lr": 0.5}},
        },
        "lr_scheduler": {"class_type": "torch.optim.lr_scheduler:StepLR", "step_size": 3},
        "hooks": {"stats": STATS, "bar": BAR, "clip": CLIP},
        "trainer": {"max_epoch": 5, "max_step": None},
        "accelerator": {"mixed_precision": "no", "gradient_accumulation_steps": 1},
        "checkpoint": {"every": "1 epoch", "keep_last": 2, "folder": None},
        "resume": "auto",
    }


def changed(*keys: str, to: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the document and a changed copy; `MISSING` removes the value."""
    after = copy.deepcopy(document())
    *above, last = keys
    at = after
    for key in above:
        at = at[key]
    if to is MISSING:
        del at[last]
    else:
        at[last] = to
    return document(), after


CHANGES: list[tuple[str, Any, ResumeEffect]] = [
    ("name", "other", "harmless"),
    ("run_folder", "elsewhere", "harmless"),
    ("seed", 1, "impossible"),
    ("model", {"class_type": "my:Net"}, "impossible"),
    ("model.func", "torchvision.models.resnet:resnet34", "impossible"),
    ("model.num_classes", 11, "trajectory"),
    ("data.train.dataset.train", False, "trajectory"),
    ("data.train.dataset.class_type", "mine:Letters", "trajectory"),
    ("data.train.batch_size", 32, "trajectory"),
    ("data.train.shuffle", False, "impossible"),
    ("data.train.sampler", {"class_type": "mine:Sampler"}, "impossible"),
    ("data.train.num_workers", 2, "harmless"),
    ("data.evaluation.test", {"dataset": {"class_type": "mine:Letters"}}, "harmless"),
    ("data.order.keyed_by", "sample", "impossible"),
    ("optimizer.lr", 0.2, "trajectory"),
    ("optimizer.class_type", "torch.optim.adamw:AdamW", "impossible"),
    ("optimizer.groups.head.lr", 0.1, "trajectory"),
    ("optimizer.groups.head.weight_decay", 0.1, "impossible"),
    ("optimizer.weight_decay", 0.1, "impossible"),
    ("lr_scheduler", None, "trajectory"),
    ("lr_scheduler.step_size", 4, "trajectory"),
    ("lr_scheduler.every", "epoch", "trajectory"),
    ("lr_scheduler.monitor", "eval/val/loss", "trajectory"),
    ("lr_scheduler.lr_lambda", "mine:decay", "trajectory"),
    ("hooks.stats.every", "10 steps", "harmless"),
    ("hooks.stats", MISSING, "impossible"),
    ("hooks.bar", MISSING, "harmless"),
    ("hooks.summary", {"class_type": f"{HOOKS}.model_summary:ModelSummary"}, "harmless"),
    ("hooks.clip.max_norm", 2.0, "trajectory"),
    ("hooks.clip", MISSING, "trajectory"),
    ("hooks.mine", {"class_type": "mine:Hook"}, "trajectory"),
    ("hooks.stats.class_type", f"{HOOKS}.ema:EMA", "impossible"),
    ("trainer.max_epoch", 10, "harmless"),
    ("trainer.max_step", 10, "harmless"),
    ("accelerator.mixed_precision", "bf16", "trajectory"),
    ("accelerator.gradient_accumulation_steps", 2, "trajectory"),
    ("checkpoint.keep_last", 5, "harmless"),
    ("checkpoint.folder", "elsewhere", "impossible"),
    ("checkpoint", None, "impossible"),
]


@pytest.mark.parametrize(("place", "to", "resume"), CHANGES, ids=[place for place, *_ in CHANGES])
def test_each_change_has_its_effect(place: str, to: Any, resume: ResumeEffect) -> None:
    """A change of one value is one difference, with its path and effect."""
    before, after = changed(*place.split("."), to=to)
    (found,) = differences(before, after)
    assert (found.field, found.resume) == (place, resume)
    assert found.after == to


def test_equal_documents_do_not_differ() -> None:
    """A document has no difference from itself, and 1 is not True."""
    assert differences(document(), document()) == []
    assert len(differences({"a": 1}, {"a": True})) == 1


def test_explicit_default_is_no_difference() -> None:
    """Writing a default explicitly is no difference."""
    assert differences(*changed("optimizer", "momentum", to=0.0)) == []
    assert differences(*changed("optimizer", "momentum", to=0.0)[::-1]) == []
    assert differences(*changed("optimizer", "nesterov", to=False)) == []
    assert [d.field for d in differences(*changed("optimizer", "momentum", to=0.9))] == [
        "optimizer.momentum"
    ]
    assert [d.field for d in differences(*changed("lr_scheduler", "last_epoch", to=-1))] == []


def test_changed_limit_matters_to_an_auto_lr_scheduler() -> None:
    """The value of auto depends on the limits, but a checkpoint keeps the old value."""
    before, after = changed("trainer", "max_epoch", to=10)
    for each in (before, after):
        each["lr_scheduler"] = {
            "class_type": "torch.optim.lr_scheduler:OneCycleLR",
            "total_steps": "auto",
        }
    (found,) = differences(before, after)
    assert "counted for max_epoch 5: its curve ends there; start a new run for 10" in found.why
    factor = {"func": "my_team:factor", "total": "auto"}  # code, which a checkpoint does not keep
    for scheduler in (factor, {"class_type": "a:LambdaLR", "lr_lambda": [factor]}):
        new = differences(*({**each, "lr_scheduler": scheduler} for each in (before, after)))
        assert "is counted again for max_epoch 10: functions of a LambdaLR follow" in new[0].why
        assert new[0].resume == "trajectory"
    for each in (before, after):
        each["lr_scheduler"]["total_steps"] = 120
    (harmless,) = differences(before, after)
    assert harmless.resume == "harmless"
    assert "still ends after 120 steps; start a new run to change it" in harmless.why
    assert found.resume == "trajectory"
    assert "auto" in found.why


def test_num_workers_matters_with_their_own_rng() -> None:
    """Without keyed random numbers, a different number of workers changes the samples."""
    before, after = changed("data", "train", "num_workers", to=2)
    for each in (before, after):
        each["data"]["order"]["keyed_by"] = "none"
    assert [found.resume for found in differences(before, after)] == ["trajectory"]


def test_num_workers_matters_to_an_iterable_dataset() -> None:
    """Each worker reads its own shard of a stream."""
    import torch.utils.data

    before, after = changed("data", "train", "num_workers", to=2)
    for each in (before, after):
        name = f"{torch.utils.data.IterableDataset.__module__}:IterableDataset"
        each["data"]["train"]["dataset"] = {"class_type": name}
    assert [found.resume for found in differences(before, after)] == ["trajectory"]


def test_another_lr_scheduler_changes_the_trajectory() -> None:
    """Another function or class, or another function as an argument, changes the trajectory."""
    before, after = document(), document()
    for each, name in ((before, "a"), (after, "b")):
        each["lr_scheduler"] = {"func": f"my_team.schedules:{name}"}
    assert [found.resume for found in differences(before, after)] == ["trajectory"]
    for each, name in ((before, "a"), (after, "b")):
        each["lr_scheduler"] = {
            "class_type": "torch.optim.lr_scheduler:LambdaLR",
            "lr_lambda": f"my_team.schedules:{name}",
        }
    assert [found.resume for found in differences(before, after)] == ["trajectory"]


def test_a_removed_hook_class_has_differences() -> None:
    """Changes of a hook class unknown to this version are trajectory changes."""
    gone = {"class_type": f"{HOOKS}.gone_with_version_1:Gone", "every": 3}
    before, after = changed("hooks", "clip", to=gone)
    assert [found.field for found in differences(before, after)] == ["hooks.clip.class_type"]
    before["hooks"]["clip"] = {**gone, "every": 4}
    assert [found.resume for found in differences(before, after)] == ["trajectory"]


def test_reordered_hooks_are_a_difference() -> None:
    """Reordered hooks are one difference, harmless if the hooks do not affect training."""
    before, after = document(), document()
    after["hooks"] = {"bar": BAR, "clip": CLIP, "stats": STATS}
    (found,) = differences(before, after)
    assert (found.field, found.resume) == ("hooks", "trajectory")
    before["hooks"], after["hooks"] = {"stats": STATS, "bar": BAR}, {"bar": BAR, "stats": STATS}
    assert [found.resume for found in differences(before, after)] == ["harmless"]


def test_differences_are_sorted_by_effect() -> None:
    """The most severe differences come first."""
    before, after = changed("name", to="other")
    after["seed"], after["hooks"]["clip"]["max_norm"] = 3, 5.0
    found = [difference.resume for difference in differences(before, after)]
    assert found == ["impossible", "trajectory", "harmless"]
