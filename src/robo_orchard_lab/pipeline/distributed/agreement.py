"""What one rank finds out by itself, known to all ranks at the same step."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Literal, TypeAlias

from robo_orchard_lab.pipeline.distributed.collectives import gather_numbers, gather_objects
from robo_orchard_lab.pipeline.errors import PipelineConfigError, PipelineStateError

Whose: TypeAlias = Literal["first", "any", "all"]

_AGREE: dict[Whose, Callable[[Sequence[int]], int]] = {
    "first": itemgetter(0),
    "any": max,
    "all": min,
}
_MANY_STEPS = 1 << 31
_SHARE = 0.01  # of the time, at most, that goes into exchanges
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
    """Numbers that ranks agree on now and then: a clock's answer, a signal that came.

    Whoever needs one adds a topic, on every rank alike. The trainer then has all topics exchanged
    together, in one small collective after a step, ahead of its commit point; without topics there
    is none. It is known to all ranks alike with which steps: with every ``every``-th one, or, by
    default, each exchange settles when the next one is due. Exchanges then take up a hundredth of
    the time, and are at most some five seconds apart, or as far as the topics allow; with steps
    that are slow beside an exchange, each step has one. They go through memory of the host, so
    that the device is not waited for.

    In one process there is nothing to exchange, and each step has its answer.

    >>> agreement = Agreement()
    >>> agreement.topic("luck", find=lambda: 7, tell=print)
    >>> agreement.settle(step=1)
    7

    Args:
        rank: of this process.
        processes: how many the job has.
        every: in steps of the run, >= 1; None for as often as is cheap.

    Raises:
        PipelineConfigError: ``every`` is no such number.
    """

    def __init__(self, rank: int = 0, processes: int = 1, every: int | None = None) -> None:
        if every is not None and (type(every) is not int or every < 1):
            raise PipelineConfigError(f"agree_every must be an int >= 1, or None, got {every!r}")
        self.several = processes > 1
        """Whether there is anyone to agree with."""
        self.due_at = 0
        """With which step there may be an exchange; not ahead of it."""
        self._is_first = rank == 0
        self._every = every
        self._topics: list[_Topic] = []
        self._last_step = 0
        self._last_at: float | None = None
        self._costs_s: list[float] = []  # of the last exchanges, without the first, which connects

    @property
    def is_needed(self) -> bool:
        """Whether there is something to agree on, or may be in the middle of an epoch."""
        return self.several or bool(self._topics)

    def topic(
        self,
        name: str,
        *,
        find: Callable[[], int],
        tell: Callable[[int], object],
        whose: Whose = "any",
        wait_s: Callable[[], float] | None = None,
    ) -> None:
        """Have a number agreed on from now on, with each exchange; called on every rank alike.

        In one process it counts from the next epoch on, so that the first is had by a call in a
        ``before`` of ``on_loop``.

        Args:
            name: for errors.
            find: this rank's number; 0 for nothing.
            tell: called on every rank with the number that is agreed on, unless that is 0; it may
                make requests, for the commit point after this step.
            whose: the highest number of ``any`` rank, the lowest of ``all``, or the ``first``'s.
            wait_s: in what time to ask again, at the pace of the steps since the last exchange:
                the shortest of all topics and ranks, or, where ``whose`` is "first", of that rank.
                None for as soon as is cheap.
        """
        self._topics.append(_Topic(name, find, tell, whose, wait_s))
        self.due_at = 0

    def settle(self, step: int) -> None:
        """Exchange, if it is due with this step, and tell what is agreed on: a collective.

        Args:
            step: how many steps of the run are done.

        Raises:
            PipelineStateError: the ranks have come here with unlike steps or topics.
        """
        topics = tuple(self._topics)
        if not topics:
            self.due_at = _MANY_STEPS
        elif not self.several:
            _tell(topics, _find(topics))
        elif self._every is None:
            self._settle(topics, step)
        else:
            self.due_at = (step // self._every + 1) * self._every
            if step % self._every == 0:
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
        """The numbers of each rank."""
        names = [topic.name for topic in self._topics]
        head = [step, zlib.crc32("\n".join(names).encode())]
        row = [*head, *numbers]
        rows = gather_numbers(row + [0] * (-len(row) % _ROW))  # a collective
        if any(other[:2] != head for other in rows):
            told = gather_objects(f"step {step}, {', '.join(names)}")
            raise PipelineStateError(
                "the ranks have come to an exchange at unlike steps, or about unlike topics: "
                + "; ".join(f"rank {rank}: {of_rank}" for rank, of_rank in enumerate(told))
                + ". A hook has done something on some ranks alone, such as asking for an "
                "evaluation; it has to do so on every rank, or ask with rank_local=True"
            )
        return [other[2 : len(row)] for other in rows]

    def _wait_steps(self, step: int, now: float) -> int:
        """In how many steps this rank wants the next exchange."""
        # The mean of the last ones, since one rank may have waited for another in one of them.
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
