"""Times of hooks and stages: marks on the step path, evaluated in batches afterwards.

On the step path a mark costs two appends and a reading of the clock. Marks of one step after
another form few sequences, so :class:`HookTimes` finds the nested spans of each sequence once, and
adds up the times of all its steps with NumPy.
"""

from __future__ import annotations

import functools
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from enum import Enum, auto
from time import perf_counter
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from robo_orchard_core.utils.hook import FunctionInfo, HookContext, HookEntry
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.hook_set import hook_name

Entry: TypeAlias = HookEntry[PipelineHookArgs]
Function: TypeAlias = Callable[[PipelineHookArgs], Any]
Times: TypeAlias = NDArray[np.float64]
Group: TypeAlias = tuple[Literal["step", "stage", "hook"], str]
"""Kind and name of a sum of times."""

STAGES = (
    *("data_wait", "forward", "backward", "optimizer", "hooks", "trainer"),
    *("evaluation", "logging", "saving"),
)
"""Stages that share the time from one step to the next. ``data_wait`` is the time between two steps
outside of commit points, ``trainer`` the trainer's own code."""
COMMIT_STAGES = ("logging", "saving")
"""Stages of commit points, without a channel."""
_STAGE_OF_BODY = {
    "on_epoch": "data_wait",
    "on_model_forward": "forward",
    "on_model_backward": "backward",
    "on_optimizer_step": "optimizer",
    "on_evaluation": "evaluation",
    **{stage: stage for stage in COMMIT_STAGES},
}
_STEP: Group = ("step", "")
_MOST_MARKS = 8192  # some 100 KiB, and a millisecond to evaluate
_MOST_PATTERNS = 256
_RECENT_STEPS = 100


@dataclass(eq=False, slots=True)
class Part:
    """Function of a hook, or a channel, or the body of a channel, with its times in seconds.

    Attributes:
        hook: Name of the hook; None for a channel and its body.
        phase: ``before`` or ``after`` of a hook, ``body`` of a channel; None for a channel.
        first_s: Time of the first call, which the other times exclude; of hooks only.
        self_s: Time without the channels opened inside; of a channel, without hooks and body.
        total_s: Time with the channels opened inside.
    """

    index: int
    channel: str
    stage: str
    hook: str | None = None
    phase: Literal["before", "after", "body"] | None = None
    position: int = -1
    calls: int = 0
    first_s: float = 0.0
    self_s: float = 0.0
    total_s: float = 0.0

    @property
    def groups(self) -> tuple[Group, ...]:
        """Kinds and names of the sums to which the part's own time belongs."""
        stage: Group = "stage", self.stage
        return (stage,) if self.hook is None else (stage, ("hook", self.hook))


class _Kind(Enum):
    ENTER = auto()
    END = auto()  # of a function or a body, which began at the previous mark of its channel
    EXIT = auto()


class _Mark(NamedTuple):
    kind: _Kind
    part: Part


class Span(NamedTuple):
    """Time of a part, from one mark to another of a step, by their indices."""

    part: Part
    start: int
    end: int
    begins: bool = True
    """False for the rest of a channel that was open before."""


class StepSpans(NamedTuple):
    """Spans of one step, the outer ones first."""

    step: int
    """Number of steps done with this one."""
    times: list[float]
    """Time of each mark in seconds of ``perf_counter``, and of the end."""
    spans: list[Span]
    owners: list[Part | None]
    """Innermost part in each interval between two marks."""


@dataclass(slots=True)
class _Frame:
    """Open channel while marks are read."""

    channel: Part
    start: int
    last: int  # end of the last function
    begins: bool = True
    has_body: bool = False


