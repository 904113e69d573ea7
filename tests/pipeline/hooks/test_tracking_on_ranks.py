"""Losses, times, the best value and the stop on two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launching import SCRIPTS, launch


def run(folder: Path, *options: str) -> list[dict[str, Any]]:
    """Return the results of two ranks."""
    launch(SCRIPTS / "track_on_ranks.py", folder, *options)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run(folder)


def values_of(rank: dict[str, Any]) -> dict[str, dict[int, float]]:
    values: dict[str, dict[int, float]] = {}
    for record in rank["records"]:
        for name, step, value in record:
            values.setdefault(name, {})[step] = value
    return values


def test_ranks_have_the_same_values(ranks: list[dict[str, Any]]) -> None:
    """Every value covers all ranks, on each rank."""
    assert ranks[0]["records"] == ranks[1]["records"]


def test_losses_are_weighted_by_samples(ranks: list[dict[str, Any]]) -> None:
    """The mean is over all samples of the job; a loss of one rank counts alone."""
    values = values_of(ranks[0])
    # One sample of 7, 3, 5, 7, and three samples of 10 more.
    assert values["loss/total"] == {2: 14.5, 4: 10.5, 6: 12.5, 8: 14.5}
    assert values["loss/own"] == {2: 17, 4: 13, 6: 15, 8: 17}


def test_rates_cover_all_ranks(ranks: list[dict[str, Any]]) -> None:
    """Samples/s are summed over ranks, steps/s are not."""
    values = values_of(ranks[0])
    samples_per_step = [
        values["perf/samples_per_s"][step] / rate
        for step, rate in values["perf/steps_per_s"].items()
    ]
    # 4 if both ranks are equally fast; at most 3 if the mean were used.
    assert max(samples_per_step) > 3
    assert all(2 <= count <= 6 for count in samples_per_step)


def test_ranks_stop_together(ranks: list[dict[str, Any]]) -> None:
    """Both stop for one reason, after the second value without improvement."""
    for rank in ranks:
        assert rank["steps"] == 8
        assert rank["reason"] == ("loss/total did not improve on 10.50 (step 4) in 2 evaluations")


def test_logging_point_costs_one_collective(ranks: list[dict[str, Any]]) -> None:
    """These hooks add no collective to the logging point and to the steps before.

    A new best value costs one: the ranks agree whether its weights are finite.
    """
    at_the_start, steps, logging_points, new_bests = 2, 8, 4, 2
    expected = at_the_start + (steps + 1) + logging_points + new_bests
    assert [rank["collectives"] for rank in ranks] == [expected, expected]


def test_first_rank_writes_the_best_weights(ranks: list[dict[str, Any]]) -> None:
    """All ranks know the best value; the file has it."""
    assert [rank["best"] for rank in ranks] == [[10.5, 4]] * 2
    assert [rank["saves"] for rank in ranks] == [2, 2]
    metadata = ranks[0]["metadata"]
    assert (metadata["value"], metadata["global_step_id"]) == ("10.5", "4")


def test_first_rank_reads_the_file(ranks: list[dict[str, Any]], folder: Path) -> None:
    """A resumed run uses the file seen by the first rank, on every rank."""
    resumed = run(folder, "resumed")
    assert [rank["best"] for rank in resumed] == [[10.5, 4]] * 2
    assert [rank["saves"] for rank in resumed] == [0, 0]
