"""Training on unevenly divisible data, on one, two and three processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from launching import SCRIPTS, launch
from uneven_on_ranks import TRAININGS

SCRIPT = SCRIPTS / "uneven_on_ranks.py"

Results = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Return the results of each rank by world size."""
    found: Results = {}
    for processes in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"{processes}_processes")
        launch(SCRIPT, folder, processes=processes)
        files = [folder / f"rank{rank}.pt" for rank in range(processes)]
        found[processes] = [torch.load(file, weights_only=False) for file in files]
    return found


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_train_like_one(processes: int, name: str, results: Results) -> None:
    """Each step has equal samples, none twice, and equal counters, weights and mean losses."""
    (alone,) = (rank[name][0] for rank in results[1])
    ranks = [rank[name][0] for rank in results[processes]]
    for rank in ranks:
        assert len(rank["steps"]) == len(alone["steps"]) > 0
        assert rank["progress"] == alone["progress"]
        torch.testing.assert_close(rank["weights"], alone["weights"], rtol=1e-9, atol=1e-12)
        assert rank["losses"] == pytest.approx(alone["losses"], rel=1e-9)
    for expected, *found in zip(alone["steps"], *(rank["steps"] for rank in ranks), strict=True):
        for part in ("numbers", "indices") if expected["indices"] is not None else ():
            assert [n for step in found for n in step[part]] == expected[part]
        assert sum(step["size"] for step in found) == expected["size"]
        assert len({step["total"] for step in found}) == 1
        assert all(step["filler"] == (step["size"] == 0) for step in found)


@pytest.mark.parametrize("name", TRAININGS)
def test_two_runs_are_bit_identical(name: str, results: Results) -> None:
    """Two runs are bit-identical on every rank and across ranks, also after stops."""
    for ranks in results.values():
        first = ranks[0][name][0]["weights"]
        for rank in ranks:
            assert all(torch.equal(run["weights"], first) for run in rank[name])


def test_a_rank_without_data_has_a_padding_step(results: Results) -> None:
    """Only a rank without samples runs a padding step."""
    steps = [rank["fewer samples than ranks"][0]["steps"][0] for rank in results[3]]
    assert [step["filler"] for step in steps] == [False, True, True]
    assert [step["numbers"] for step in steps] == [[0], [], []]
    steps = [rank["short last batch"][0]["steps"][6] for rank in results[3]]
    assert [step["size"] for step in steps] == [1, 1, 0]


def test_ranks_with_five_and_seven_batches_make_seven_steps(results: Results) -> None:
    """A rank with fewer batches, or none, takes part in the remaining steps with padding."""
    for name in ("stream", "stateful stream", "list"):
        for processes in (2, 3):
            first, second, *others = (rank[name][0]["steps"] for rank in results[processes])
            fillers = [[step["filler"] for step in steps[:7]] for steps in (first, second, *others)]
            assert fillers == [[False] * 5 + [True] * 2, [False] * 7, [True] * 7][:processes]
            assert len(first) == len(second) == 14


@pytest.mark.parametrize("name", ["list, cut", "weighted stream, cut"])
@pytest.mark.parametrize("processes", [2, 3])
def test_ranks_resume_from_a_window_cut_by_a_limit(
    processes: int, name: str, results: Results
) -> None:
    """Ranks complete the cut window with its own weights, bit-identically after any later stop."""
    ranks = [rank[name] for rank in results[processes]]
    for uninterrupted, *stopped in ranks:
        assert [step["ends"] for step in uninterrupted["steps"]] == [
            *(False, True, True),  # steps 4 to 6 of seven, in windows of three
            *(False, False, True, False, False, True, True),
        ]
        for run in stopped:
            assert torch.equal(run["weights"], uninterrupted["weights"])
    weight = sum(1 / step["divisor"] for rank in ranks for step in rank[0]["steps"][:2])
    assert weight / processes == pytest.approx(1.0)