class _Pattern:
    """Nested spans of a sequence of marks, and the intervals of each part.

    Interval ``i`` lasts from mark ``i`` to the next one; the last interval ends with the sequence.

    Args:
        open_channels: channels open at the first mark, the outermost first.
        marks: the sequence.
        body_of: returns the body of a channel.
        column_of: returns the number of a group's column in tables of steps.
    """

    def __init__(
        self,
        open_channels: Iterable[Part],
        marks: Sequence[_Mark],
        body_of: Callable[[Part], Part],
        column_of: Callable[[Group], int],
    ) -> None:
        frames = [_Frame(channel, 0, 0, begins=False) for channel in open_channels]
        spans: list[Span] = []
        for index, (kind, part) in enumerate(marks):
            if kind is _Kind.ENTER:
                frames.append(_Frame(part, index, index))
                continue
            while frames and frames[-1].channel.channel != part.channel:
                frames.pop()  # left without a mark, as by a signal between two instructions
            if not frames:
                continue
            frame = frames[-1]
            if kind is _Kind.END:
                spans.append(Span(part, frame.last, index))
                frame.last, frame.has_body = index, frame.has_body or part.phase == "body"
                continue
            frames.pop()
            if not frame.has_body:
                spans.append(Span(body_of(frame.channel), frame.last, index))
            spans.append(Span(frame.channel, frame.start, index, frame.begins))
        end = len(marks)
        for frame in reversed(frames):
            if not frame.has_body:
                spans.append(Span(body_of(frame.channel), frame.last, end, begins=False))
            spans.append(Span(frame.channel, frame.start, end, frame.begins))
        self.open_channels = tuple(frame.channel for frame in frames)
        # Outer spans first. Of two with equal limits, the outer one was closed later.
        spans.reverse()
        self.spans = sorted(spans, key=lambda span: (span.start, -span.end))
        self.parts = list(dict.fromkeys(span.part for span in self.spans))
        self.calls = Counter(span.part for span in self.spans if span.begins)
        index_of = {part: number for number, part in enumerate(self.parts)}
        self.owners = owners = cast("list[Part | None]", [None] * end)
        self.total = np.zeros((end, len(self.parts)))
        for span in self.spans:
            owners[span.start : span.end] = [span.part] * (span.end - span.start)
            self.total[span.start : span.end, index_of[span.part]] = 1.0
        groups = list(dict.fromkeys(group for part in self.parts for group in part.groups))
        self.columns = [column_of(group) for group in groups]
        self.own = np.zeros((end, len(self.parts)))
        self.by_group = np.zeros((end, len(groups)))
        for interval, owner in enumerate(owners):
            if owner is not None:
                self.own[interval, index_of[owner]] = 1.0
                self.by_group[interval, [groups.index(group) for group in owner.groups]] = 1.0

    def add(self, durations: Times) -> None:
        """Add the durations of intervals, one row for each repetition, to the parts."""
        summed = durations.sum(axis=0)
        own, total = summed @ self.own, summed @ self.total
        for index, part in enumerate(self.parts):
            if not part.calls and part.hook is not None:
                # A part that is new here is called first in the first row.
                first = next(span for span in self.spans if span.part is part)
                row = durations[0, first.start : first.end]
                part.first_s = float(row.sum())
                total[index] -= part.first_s
                own[index] -= row @ self.own[first.start : first.end, index]
            part.calls += self.calls[part] * len(durations)
            part.self_s += max(0.0, float(own[index]))  # not -1e-20 after one call
            part.total_s += max(0.0, float(total[index]))


