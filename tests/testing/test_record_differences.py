"""Tests of joining and comparing records of runs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robo_orchard_lab.testing.run_record import RunRecord, read_record, record_differences

LENGTH, EPOCHS = 3, 2
OVER = LENGTH * EPOCHS
Line = tuple[int, str, Any]


def facts(step: int) -> dict[str, str]:
    return {"weights w": f"{step}", "random torch": f"after {step}"}


def run(start: int = 0, stop: int = OVER) -> Iterator[Line]:
    """The lines of a process that begins and stops after so many steps; it evaluates every 2."""
    yield start, "start", start
    if start < OVER:
        yield start, "event", counted("before on_loop", start)
        done = start
        while done < stop:
            yield done, "event", counted("before on_epoch", done)
            while True:
                yield done, "event", counted("before on_step", done)
                yield done, "facts", facts(done)
                yield done, "event", counted("after on_step", done)
                done += 1
                completed = done % LENGTH == 0
                if not completed and done != stop:
                    yield from evaluation(done)
                if completed or done == stop:
                    break
            last = counted("after on_epoch", done, of_epoch=(done - 1) // LENGTH)
            yield done, "event", last + (" completed" if completed else "")
            yield from evaluation(done)
        yield done, "event", counted("after on_loop", done)
    end = facts(max(start, stop))
    # A completed process continues with any RNG state.
    yield max(start, stop), "end", end if start < OVER else {**end, "random torch": "fresh"}


def evaluation(done: int) -> Iterator[Line]:
    if done % 2 == 0:
        yield done, "event", counted("before on_evaluation", done)
        yield done, "event", counted("after on_evaluation", done)


def counted(event: str, done: int, of_epoch: int | None = None) -> str:
    epoch, step = divmod(done, LENGTH)
    if of_epoch is not None and of_epoch != epoch:
        epoch, step = of_epoch, LENGTH
    return f"{event} {epoch} {step} {done} {done}"


def record(path: Path, lines: list[Line], torn: str = "") -> RunRecord:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn, encoding="utf-8")
    found = read_record(path)
    assert found is not None
    return found


def described(uninterrupted: RunRecord, parts: list[RunRecord]) -> list[str]:
    return [str(difference) for difference in record_differences(uninterrupted, parts, ())]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records") / "record.jsonl"


@given(stops=st.sets(st.integers(1, OVER)))
def test_stops_are_no_difference(stops: set[int], file: Path) -> None:
    """Loop and epoch events caused by a stop are left out."""
    uninterrupted = record(file, [*run()])
    edges = [0, *sorted(stops), OVER]
    parts = [record(file, [*run(start, stop)]) for start, stop in itertools.pairwise(edges)]
    assert described(uninterrupted, parts) == []


@given(data=st.data())
def test_kills_are_no_difference(data: st.DataObject, file: Path) -> None:
    """Steps after the last save are repeated by the next process."""
    uninterrupted = record(file, [*run()])
    parts, start = [], 0
    for _ in range(data.draw(st.integers(1, 5))):
        lines = [*run(start)]
        lines = lines[: data.draw(st.integers(1, len(lines)))]
        parts.append(record(file, lines, torn='[3, "event", "befo'))
        start = data.draw(st.sampled_from([s for s in range(start, OVER + 1) if saved(lines, s)]))
    parts.append(record(file, [*run(start)]))
    assert described(uninterrupted, parts) == []


def test_a_kill_after_the_last_save_is_no_difference(file: Path) -> None:
    """A completed run is resumed without a step, and nothing is lost."""
    uninterrupted = record(file, [*run()])
    lines = [line for line in run() if line[1] != "end" and "after on_loop" not in str(line[2])]
    assert described(uninterrupted, [record(file, lines), record(file, [*run(OVER)])]) == []
    assert described(uninterrupted, [record(file, lines[:-1]), record(file, [*run(OVER)])]) != []


def test_a_survivor_of_a_killed_rank_is_no_difference(file: Path) -> None:
    """An error at the loop's end, on a rank whose peer was killed, is no lost step."""
    uninterrupted = record(file, [*run()])
    lines = [line for line in run() if line[1] != "end"]
    step, kind, event = lines[-1]
    lines[-1] = step, kind, f"{event} RuntimeError('connection closed by peer')"
    assert described(uninterrupted, [record(file, lines), record(file, [*run(OVER)])]) == []
    assert described(uninterrupted, [record(file, lines)]) != []


def saved(lines: list[Line], step: int) -> bool:
    """Return True if a process saved after that many steps."""
    texts = [line[2] for line in lines if line[0] == step and line[1] == "event"]
    if step == lines[0][2]:
        return True
    if step % 2 == 0 and not any(text.startswith("after on_evaluation") for text in texts):
        return False
    if step % LENGTH == 0:
        return any(text.startswith("after on_epoch") for text in texts)
    return bool(texts)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ((4, "facts", {"weights w": "other", "random torch": "after 4"}), "step 4: weights w"),
        ((4, "facts", {"weights w": "4"}), "step 4: random torch"),
        ((5, "event", "after on_step 1 2 5 5 ValueError()"), "step 5: events"),
        ((6, "end", {"weights w": "other", "random torch": "after 6"}), "step 6: weights w"),
        ((6, "event", "before on_evaluation 2 0 6 5"), "step 6: events"),
    ],
)
def test_each_change_is_reported(change: Line, difference: str, file: Path) -> None:
    """A different value, a missing value and a different event are named with the step."""
    uninterrupted = record(file, [*run()])
    lines = [*run(2)]
    kind, start = change[1], str(change[2]).split(" ")[0:2]
    for index, line in enumerate(lines):
        like = line[1] != "event" or line[2].split(" ")[0:2] == start
        if line[:2] == change[:2] and kind == line[1] and like:
            lines[index] = change
            break
    else:
        raise AssertionError("nothing is changed")
    parts = [record(file, [*run(0, 2)]), record(file, lines)]
    assert described(uninterrupted, parts) == [difference]


@pytest.mark.parametrize("missing", range(1, 20))
def test_each_missing_or_repeated_event_is_reported(missing: int, file: Path) -> None:
    """The step of the event is named."""
    uninterrupted = record(file, [*run()])
    lines = [*run(2)]
    first = record(file, [*run(0, 2)])
    line = lines[missing + 2]  # those ahead are the reopened loop and epoch
    fewer = [*lines[: missing + 2], *lines[missing + 3 :]]
    twice = [*lines[: missing + 3], *lines[missing + 2 :]]
    for changed in (fewer, twice):
        if line[1] != "end":
            assert f"step {line[0]}: events" in described(
                uninterrupted, [first, record(file, changed)]
            )
