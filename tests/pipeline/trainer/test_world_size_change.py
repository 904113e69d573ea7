"""A run resumed with a different world size equals an uninterrupted run of one process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import elastic_run
from robo_orchard_lab.pipeline.checkpoint import load_checkpoint, save_checkpoint
from robo_orchard_lab.pipeline.sinks import read_metrics
from robo_orchard_lab.testing.resume_worker import run_processes


def start(folder: Path, ranks: int, **order: Any) -> str:
    """Run all ranks to their end; return the output of the first failed rank, or ""."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"part{len([*folder.glob('part*-0.log')])}"
    order |= {"folder": str(folder), "name": name, "ranks": ranks}
    order["meeting"] = str(folder / f"{name}.meeting")
    orders = [{**order, "rank": rank} for rank in range(ranks)]
    logs = [folder / f"{name}-{rank}.log" for rank in range(ranks)]
    codes = run_processes(elastic_run.run, orders, logs, 120)
    return next((log.read_text() for log, code in zip(logs, codes, strict=True) if code), "")


def run_in_parts(
    folder: Path,
    ranks: list[int],
    stops: list[int],
    sharded: Sequence[int] = (),
    **order: Any,
) -> None:
    """Run each part with its world size up to its stop, the last part to the end, some sharded."""
    for part, (count, stop) in enumerate(zip(ranks, [*stops, None], strict=True)):
        order |= {"stop_after": stop, "seed": 5 + part, "sharded": part in sharded}
        assert start(folder, count, **order) == ""


def lines(folder: Path, kind: str) -> Iterator[tuple[int, int, int, Any]]:
    """Yield the records of a kind: part, rank, step and value."""
    for path in sorted(folder.glob("part*-*.jsonl")):
        part, rank = path.stem.removeprefix("part").split("-")
        for found, step, value in map(json.loads, path.read_text().splitlines()):
            if found == kind:
                yield int(part), int(rank), step, value


def samples(folder: Path) -> dict[int, list[Any]]:
    """Return index and content of the samples of each step, rank after rank."""
    steps: dict[int, list[Any]] = {}
    for _, _, step, value in lines(folder, "samples"):
        steps.setdefault(step, []).extend(value)
    return dict(sorted(steps.items()))