class HookTimes:
    """Log of marks, and the times of all parts.

    Args:
        stage_of: returns the stage of a hook's functions.
        window: numbers of steps to record the spans of.
    """

    def __init__(self, stage_of: Callable[[Entry], str], window: range = range(0)) -> None:
        self._stage_of, self._window = stage_of, window
        self.parts: list[Part] = []
        self._by_key: dict[tuple[object, ...], Part] = {}
        self._marks: list[_Mark] = []
        self._numbers: dict[_Mark, int] = {}
        self._keys: list[int] = []
        self._times = array("d")  # no objects to collect from all over the memory
        self._patterns: dict[tuple[tuple[Part, ...], bytes], _Pattern] = {}
        self._open: tuple[Part, ...] = ()
        self._enter_step = self._number(_Kind.ENTER, self._channel("on_step"))
        self._end_of_loop = self._number(_Kind.END, self._body_of(self._channel("on_loop")))
        self._columns: dict[Group, int] = {_STEP: 0}
        self._recent = np.zeros((0, 1))
        self._sums = np.zeros(1)
        self.steps = 0
        """Evaluated steps, without the first."""
        self.first_step_s: float | None = None
        self.recorded: list[StepSpans] = []
        """Spans of the steps in the window."""

    # --- marks ---------------------------------------------------------------------------------

    def wrap(self, channel: str, own: Any, entries: Sequence[Entry]) -> Iterator[Entry]:
        """Return a channel's entries with timed functions, between marks of its beginning and end.

        Args:
            channel: name of the channel.
            own: owner of the entries that are added.
            entries: entries of the channel.
        """
        enter, exit_ = (self.marker(kind, channel) for kind in ("enter", "exit"))
        yield added_entry(enter, exit_, own)
        seen: dict[object, int] = {}
        for entry in entries:
            yield replace(
                entry,
                before=self._timed(channel, entry, "before", entry.before, seen),
                after=self._timed(channel, entry, "after", entry.after, seen),
            )
        if any(entry.after is not None for entry in entries):
            end = self._marker(_Kind.END, self._body_of(self._channel(channel)))
            yield added_entry(None, end, own)

    def marker(self, kind: Literal["enter", "exit"], channel: str) -> Function:
        """Return a function that marks the beginning or the end of a channel or commit stage."""
        return self._marker(_Kind[kind.upper()], self._channel(channel))

    def _marker(self, kind: _Kind, part: Part) -> Function:
        number = self._number(kind, part)
        add_key, add_time = self._keys.append, self._times.append

        def mark(args: PipelineHookArgs) -> None:
            add_key(number)
            add_time(perf_counter())

        return mark

    def _timed(
        self,
        channel: str,
        entry: Entry,
        phase: Literal["before", "after"],
        function: Function | None,
        seen: dict[object, int],
    ) -> Function | None:
        """Return a function with a mark at its end; also its beginning is that of a mark."""
        if function is None:
            return None
        info = FunctionInfo.of(function)
        name = hook_name(entry)
        key = channel, name, phase, info.location or info.name
        seen[key] = seen.get(key, 0) + 1
        part = self._part((*key, seen[key]), channel, self._stage_of(entry), name, phase)
        part.position = entry.position
        number = self._number(_Kind.END, part)
        add_key, add_time = self._keys.append, self._times.append

        @functools.wraps(function)  # errors show the name and line of the function
        def timed(args: PipelineHookArgs) -> None:
            try:
                function(args)
            finally:
                add_key(number)
                add_time(perf_counter())

        return timed

    def _number(self, kind: _Kind, part: Part) -> int:
        mark = _Mark(kind, part)
        number = self._numbers.setdefault(mark, len(self._marks))
        if number == len(self._marks):
            self._marks.append(mark)
        return number

    def _channel(self, name: str) -> Part:
        return self._part((name,), name, "trainer")

    def _body_of(self, channel: Part) -> Part:
        name = channel.channel
        return self._part((name, "body"), name, _STAGE_OF_BODY.get(name, "trainer"), phase="body")

    def _part(
        self, key: tuple[object, ...], channel: str, stage: str, *rest: Any, **more: Any
    ) -> Part:
        part = self._by_key.get(key)
        if part is None:
            part = self._by_key[key] = Part(len(self.parts), channel, stage, *rest, **more)
            self.parts.append(part)
        return part

    # --- times ---------------------------------------------------------------------------------

    def is_full(self) -> bool:
        """Return True if the marks should be evaluated."""
        return len(self._keys) > _MOST_MARKS

    def evaluate(self, steps_done: int, *, at_end: bool = False) -> None:
        """Add the marks to the times, up to the last beginning of a step.

        A step lasts until the next one begins; the last one until the body of the loop ends.

        Args:
            steps_done: number of steps done, with the step of the last mark.
            at_end: also evaluate the marks after the last beginning of a step.
        """
        count = min(len(self._keys), len(self._times))  # unequal after an interrupt within a mark
        keys, times = np.array(self._keys[:count], np.int32), np.array(self._times[:count])
        begins = np.flatnonzero(keys == self._enter_step).tolist()
        if not len(keys) or not (begins or at_end):
            return
        stop = len(keys) if at_end else begins[-1]
        cuts = [*begins] if at_end else begins[:-1]
        count = len(cuts)
        if at_end:
            times = np.append(times, times[-1])
            cuts += np.flatnonzero(keys == self._end_of_loop)[-1:].tolist()
        if not cuts or cuts[0] > 0:
            cuts = [0, *cuts]
        first = steps_done - count + at_end
        by_pattern: dict[_Pattern, list[tuple[int, int]]] = {}
        content, number = keys.tobytes(), 0
        for start, end in zip(cuts, [*cuts[1:], stop], strict=True):
            if start == end:
                continue
            pattern = self._pattern(content[4 * start : 4 * end])
            is_step = keys[start] == self._enter_step
            by_pattern.setdefault(pattern, []).append((start, number if is_step else -1))
            if is_step:
                if first + number in self._window:
                    marked = times[start : end + 1].tolist()
                    spans = StepSpans(first + number, marked, pattern.spans, pattern.owners)
                    self.recorded.append(spans)
                number += 1
        rows = np.zeros((count, len(self._columns)))
        for pattern, found in by_pattern.items():
            starts, numbers = np.array(found).T
            length = len(pattern.own)
            durations = np.diff(times[starts[:, None] + np.arange(length + 1)])
            pattern.add(durations)
            is_step = numbers >= 0
            if is_step.any():
                durations, numbers = durations[is_step], numbers[is_step]
                rows[np.ix_(numbers, pattern.columns)] = durations @ pattern.by_group
                rows[numbers, 0] = durations.sum(axis=1)
        del self._keys[:stop], self._times[:stop]
        self._add_steps(rows)

    def _pattern(self, content: bytes) -> _Pattern:
        if not self._open:  # the hook was added during the run
            self._open = self._channel("on_loop"), self._channel("on_epoch")
        key = self._open, content
        pattern = self._patterns.get(key)
        if pattern is None:
            if len(self._patterns) >= _MOST_PATTERNS:
                self._patterns.clear()
            marks = [self._marks[number] for number in np.frombuffer(content, np.int32)]
            column_of = lambda group: self._columns.setdefault(group, len(self._columns))  # noqa: E731
            pattern = _Pattern(self._open, marks, self._body_of, column_of)
            self._patterns[key] = pattern
        self._open = pattern.open_channels
        return pattern

    def _add_steps(self, rows: Times) -> None:
        if len(rows) and self.first_step_s is None:
            self.first_step_s, rows = float(rows[0, 0]), rows[1:]
        self.steps += len(rows)
        more = len(self._columns) - len(self._sums)
        self._sums = np.append(self._sums, np.zeros(more)) + rows.sum(axis=0)
        before = np.pad(self._recent, ((0, 0), (0, more)))
        self._recent = np.concatenate([before, rows])[-_RECENT_STEPS:]

    def sums(self, kind: Literal["step", "stage", "hook"]) -> dict[str, float]:
        """Return the time of all steps except the first, in seconds, by name."""
        return self._by_name(kind, self._sums)

    def medians(self, kind: Literal["step", "stage", "hook"]) -> dict[str, float]:
        """Return the median time of the last 100 steps, in seconds, by name."""
        if not len(self._recent):
            return {}
        return self._by_name(kind, np.median(self._recent, axis=0))

    def _by_name(self, kind: str, values: Times) -> dict[str, float]:
        columns = self._columns.items()
        return {n: float(values[c]) for (k, n), c in columns if k == kind and c < len(values)}


