"""Where a run in several processes is not the run in one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import zip_longest

from robo_orchard_lab.testing.resume.run_record import COMPLETED, Entry, Facts, RunRecord


@dataclass(frozen=True, slots=True)
class ResumeDifference:
    """One thing that is not what it is in the run that never stopped."""

    step: int
    """The step (``global_step_id``) in which, or ahead of which, it differs."""
    name: str
    """What differs, such as ``optimizer layer1.weight.exp_avg``."""
    straight: str
    """What it is in the run that never stopped, in a few characters."""
    resumed: str
    """What it is in the run that was stopped and resumed."""
    began_at: int
    """How many steps were done when the process began in which it differs."""

    def __str__(self) -> str:
        return f"step {self.step}: {self.name}"


def record_differences(
    straight: RunRecord, parts: Sequence[RunRecord], ignore: Sequence[str]
) -> Iterator[ResumeDifference]:
    """What differs, in the order of time; each name once, where it differs first.

    Args:
        straight: the run in one process.
        parts: the processes of the other run, in their order.
        ignore: patterns of the names of what may differ.
    """
    joined, began_at = join_records(parts)
    told: set[str] = set()
    for step in sorted({*straight.steps, *joined.steps}):
        entries, due = joined.steps.get(step, []), straight.steps.get(step, [])
        # The run was over, saved, and killed before it had closed all.
        if not any(parts[-1].steps.values()):
            closing = ("after on_epoch", "after on_loop")
            if all(any(_is(entry, end) for end in closing) for entry in due[len(entries) :]):
                due = due[: len(entries)]
        found = list(_of_entries(entries, due))
        if step == straight.last and straight.end is not None and joined.end is not None:
            expected = straight.end
            if not any(map(_is_random, joined.end)):  # it is not known
                expected = {name: v for name, v in expected.items() if not _is_random(name)}
            found += _of_facts(joined.end, expected)
        for name, one, other in found:
            if name not in told and not any(fnmatchcase(name, pattern) for pattern in ignore):
                told.add(name)
                yield ResumeDifference(step, name, other, one, began_at.get(step, 0))


def join_records(parts: Sequence[RunRecord]) -> tuple[RunRecord, dict[int, int]]:
    """One record of a run in several processes, and where the process of each step began.

    Left out are the loop and the epoch that each process but the first opens once more, and that
    each but the last closes early; and what a process had done after the save that the next one
    went on from.
    """
    joined = RunRecord(start=0)
    began_at: dict[int, int] = {}
    for part in parts:
        if not part.steps and part.end is None:  # it was killed before it did anything
            continue
        steps = {step: [*entries] for step, entries in part.steps.items()}
        if joined.steps:
            opened = steps.get(part.start, [])
            ahead = joined.steps.get(part.start, [])
            joined.steps = {s: e for s, e in joined.steps.items() if s < part.start}
            steps[part.start] = _across(ahead, opened)
        # A run that is over goes on with no step, and so does not take up its random state.
        idle = not any(_is(e, "before on_step") for step in part.steps.values() for e in step)
        if idle and part.end is not None:
            before = joined.end or {}  # unknown where that process was killed at its very end
            kept = {name: value for name, value in before.items() if _is_random(name)}
            rest = {name: value for name, value in part.end.items() if not _is_random(name)}
            joined.end = {**rest, **kept}
        else:
            joined.end = part.end
        joined.steps.update(steps)
        began_at.update((step, part.start) for step in steps)
    return joined, began_at


def _across(ahead: list[Entry], opened: list[Entry]) -> list[Entry]:
    """What two processes have done at the step at which the first was saved."""
    if not opened:  # the run was over
        return ahead
    opened = opened[1:]  # before on_loop
    ends = ["before on_step", "after on_loop"]
    if opened and _is(opened[0], "before on_epoch") and _step_id(opened[0]) > 0:
        opened = opened[1:]
        # A stop closes the epoch, ahead of the evaluations that are due, to be opened again here.
        ahead = [e for e in ahead if not _is(e, "after on_epoch") or str(e).endswith(COMPLETED)]
        ends.append("after on_epoch")
    else:
        ends.append("before on_epoch")
    cut = next((i for i, e in enumerate(ahead) if any(_is(e, end) for end in ends)), len(ahead))
    return ahead[:cut] + opened


def _is_random(name: str) -> bool:
    return name.startswith("random ")


def _is(entry: Entry, event: str) -> bool:
    return isinstance(entry, str) and entry.startswith(event + " ")


def _step_id(event: Entry) -> int:
    assert isinstance(event, str)
    return int(event.split()[3])


def _of_entries(
    found: Sequence[Entry], expected: Sequence[Entry]
) -> Iterator[tuple[str, str, str]]:
    """The names, and both values, of what differs in one step, up to another event."""
    for one, other in zip_longest(found, expected):
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _of_facts(one, other)
        elif one != other:
            yield "events", _event(one), _event(other)
            return


def _of_facts(found: Facts, expected: Facts) -> Iterator[tuple[str, str, str]]:
    for name in {**expected, **found}:
        one, other = found.get(name, "missing"), expected.get(name, "missing")
        if one != other:
            yield name, one, other


def _event(entry: Entry | None) -> str:
    if entry is None:
        return "nothing more in this step"
    return entry if isinstance(entry, str) else "the state of the run is looked at"


def attribute_hints(straight: RunRecord, parts: Sequence[RunRecord]) -> list[str]:
    """Attributes of hooks with which a resumed process began its first step, if others were due.

    They need not be what is wrong: some are times, or belong to a process.
    """
    hints: dict[str, str] = {}
    for part in parts[1:]:
        step = part.start
        found, expected = part.attributes.get(step), straight.attributes.get(step)
        if found is None or expected is None:
            continue
        for name, one, other in _of_facts(found, expected):
            hints.setdefault(name, f"{name} is {one} ahead of step {step}, was {other}")
    return [*hints.values()]


def compared_values(record: RunRecord) -> int:
    """How many values and events a record holds."""
    entries = [entry for step in record.steps.values() for entry in step]
    return len(record.end or ()) + sum(1 if isinstance(e, str) else len(e) for e in entries)
