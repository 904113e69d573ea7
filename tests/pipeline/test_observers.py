"""Watching a run changes neither its result nor its speed."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from launching import SCRIPTS, launch
from observed import make_observed_trainer, observing_hooks
from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.sinks import read_metrics
from robo_orchard_lab.testing import TracedCall, count_host_reads


def test_watching_changes_nothing(tmp_path: Path) -> None:
    """With every hook that only looks, weights, buffers, samples and random state are the same."""
    outcomes = []
    for hooks in ([], observing_hooks(tmp_path, "8 steps", "5 steps")):
        seen: list[int] = []
        trainer = make_observed_trainer(hooks, max_step=40, seen=seen)
        trainer()
        state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        outcomes.append((state, seen, torch.rand(3)))
    (bare, bare_seen, bare_random), (watched, watched_seen, watched_random) = outcomes
    assert bare.keys() == watched.keys()
    for name, value in bare.items():
        assert torch.equal(value, watched[name]), name
    assert bare_seen == watched_seen
    assert len(bare_seen) == 160
    assert torch.equal(bare_random, watched_random)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


def reads_of_200_steps(folder: Path, *hooks: PipelineHooks) -> list[TracedCall]:
    """What is read from tensors, but for the order of samples and random states.

    A logging point every 50 steps, an evaluation every 5.
    """
    observers = observing_hooks(folder, "50 steps", "5 steps")
    trainer = make_observed_trainer([*observers, *hooks], max_step=200)
    with count_host_reads() as reads:
        trainer()
    return [
        read
        for read in reads
        if (
            read.hook is not None
            and not {place.function for place in read.places}
            & {"EvaluationLoader.batches", "restore_random_state"}
        )
        or read.at_commit
    ]


def test_nothing_is_read_between_logging_points(tmp_path: Path) -> None:
    """In 200 steps with 4 logging points, tensors are read at these alone, each time at once."""
    reads = reads_of_200_steps(tmp_path)
    assert {str(read) for read in reads if not read.at_commit} == set()
    assert sum(read.places[0].function == "_combine" for read in reads) == 4


def test_a_planted_read_is_seen(tmp_path: Path) -> None:
    """A hook that reads the loss in every step is named, with its line."""
    hooks = PipelineHooks("planted")

    @hooks.on_step.after
    def read_loss(args: PipelineHookArgs) -> None:
        assert args.loss is not None
        args.loss.item()

    planted = [read for read in reads_of_200_steps(tmp_path, hooks) if not read.at_commit]
    assert len(planted) == 200
    assert {(read.hook, read.what, read.places[0].function) for read in planted} == {
        ("planted", "item", "test_a_planted_read_is_seen.<locals>.read_loss")
    }


def test_a_logging_point_is_the_only_exchange(tmp_path: Path) -> None:
    """On two ranks, 200 steps with 4 logging points take 4 collectives more than without hooks."""
    launch(SCRIPTS / "observe_on_ranks.py", tmp_path)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [rank["added"] for rank in ranks] == [{"all_gather": 4}] * 2
    assert ranks[0]["weights"] == ranks[1]["weights"] == ranks[0]["unwatched"]
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record.global_step_id for record in records] == [50, 100, 150, 200]