def added_entry(before: Function | None, after: Function | None, owner: Any) -> Entry:
    """Return an entry that the hook ``owner`` adds to a channel while the channel is wrapped."""
    return HookEntry(-1, HookContext.from_callable(before, after, owner.name), before, after, owner)


def with_ranges(
    channel: str,
    owner: Any,
    make_range: Callable[[str], AbstractContextManager[Any]],
    entries: Iterable[Entry],
) -> Iterator[Entry]:
    """Return a channel's entries, with a named range around the channel and around each function.

    Args:
        channel: name of the channel.
        owner: owner of the entry that is added.
        make_range: returns a range that is open in the body of ``with``.
        entries: entries of the channel.
    """
    opened: list[AbstractContextManager[Any]] = []

    def enter(args: PipelineHookArgs) -> None:
        opened.append(make_range(channel))
        opened[-1].__enter__()

    def leave(args: PipelineHookArgs) -> None:
        opened.pop().__exit__(None, None, None)

    def ranged(entry: Entry, phase: str, function: Function | None) -> Function | None:
        if function is None:
            return None
        name = f"{hook_name(entry)} {channel}.{phase}"

        @functools.wraps(function)  # errors show the name and line of the function
        def run(args: PipelineHookArgs) -> None:
            with make_range(name):
                function(args)

        return run

    yield added_entry(enter, leave, owner)
    for entry in entries:
        before, after = ranged(entry, "before", entry.before), ranged(entry, "after", entry.after)
        yield replace(entry, before=before, after=after)