def check_equal(uninterrupted: Path, folder: Path) -> None:
    """Check that two folders' runs have equal samples, metrics, counters and weights."""
    assert samples(folder) == samples(uninterrupted)
    expected, found = (read_metrics(path / "metrics.jsonl") for path in (uninterrupted, folder))
    assert [
        (r.epoch_id, r.global_step_id, r.optimizer_step_id, [(v.name, v.step) for v in r.values])
        for r in found
    ] == [
        (r.epoch_id, r.global_step_id, r.optimizer_step_id, [(v.name, v.step) for v in r.values])
        for r in expected
    ]
    for one, other in zip(found, expected, strict=True):
        for value, due in zip(one.values, other.values, strict=True):
            assert value.value == pytest.approx(due.value, rel=1e-6, abs=1e-6), (due, value)
    (first,) = uninterrupted.glob("part*-0.pt")
    last = max(folder.glob("part*-0.pt"))
    before, after = (torch.load(path, weights_only=True) for path in (first, last))
    assert after["progress"] == before["progress"]
    for name, weight in before["weights"].items():
        torch.testing.assert_close(after["weights"][name], weight, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other_processes") / "straight"
    run_in_parts(folder, [1], [])
    return folder


@pytest.mark.parametrize(
    ("ranks", "stops"),
    [
        pytest.param([1, 2, 1], [1, 7], id="within windows, 1 -> 2 -> 1"),
        pytest.param([2, 3, 2], [2, 5], id="within a window and between epochs, 2 -> 3 -> 2"),
        pytest.param(
            [3, 1, 3], [3, 9], id="between windows and ahead of the last step, 3 -> 1 -> 3"
        ),
    ],
)
def test_a_run_resumes_with_other_world_sizes(
    ranks: list[int],
    stops: list[int],
    uninterrupted: Path,
    tmp_path: Path,
) -> None:
    """Samples, augmentation, counters, weights and logged metrics equal one process's."""
    run_in_parts(tmp_path / "parts", ranks, stops)
    check_equal(uninterrupted, tmp_path / "parts")


@pytest.mark.parametrize(
    ("ranks", "stops", "sharded"),
    [
        pytest.param([2, 1, 2], [1, 7], [0, 2], id="2 in shards -> 1 -> 2 in shards"),
        pytest.param([1, 3, 2], [2, 6], [0, 1], id="1 in shards -> 3 in shards -> 2"),
        pytest.param([2, 1, 1], [4, 7], [1], id="2 -> 1 in shards -> 1"),
    ],
)
def test_a_sharded_run_resumes_with_other_world_sizes(
    ranks: list[int],
    stops: list[int],
    sharded: list[int],
    uninterrupted: Path,
    tmp_path: Path,
) -> None:
    """Accumulated gradients resume from full weights in shards and back.

    Several processes with a sharded model complete their window before the stop.
    """
    run_in_parts(tmp_path / "parts", ranks, stops, sharded)
    check_equal(uninterrupted, tmp_path / "parts")


def test_two_processes_equal_one(uninterrupted: Path, tmp_path: Path) -> None:
    """Two ranks have the same events, samples, counters, logged metrics and weights as one."""
    run_in_parts(tmp_path / "two", [2], [])
    check_equal(uninterrupted, tmp_path / "two")
    expected = [event for _, _, _, event in lines(uninterrupted, "event")]
    for rank in range(2):
        assert [e for _, r, _, e in lines(tmp_path / "two", "event") if r == rank] == expected


@pytest.mark.parametrize(
    "options",
    [{"workers": 2}, {"plateau": True}, {"accumulate": 1}, {"counted": True}],
    ids=["workers", "plateau", "no accumulation", "counted"],
)
def test_variants_resume_with_other_world_sizes(options: dict[str, Any], tmp_path: Path) -> None:
    """Runs with workers, a plateau, no accumulation or windows loaded in advance resume equally."""
    run_in_parts(tmp_path / "straight", [1], [], **options)
    run_in_parts(tmp_path / "parts", [2, 1, 2], [4, 8], **options)
    check_equal(tmp_path / "straight", tmp_path / "parts")


def test_random_numbers_keyed_by_batch_change(uninterrupted: Path, tmp_path: Path) -> None:
    """Keyed by batch, the samples and their order are equal, but not their random numbers."""
    run_in_parts(tmp_path / "parts", [1, 2], [3], keyed_by="batch")
    found, expected = samples(tmp_path / "parts"), samples(uninterrupted)
    for step, due in expected.items():
        assert [index for index, _ in found[step]] == [index for index, _ in due]
    assert found[0] != expected[0]


def test_a_new_rank_has_its_own_rng(uninterrupted: Path, tmp_path: Path) -> None:
    """The first rank continues its RNG, and new ranks draw different numbers."""
    folder = tmp_path / "parts"
    run_in_parts(folder, [1, 3], [4])
    (first, *of_new) = (
        [value for part, r, _, value in lines(folder, "drawn") if part == 1 and r == rank]
        for rank in range(3)
    )
    assert first == [value for _, _, step, value in lines(uninterrupted, "drawn") if step >= 4]
    drawn = [number for rank in (first, *of_new) for step in rank for number in step]
    assert len({*drawn}) == len(drawn)


def ended(folder: Path, part: int) -> list[dict[str, Any]]:
    """Return the final hook states of the ranks of a part."""
    return [
        torch.load(path, weights_only=True)["hooks"]
        for path in sorted(folder.glob(f"part{part}-*.pt"))
    ]


def test_hook_states_are_redistributed(tmp_path: Path) -> None:
    """A hook may redistribute states; by default a rank gets its own or the last saved state."""
    folder = tmp_path / "parts"
    run_in_parts(folder, [2, 3, 1], [3, 8])
    for part, total in enumerate([18, 26 + 18, 52]):
        states = ended(folder, part)
        assert sum(state["Counted"]["samples"] for state in states) == total
        assert [state["Numbered"]["begun_as"] for state in states] == [[0, 1], [0, 1, 1], [0]][part]


def test_a_hook_can_refuse_redistribution(tmp_path: Path) -> None:
    """The hook's error is raised on all ranks, with its name."""
    (tmp_path / "a").mkdir()
    assert start(tmp_path / "a", 1, stop_after=1) == ""
    empty = tmp_path / "a" / "checkpoints" / "step_00000001"
    saved = load_checkpoint(empty)
    state = saved.rank_parts["state"]
    hooks = {**state["hooks"], "Counted": {"samples": 0}}
    save_checkpoint(tmp_path / "b", 1, saved.parts, {"state": {**state, "hooks": hooks}})
    output = start(tmp_path / "c", 2, resume_from=str(tmp_path / "b"))
    assert "StateError: there is nothing to share" in output
    assert "raised in hook 'Counted' (redistribute_states)" in output


def test_no_gradient_is_dropped(tmp_path: Path) -> None:
    """A saved gradient without a parameter in this run is refused by name."""
    assert start(tmp_path / "a", 1, stop_after=1) == ""
    saved = load_checkpoint(checkpoint(tmp_path / "a", 1))
    state = saved.rank_parts["state"]
    state["own_gradients"]["gone.weight"] = torch.ones(2)
    save_checkpoint(tmp_path / "b", 1, saved.parts, {"state": state})
    output = start(tmp_path / "c", 1, resume_from=str(tmp_path / "b"))
    assert "StateError: the run was saved within an accumulation window" in output
    assert "no parameters for the gradients of gone.weight" in output


def test_a_different_number_of_samples_per_step(tmp_path: Path) -> None:
    """Within an epoch the change is refused with both remedies, or allowed and loses no sample."""
    folder = tmp_path / "parts"
    run_in_parts(folder, [1], [])
    at_two = str(folder / "checkpoints" / "step_00000002")
    output = start(tmp_path / "refused", 2, resume_from=at_two, batch_size=4)
    assert "had 6 samples when the run was saved, and has 8" in output
    assert "give the loader batch_size=3" in output
    assert "or set DataOrder(allow_other_batch_size=True)" in output
    other = tmp_path / "allowed"
    assert start(other, 2, resume_from=at_two, batch_size=4, allow=True) == ""
    first = [index for step in (0, 1) for index, _ in samples(folder)[step]]
    rest = [index for step in (2, 3) for index, _ in samples(other)[step]]
    order = [index for step in range(5) for index, _ in samples(folder)[step]]
    assert first + rest == order
    between = str(folder / "checkpoints" / "step_00000005")
    assert start(tmp_path / "between", 3, resume_from=between, batch_size=4) == ""


def test_unmergeable_metrics_resume_on_more_ranks_only(tmp_path: Path) -> None:
    """Unmergeable metrics resume on more ranks, and on fewer only if one rank has updates."""
    uninterrupted, folder = tmp_path / "straight", tmp_path / "parts"
    run_in_parts(uninterrupted, [1], [], unjoinable=True)
    run_in_parts(folder, [1, 2], [2], unjoinable=True)
    one, other = (
        [
            value.value
            for record in read_metrics(path / "metrics.jsonl")
            for value in record.values
            if value.name == "train/correlation_epoch"
        ]
        for path in (uninterrupted, folder)
    )
    assert other[0] == pytest.approx(one[0], rel=1e-4)  # accumulated in single precision
    output = start(folder / "a", 1, resume_from=checkpoint(folder, 7), unjoinable=True)
    assert "PearsonCorrCoef has updates on 2 ranks and can't merge" in output
    ended = start(folder / "b", 1, resume_from=checkpoint(folder, 10), unjoinable=True)
    assert ended == ""


def checkpoint(folder: Path, step: int) -> str:
    return str(folder / "checkpoints" / f"step_{step:08d}")


def test_streams_resume_between_epochs(tmp_path: Path) -> None:
    """Within an epoch, iterable data requires the saved world size."""
    folder = tmp_path / "parts"
    options: dict[str, Any] = {"streams": True, "keyed_by": "batch", "batch_size": 3}
    run_in_parts(folder, [2], [], **options)
    steps = 1 + max(step for _, _, step, _ in lines(folder, "drawn"))
    between, within = (checkpoint(folder, step) for step in (steps // 2, steps // 2 + 1))
    output = start(tmp_path / "within", 1, resume_from=within, **options)
    assert "was read by 2 processes when the run was saved, and is read by 1" in output
    assert start(tmp_path / "between", 1, resume_from=between, **options) == ""


def test_files_of_removed_ranks_are_verified(tmp_path: Path) -> None:
    """The previous checkpoint is loaded with a warning if a removed rank's file is damaged."""
    folder = tmp_path / "parts"
    run_in_parts(folder, [3], [])
    newest = sorted((folder / "checkpoints").glob("step_*"))[-1]
    (newest / "state.rank00002.json").write_text("{}")
    assert start(folder, 1) == ""
    assert "state.rank00002.json: expected" in max(folder.glob("part*-0.log")).read_text()
    assert [step for part, _, step, _ in lines(folder, "samples") if part == 1] == [9]
