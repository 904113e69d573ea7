"""A run goes on in another number of processes as the run of one process that never stopped."""

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
    """Each part in as many ranks as said, up to a stop, the last to the end; some in shards."""
    for part, (count, stop) in enumerate(zip(ranks, [*stops, None], strict=True)):
        order |= {"stop_after": stop, "seed": 5 + part, "sharded": part in sharded}
        assert start(folder, count, **order) == ""


def lines(folder: Path, kind: str) -> Iterator[tuple[int, int, int, Any]]:
    """What was written down: the part, the rank, the step, and it."""
    for path in sorted(folder.glob("part*-*.jsonl")):
        part, rank = path.stem.removeprefix("part").split("-")
        for found, step, value in map(json.loads, path.read_text().splitlines()):
            if found == kind:
                yield int(part), int(rank), step, value


def samples(folder: Path) -> dict[int, list[Any]]:
    """Index and content of the samples of each step, rank after rank."""
    steps: dict[int, list[Any]] = {}
    for _, _, step, value in lines(folder, "samples"):
        steps.setdefault(step, []).extend(value)
    return dict(sorted(steps.items()))


def check_like(straight: Path, folder: Path) -> None:
    """The run in one folder has done what that in the other has."""
    assert samples(folder) == samples(straight)
    expected, found = (read_metrics(path / "metrics.jsonl") for path in (straight, folder))
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
    (first,) = straight.glob("part*-0.pt")
    last = max(folder.glob("part*-0.pt"))
    before, after = (torch.load(path, weights_only=True) for path in (first, last))
    assert after["progress"] == before["progress"]
    for name, weight in before["weights"].items():
        torch.testing.assert_close(after["weights"][name], weight, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
def test_goes_on_in_other_numbers_of_processes(
    ranks: list[int],
    stops: list[int],
    straight: Path,
    tmp_path: Path,
) -> None:
    """Samples, augmentation, counters, weights and lines of metrics are those of one process."""
    run_in_parts(tmp_path / "parts", ranks, stops)
    check_like(straight, tmp_path / "parts")


@pytest.mark.parametrize(
    ("ranks", "stops", "sharded"),
    [
        pytest.param([2, 1, 2], [1, 7], [0, 2], id="2 in shards -> 1 -> 2 in shards"),
        pytest.param([1, 3, 2], [2, 6], [0, 1], id="1 in shards -> 3 in shards -> 2"),
        pytest.param([2, 1, 1], [4, 7], [1], id="2 -> 1 in shards -> 1"),
    ],
)
def test_goes_on_with_a_model_in_shards(
    ranks: list[int],
    stops: list[int],
    sharded: list[int],
    straight: Path,
    tmp_path: Path,
) -> None:
    """Within a window, what was added up of it goes on from shards to whole weights and back."""
    run_in_parts(tmp_path / "parts", ranks, stops, sharded)
    check_like(straight, tmp_path / "parts")


def test_two_processes_are_one(straight: Path, tmp_path: Path) -> None:
    """With accumulation, clipping, a schedule, an average, evaluations and metrics: the same
    events on both ranks, the same samples, counters and lines of metrics, the same weights."""
    run_in_parts(tmp_path / "two", [2], [])
    check_like(straight, tmp_path / "two")
    expected = [event for _, _, _, event in lines(straight, "event")]
    for rank in range(2):
        assert [e for _, r, _, e in lines(tmp_path / "two", "event") if r == rank] == expected


@pytest.mark.parametrize(
    "options",
    [{"workers": 2}, {"plateau": True}, {"accumulate": 1}, {"counted": True}],
    ids=["workers", "plateau", "no accumulation", "counted"],
)
def test_other_numbers_of_processes_in_other_ways(options: dict[str, Any], tmp_path: Path) -> None:
    """So it is with workers, with a schedule that follows the loss, without accumulation, and with
    windows that are loaded ahead."""
    run_in_parts(tmp_path / "straight", [1], [], **options)
    run_in_parts(tmp_path / "parts", [2, 1, 2], [4, 8], **options)
    check_like(tmp_path / "straight", tmp_path / "parts")


def test_what_is_drawn_for_a_batch_is_another(straight: Path, tmp_path: Path) -> None:
    """Keyed by batch, the samples are the same, and so is their order, but not what is drawn."""
    run_in_parts(tmp_path / "parts", [1, 2], [3], keyed_by="batch")
    found, expected = samples(tmp_path / "parts"), samples(straight)
    for step, due in expected.items():
        assert [index for index, _ in found[step]] == [index for index, _ in due]
    assert found[0] != expected[0]


def test_a_new_rank_draws_from_streams_of_its_own(straight: Path, tmp_path: Path) -> None:
    """The first goes on as it would have; the others draw as neither it nor one another."""
    folder = tmp_path / "parts"
    run_in_parts(folder, [1, 3], [4])
    (first, *of_new) = (
        [value for part, r, _, value in lines(folder, "drawn") if part == 1 and r == rank]
        for rank in range(3)
    )
    assert first == [value for _, _, step, value in lines(straight, "drawn") if step >= 4]
    drawn = [number for rank in (first, *of_new) for step in rank for number in step]
    assert len({*drawn}) == len(drawn)


def ended(folder: Path, part: int) -> list[dict[str, Any]]:
    """The states of hooks with which the ranks of a part have ended."""
    return [
        torch.load(path, weights_only=True)["hooks"]
        for path in sorted(folder.glob(f"part{part}-*.pt"))
    ]


def test_states_of_hooks(tmp_path: Path) -> None:
    """A hook's own rule holds; else each rank takes over that of its number, or the last one."""
    folder = tmp_path / "parts"
    run_in_parts(folder, [2, 3, 1], [3, 8])
    for part, total in enumerate([18, 26 + 18, 52]):
        states = ended(folder, part)
        assert sum(state["Counted"]["samples"] for state in states) == total
        assert [state["Numbered"]["begun_as"] for state in states] == [[0, 1], [0, 1, 1], [0]][part]


def test_a_hook_can_refuse(tmp_path: Path) -> None:
    """Its error is that of all ranks, with its name."""
    (tmp_path / "a").mkdir()
    assert start(tmp_path / "a", 1, stop_after=1) == ""
    empty = tmp_path / "a" / "checkpoints" / "step_00000001"
    saved = load_checkpoint(empty)
    state = saved.rank_parts["state"]
    hooks = {**state["hooks"], "Counted": {"samples": 0}}
    save_checkpoint(tmp_path / "b", 1, saved.parts, {"state": {**state, "hooks": hooks}})
    told = start(tmp_path / "c", 2, resume_from=str(tmp_path / "b"))
    assert "StateError: there is nothing to share" in told
    assert "raised in hook 'Counted' (redistribute_states)" in told


def test_no_gradient_is_dropped(tmp_path: Path) -> None:
    """One that was added up for a parameter which this run has not is refused, by its name."""
    assert start(tmp_path / "a", 1, stop_after=1) == ""
    saved = load_checkpoint(checkpoint(tmp_path / "a", 1))
    state = saved.rank_parts["state"]
    state["own_gradients"]["gone.weight"] = torch.ones(2)
    save_checkpoint(tmp_path / "b", 1, saved.parts, {"state": state})
    told = start(tmp_path / "c", 1, resume_from=str(tmp_path / "b"))
    assert "StateError: the run was saved within an accumulation window" in told
    assert "no parameters for the gradients of gone.weight" in told


def test_another_number_of_samples_a_step(tmp_path: Path) -> None:
    """Within an epoch it is refused with both remedies, or allowed; no sample is lost then."""
    folder = tmp_path / "parts"
    run_in_parts(folder, [1], [])
    at_two = str(folder / "checkpoints" / "step_00000002")
    told = start(tmp_path / "refused", 2, resume_from=at_two, batch_size=4)
    assert "had 6 samples when the run was saved, and has 8" in told
    assert "give the loader batch_size=3" in told
    assert "or set DataOrder(allow_other_batch_size=True)" in told
    other = tmp_path / "allowed"
    assert start(other, 2, resume_from=at_two, batch_size=4, allow=True) == ""
    first = [index for step in (0, 1) for index, _ in samples(folder)[step]]
    rest = [index for step in (2, 3) for index, _ in samples(other)[step]]
    order = [index for step in range(5) for index, _ in samples(folder)[step]]
    assert first + rest == order
    between = str(folder / "checkpoints" / "step_00000005")
    assert start(tmp_path / "between", 3, resume_from=between, batch_size=4) == ""


def test_metrics_that_can_not_be_joined(tmp_path: Path) -> None:
    """They go on among more ranks; among fewer where they hold nothing of several, else refused."""
    straight, folder = tmp_path / "straight", tmp_path / "parts"
    run_in_parts(straight, [1], [], unjoinable=True)
    run_in_parts(folder, [1, 2], [2], unjoinable=True)
    one, other = (
        [
            value.value
            for record in read_metrics(path / "metrics.jsonl")
            for value in record.values
            if value.name == "train/correlation_epoch"
        ]
        for path in (straight, folder)
    )
    assert other[0] == pytest.approx(one[0], rel=1e-4)  # which adds up in single precision
    told = start(folder / "a", 1, resume_from=checkpoint(folder, 7), unjoinable=True)
    assert "PearsonCorrCoef has updates on 2 ranks and can't merge" in told
    ended = start(folder / "b", 1, resume_from=checkpoint(folder, 10), unjoinable=True)
    assert ended == ""


def checkpoint(folder: Path, step: int) -> str:
    return str(folder / "checkpoints" / f"step_{step:08d}")


def test_streams_go_on_between_epochs(tmp_path: Path) -> None:
    """Within an epoch, data without an index needs the number of processes that it had."""
    folder = tmp_path / "parts"
    options: dict[str, Any] = {"streams": True, "keyed_by": "batch", "batch_size": 3}
    run_in_parts(folder, [2], [], **options)
    steps = 1 + max(step for _, _, step, _ in lines(folder, "drawn"))
    between, within = (checkpoint(folder, step) for step in (steps // 2, steps // 2 + 1))
    told = start(tmp_path / "within", 1, resume_from=within, **options)
    assert "was read by 2 processes when the run was saved, and is read by 1" in told
    assert start(tmp_path / "between", 1, resume_from=between, **options) == ""


def test_what_a_rank_had_that_is_no_more_is_verified(tmp_path: Path) -> None:
    """A file of a rank that is no more is damaged: the checkpoint before it is taken, and said."""
    folder = tmp_path / "parts"
    run_in_parts(folder, [3], [])
    newest = sorted((folder / "checkpoints").glob("step_*"))[-1]
    (newest / "state.rank00002.json").write_text("{}")
    assert start(folder, 1) == ""
    assert "state.rank00002.json: expected" in max(folder.glob("part*-0.log")).read_text()
    assert [step for part, _, step, _ in lines(folder, "samples") if part == 1] == [9]
