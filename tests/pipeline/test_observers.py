"""Observing hooks change neither the result nor the speed of a run."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from launching import SCRIPTS, launch
from observed import make_observed_trainer, observing_hooks
from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.sinks import read_metrics
from robo_orchard_lab.testing import TracedCall, count_host_reads


def test_observing_hooks_change_nothing(tmp_path: Path) -> None:
    """Observing hooks leave weights, buffers, samples and RNG states equal."""
    outcomes = []
    for hooks in ([], observing_hooks(tmp_path, "8 steps", "5 steps")):
        seen: list[int] = []
        trainer = make_observed_trainer(hooks, max_step=40, seen=seen)
        trainer()
        state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        outcomes.append((state, seen, torch.rand(3)))
    (bare, bare_seen, bare_random), (observed, observed_seen, observed_random) = outcomes
    assert bare.keys() == observed.keys()
    for name, value in bare.items():
        assert torch.equal(value, observed[name]), name
    assert bare_seen == observed_seen
    assert len(bare_seen) == 160
    assert torch.equal(bare_random, observed_random)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


def reads_of_200_steps(folder: Path, *hooks: PipelineHooks) -> list[TracedCall]:
    """Return the device-to-host reads of 200 steps, except for sample order and RNG states.

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
    """Tensors are read only at the 4 logging points, once each."""
    reads = reads_of_200_steps(tmp_path)
    assert {str(read) for read in reads if not read.at_commit} == set()
    assert sum(read.places[0].function == "_combine" for read in reads) == 4


def test_planted_read_is_detected(tmp_path: Path) -> None:
    """A hook that reads the loss in every step is reported with its line."""
    hooks = PipelineHooks("planted")

    @hooks.on_step.after
    def read_loss(args: PipelineHookArgs) -> None:
        assert args.loss is not None
        args.loss.item()

    planted = [read for read in reads_of_200_steps(tmp_path, hooks) if not read.at_commit]
    assert len(planted) == 200
    assert {(read.hook, read.what, read.places[0].function) for read in planted} == {
        ("planted", "item", "test_planted_read_is_detected.<locals>.read_loss")
    }


def test_only_logging_points_communicate(tmp_path: Path) -> None:
    """Four logging points add four collectives to a run without hooks on two ranks."""
    launch(SCRIPTS / "observe_on_ranks.py", tmp_path)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [rank["added"] for rank in ranks] == [{"all_gather": 4}] * 2
    assert ranks[0]["weights"] == ranks[1]["weights"] == ranks[0]["bare"]
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record.global_step_id for record in records] == [50, 100, 150, 200]
