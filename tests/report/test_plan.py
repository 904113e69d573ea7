"""Hooks of a run in its story: effects, changes at resumes, costs; hostile and damaged files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from robo_orchard_lab.pipeline import PIPELINE_CHANNELS, PipelineHooks
from robo_orchard_lab.pipeline.hooks import EMAConfig
from robo_orchard_lab.pipeline.plan import RunPlan
from robo_orchard_lab.report.files import Problems
from robo_orchard_lab.report.page import render
from robo_orchard_lab.report.plan import read_plan
from run_folders import HOSTILE, Page


def write(folder: Path, plan: Any = None, profile: Any = None) -> Path:
    """Write the files of a run folder that have content; return the folder."""
    for name, content in (("plan.json", plan), ("profile.json", profile)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


def cost(hook: str, phase: str, self_s: float, **fields: Any) -> dict[str, Any]:
    own = {"channel": "on_step", "position": 1, "hook": hook, "phase": phase}
    times = {"calls": 11, "first_s": 0.5, "self_s": self_s, "total_s": self_s, "share": self_s / 4}
    return {**own, **times, **fields}


PROFILE = {
    "version": 1,
    "steps": 10,
    "step_seconds": 0.4,
    "first_step_s": 1.5,
    "stages": {
        "forward": {"total_s": 3.0, "step_s": 0.3, "share": 0.75},
        "hooks": {"total_s": 1.0, "step_s": 0.1, "share": 0.25},
    },
    "hooks": [cost("mine", "before", 0.2), cost("mine", "after", 0.6)],
    "ranks": [{}, {}],
}


def entry(hook: str, **fields: Any) -> dict[str, Any]:
    own = {"channel": "on_step", "hook": hook, "class_name": "Mine", "when": "always"}
    return {**own, "before": "a.py:1", "after": "a.py:2", **fields}


def test_a_hook_has_its_effects_and_costs(tmp_path: Path) -> None:
    """Costs of before and after add up; the story has the stages of a step."""
    effects = {"reads": ["loss"], "changes": [], "requests": ["stop"]}
    hooks = [entry("mine", **effects), entry("silent")]
    write(tmp_path, {"version": 2, "hooks": hooks}, PROFILE)
    problems = Problems()
    found = read_plan(tmp_path, problems)
    mine, silent = found["plan"]
    assert {name: mine[name] for name in effects} == effects
    assert mine["cost"] == {
        "calls": 22, "first_s": 1.0, "self_s": pytest.approx(0.8), "share": pytest.approx(0.2)
    }  # fmt: skip
    assert (silent["reads"], silent["cost"]) == (None, None)
    profile = found["profile"]
    assert (profile["steps"], profile["step_s"], profile["ranks"]) == (10, 0.4, 2)
    assert [(s["name"], s["share"]) for s in profile["stages"]] == [
        ("forward", 0.75),
        ("hooks", 0.25),
    ]
    assert problems == []


def test_functions_of_one_hook_on_a_channel_have_their_own_costs(tmp_path: Path) -> None:
    """Several functions of a hook are matched in order."""
    hooks = [entry("mine", before=None), entry("mine")]
    costs = [
        cost("mine", "after", 0.2, position=5),
        cost("mine", "before", 0.1, position=5),
        cost("mine", "after", 0.2),
    ]
    write(tmp_path, {"hooks": hooks}, {**PROFILE, "hooks": costs})
    plan = read_plan(tmp_path, Problems())["plan"]
    assert [hook["cost"]["self_s"] for hook in plan] == pytest.approx([0.2, 0.3])


def test_changes_at_resumes_have_the_step(tmp_path: Path) -> None:
    """The story lists what changed at each resume."""
    change = {"what": "log", "before": "on_step after, 2 steps", "after": "not there"}
    write(tmp_path, {"hooks": [], "resumes": [{"step": 4, "changes": [change]}]})
    assert read_plan(tmp_path, Problems())["plan_changes"] == [{"step": 4, **change}]


@pytest.mark.parametrize(
    "profile",
    [
        [],
        {"steps": 0},
        {"steps": "many", "hooks": 3, "stages": []},
        {"steps": -1, "stages": {"forward": 1}},
        {"steps": 5, "hooks": [1, {"channel": [], "hook": None}, cost("mine", "after", -1.0)]},
        {"steps": 5, "hooks": [cost("mine", "after", 1e300, calls=2.5, share="x")]},
        {"steps": 5, "stages": {"a": {"step_s": "x"}, HOSTILE: {"step_s": 1, "share": 1e99}}},
    ],
    ids=["list", "no step", "types", "negative", "items", "numbers", "stages"],
)
def test_a_damaged_profile_leaves_the_plan(profile: Any, tmp_path: Path) -> None:
    """The page has the hooks, and costs where the profile has numbers."""
    write(tmp_path, {"hooks": [entry("mine")]}, profile)
    story = Page(render([tmp_path])).data["runs"][0]
    assert [hook["hook"] for hook in story["plan"]] == ["mine"]
    found = story["plan"][0]["cost"]
    assert found is None or all(value >= 0 for value in found.values())


@pytest.mark.parametrize(
    "resumes",
    [3, [1, {"changes": {"a": 1}}, {"step": "x", "changes": [1, {"what": HOSTILE * 50}]}]],
    ids=["number", "items"],
)
def test_damaged_changes_leave_the_plan(resumes: Any, tmp_path: Path) -> None:
    """Changes of wrong types are left out or shortened."""
    write(tmp_path, {"hooks": [entry("mine", reads={"a": 1})], "resumes": resumes})
    found = read_plan(tmp_path, Problems())
    assert found["plan"][0]["reads"] is None
    assert all(len(change["what"]) < 600 for change in found["plan_changes"])


def test_the_story_has_what_the_trainer_writes(tmp_path: Path) -> None:
    """The fields of plan.json are those that the page reads."""
    plan = RunPlan.of(PipelineHooks.from_hooks([EMAConfig(decay=0.9)]))
    write(tmp_path, plan.to_dict())
    found = read_plan(tmp_path, Problems())["plan"]
    assert {hook["channel"] for hook in found} <= {channel.name for channel in PIPELINE_CHANNELS}
    assert found[0]["reads"] == ["model.weights", "model.buffers", "update_committed"]
    assert (found[0]["class_name"], found[0]["requests"]) == ("EMA", [])
