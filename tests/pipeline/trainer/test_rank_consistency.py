"""Ranks with different settings are refused at the start, and the message shows the difference."""

from __future__ import annotations

import json
from typing import Any

import pytest

from launching import SCRIPTS, launch

SCRIPT = SCRIPTS / "rank_consistency_on_ranks.py"

# By what differs on rank 1: the named part, and lines of the two ranks.
PARTS = {
    "model": ("model", "", "+3.weight: parameter (2, 2) torch.float32"),
    "frozen": ("model", "-0.bias: parameter (8,)", "+0.bias: frozen parameter (8,)"),
    "type": ("model", "-0.bias: parameter (8,) torch.float32", "+0.bias: parameter (8,) torch.f"),
    "rate": ("optimizer", '"lr": 0.1', '"lr": 0.2'),
    "optimizer": ("optimizer", "-torch.optim.sgd.SGD", "+torch.optim.adam.Adam"),
    "order of parameters": ("optimizer", "-  2.bias", "+  2.bias"),
    "schedule": ("LR scheduler", '"step_size": 1', '"step_size": 2'),
    "length": ("data", "-8 batches of 4 samples", "+6 batches of 4 samples"),
    "weights": (
        "data",
        "-sampler: torch.utils.data.sampler.BatchSampler, ",
        "weights e140b3e269b3",
    ),
    "processor": ("settings", "loss_of (tiny.py:", "other_loss (rank_consistency_on_ranks.py:"),
    "sampler": ("data", "sampler.SequentialSampler", "sampler.RandomSampler"),
    "accumulation": ("settings", "-gradient_accumulation_steps: 1", "_accumulation_steps: 2"),
    "limit": ("settings", "max_step=4", "max_step=5"),
    "seed": ("settings", "DataOrder(seed=1", "DataOrder(seed=2"),
    "folder": ("settings", "-run_folder: ", "+run_folder: "),
    "resume": ("settings", "-resume_from: None", "+resume_from: auto"),
}
PLANS = {
    "hooks": ("", "+GradientClippingHook: {"),
    "hook": ('"every": "5 steps"', '"every": "7 steps"'),
    "loaders": (
        '{"dataloaders": {"val": "8 samples in batches of 4"}}',
        '{"dataloaders": {"test": "12 samples in batches of 4"}}',
    ),
    "order of hooks": ("+watch: ", "-watch: "),
}


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return each rank's refusal, after checking that all are equal, and the output."""
    folder = tmp_path_factory.mktemp("ranks")
    kinds = [*PARTS, *PLANS, "stream"]
    done = launch(SCRIPT, folder, *kinds, processes=request.param, fails=True)
    first, *others = (json.loads(file.read_text()) for file in sorted(folder.glob("rank*.json")))
    assert len(others) == request.param - 1
    assert all(other == first for other in others)
    return {**first, "seen": done.stderr, "others": "ranks 0, 2" if others[1:] else "rank 0"}


@pytest.mark.parametrize("kind", PARTS)
def test_different_parts_are_refused_by_the_constructor(kind: str, found: Any) -> None:
    """Every rank names the part that differs and its value on each rank, within seconds."""
    part, first, second = PARTS[kind]
    place, text = found[kind]
    assert place == "made"
    assert text.startswith(f"the ranks of this job differ, but must be equal, in the {part}.\n")
    assert f"--- {found['others']}\n+++ rank 1\n" in text
    assert first in text
    assert second in text


@pytest.mark.parametrize("kind", PLANS)
def test_different_hooks_are_refused_when_the_run_starts(kind: str, found: Any) -> None:
    """Every rank shows both hook plans in full, and the lines that differ."""
    place, text = found[kind]
    assert place == "called"
    assert "differ, but must be equal, in the hooks.\n" in text
    for who in (found["others"], "rank 1"):
        plan = text.partition(f"--- {who}:\n")[2].partition("\n---")[0]
        assert "OptimizerHook: robo" in plan
        assert "watch, after make.<locals>.<lambda> (rank_consistency_on_ranks.py:" in plan
        assert "when 3 steps" in plan
    assert all(line in text for line in PLANS[kind])
    assert text.endswith("can read args.accelerator.process_index")


def test_both_ranks_show_the_uncaught_error(found: Any) -> None:
    """An uncaught error is printed by every rank."""
    assert found["seen"].count("PipelineConfigError: the ranks of this job differ") >= 2


@pytest.mark.parametrize("kind", ["nothing", "stream"])
def test_equal_ranks_and_unequal_streams_run(kind: str, found: Any) -> None:
    """Equal ranks run, and so do streams of different lengths."""
    assert found[kind] == ["runs", ""]
