"""Agreement: rank-local numbers, such as signals, that all ranks learn at the same step."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Literal, TypeAlias

from robo_orchard_core.utils.hook import RemovableHandle
from robo_orchard_lab.pipeline.distributed.collectives import gather_numbers, gather_objects
from robo_orchard_lab.pipeline.errors import PipelineConfigError, PipelineStateError

Whose: TypeAlias = Literal["first", "any", "all"]

_AGREE: dict[Whose, Callable[[Sequence[int]], int]] = {
    "first": itemgetter(0),
    "any": max,
    "all": min,
}
_MANY_STEPS = 1 << 31
_SHARE = 0.01  # maximum share of the time that exchanges cost
_LONGEST_WAIT_S = 5.0
_ROW = 16  # numbers, or a multiple of it, so that ranks whose topics differ can tell each other


@dataclass(frozen=True, slots=True)
class _Topic:
    name: str
    find: Callable[[], int]
    tell: Callable[[int], object]
    whose: Whose
    wait_s: Callable[[], float] | None


class Agreement:
    """Agrees on rank-local numbers at intervals: the answer of a clock, a received signal.

    A hook adds a topic on every rank. After a step and before its commit point, the trainer
    exchanges all topics in one small collective over host memory: at every ``every``-th step, or,
    by default, at the step that the last exchange decided. Exchanges then cost 1 % of the time, and
    are at most about five seconds apart, or as far as the topics allow. In one process, topics are
    evaluated after every step, without a collective.

    >>> agreement = Agreement()
    >>> handle = agreement.topic("luck", find=lambda: 7, tell=print)
    >>> agreement.settle(step=1)
    7

    Args:
        rank: rank of this process.
        processes: world size.
        every: interval in steps of the run, >= 1; None for an adaptive interval.

    Raises:
        PipelineConfigError: ``every`` is not an int >= 1.
    """

    def __init__(self, rank: int = 0, processes: int = 1, every: int | None = None) -> None:
        if every is not None and (type(every) is not int or every < 1):
            raise PipelineConfigError(f"agree_every must be an int >= 1, or None, got {every!r}")
        self.several = processes > 1
        """True in a job of several ranks."""
        self.due_at = 0
        """First step after which the next exchange may happen."""
        self._is_first = rank == 0
        self._every = every
        self._topics: list[_Topic] = []
        self._last_step = 0
        self._last_at: float | None = None
        self._costs_s: list[float] = []  # of the last exchanges, except the first, which connects

    @property
    def is_needed(self) -> bool:
        """True if there are topics, or may be in the middle of an epoch."""
        return self.several or bool(self._topics)

    def topic(
        self,
        name: str,
        *,
        find: Callable[[], int],
        tell: Callable[[int], object],
        whose: Whose = "any",
        wait_s: Callable[[], float] | None = None,
    ) -> RemovableHandle:
        """Add a number to agree on in each exchange; call it on every rank.

        Remove it by the returned handle, also on every rank.

        In one process, a topic takes effect with the next epoch; add it in a ``before`` of
        ``on_loop``.

        Args:
            name: name in error messages.
            find: returns this rank's number; 0 for none.
            tell: called on every rank with the agreed number, unless 0; may make requests for the
                commit point after this step.
            whose: ``"any"`` agrees on the maximum of all ranks, ``"all"`` on the minimum,
                ``"first"`` on the number of rank 0.
            wait_s: returns the time until the next exchange, in seconds; the minimum over topics
                and ranks counts, with ``"first"`` that of rank 0. None for an adaptive interval.
        """
        topic = _Topic(name, find, tell, whose, wait_s)
        self._topics.append(topic)
        self.due_at = 0
        return RemovableHandle(lambda: self._topics.remove(topic))

    def settle(self, step: int) -> None:
        """Exchange the topics if due after ``step`` steps, and pass on the agreed numbers.

        A collective. Raises a ``PipelineStateError`` if steps or topics differ between ranks.
        """
        topics = tuple(self._topics)
        if not topics:
            self.due_at = _MANY_STEPS
        elif not self.several:
            _tell(topics, _find(topics))
        else:
            if self._every is not None:
                self.due_at = (step // self._every + 1) * self._every
            if self._every is None or step % self._every == 0:
                self._settle(topics, step)

    def _settle(self, topics: tuple[_Topic, ...], step: int) -> None:
        began_at = time.monotonic()
        found = _find(topics)
        rows = self._exchange(step, [self._wait_steps(step, began_at), *found])
        if self._last_at is not None:
            self._costs_s = [*self._costs_s[-4:], time.monotonic() - began_at]
        self._last_step, self._last_at = step, began_at
        if self._every is None:
            self.due_at = step + min(row[0] for row in rows)
        by_topic = zip(*(row[1:] for row in rows), strict=True)
        _tell(
            topics,
            [_AGREE[topic.whose](numbers) for topic, numbers in zip(topics, by_topic, strict=True)],
        )

    def _exchange(self, step: int, numbers: list[int]) -> list[list[int]]:
        """Return the numbers of each rank."""
        names = [topic.name for topic in self._topics]
        head = [step, zlib.crc32("\n".join(names).encode())]
        row = [*head, *numbers]
        rows = gather_numbers(row + [0] * (-len(row) % _ROW))  # a collective
        if any(other[:2] != head for other in rows):
            of_ranks = gather_objects(f"step {step}, {', '.join(names)}")
            raise PipelineStateError(
                "the ranks reached an exchange at different steps, or with different topics: "
                + "; ".join(f"rank {rank}: {of_rank}" for rank, of_rank in enumerate(of_ranks))
                + ". A hook acted on some ranks only, such as by a request for an evaluation; "
                "act on every rank, or make the request with rank_local=True"
            )
        return [other[2 : len(row)] for other in rows]

    def _wait_steps(self, step: int, now: float) -> int:
        """Return the number of steps until this rank wants the next exchange."""
        # The mean of the last costs, since a rank may have waited for another rank in one.
        cost_s = sum(self._costs_s) / max(1, len(self._costs_s))
        affordable_s = min(cost_s / _SHARE, _LONGEST_WAIT_S)
        waits_s = [
            affordable_s if topic.wait_s is None else topic.wait_s()
            for topic in self._topics
            if topic.whose != "first" or self._is_first
        ]
        wait_s = max(affordable_s, min([*waits_s, _MANY_STEPS]))
        taken_s = 0.0 if self._last_at is None else now - self._last_at
        pace = (step - self._last_step) / taken_s if taken_s > 0 else 0.0
        return int(min(max(1.0, wait_s * pace), _MANY_STEPS))


def _find(topics: tuple[_Topic, ...]) -> list[int]:
    found = []
    for topic in topics:
        try:
            found.append(topic.find())
        except Exception as error:
            _note(error, topic)
            raise
    return found


def _tell(topics: tuple[_Topic, ...], agreed: list[int]) -> None:
    for topic, number in zip(topics, agreed, strict=True):
        if number:
            try:
                topic.tell(number)
            except Exception as error:
                _note(error, topic)
                raise


def _note(error: Exception, topic: _Topic) -> None:
    error.add_note(f"while the ranks agreed on {topic.name!r}")
