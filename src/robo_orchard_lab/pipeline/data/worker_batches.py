"""Batches of a map-style dataset that workers load.

Two things keep the training process from waiting. Persistent workers load the first batches of the
next epochs while the last batches of an epoch are used. Small batches that are loaded fast come
several at a time, since receiving one message costs 0.4 ms.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from robo_orchard_lab.pipeline.data.fetching import Fetcher, LoadedGroup, Task, TaskGroup, identity
from robo_orchard_lab.pipeline.data.loader import copy_loader
from robo_orchard_lab.pipeline.data.slots import MAX_BYTES, SlotReader
from robo_orchard_lab.pipeline.data.workers import IgnoreSignals, worker_startup
from robo_orchard_lab.pipeline.errors import DataError

_MAX_GROUP = 8
_MAX_GROUP_S = 0.02


class WorkerBatches:
    """Copy of the user's ``DataLoader`` with tasks in place of indices.

    When an epoch begins, its tasks are compared with the tasks that workers have. Where they
    differ, as after a change of the sampler, the workers' batches are dropped.
    """

    def __init__(self, user: DataLoader[Any], fetcher: Fetcher) -> None:
        self._fetcher = fetcher
        self._generator = torch.Generator()
        self._tasks = _TaskSampler()
        self._loader = copy_loader(
            user,
            dataset=fetcher,
            batch_size=None,
            sampler=self._tasks,
            collate_fn=identity,
            worker_init_fn=IgnoreSignals(user.worker_init_fn),
            generator=self._generator,
            in_order=True,
        )
        # One slot more for each worker: a task is sent just before the oldest group is unpacked.
        self._slots = 0 if user.pin_memory else user.num_workers * (1 + (user.prefetch_factor or 0))
        self._is_persistent = user.num_workers > 0 and user.persistent_workers
        self._ended: Iterator[Any] | None = None
        """Batches after the end of an epoch."""

    def epoch(
        self,
        epoch_id: int,
        worker_seed: int,
        tasks: Iterator[Task],
        count: int | None,
        later: Iterator[Task],
    ) -> Iterator[Any]:
        """Iterate over the batches of an epoch.

        Args:
            epoch_id: number of the epoch.
            worker_seed: seed of workers that start.
            tasks: tasks of the epoch, or of its rest.
            count: number of the tasks; None if unknown, as of a sampler that must be iterated.
            later: expected tasks of later epochs.
        """
        batches, self._ended = self._ended, None
        sent = [*islice(self._tasks.sent_ahead, count)]
        begun = [*islice(tasks, len(sent))]
        if batches is not None and sent and begun == sent:
            self._tasks.resume(tasks, later, len(sent))
        else:
            if count is None or not self._is_persistent:
                later = iter(())
            # A sampler that is iterated may depend on the training: no groups, without slots.
            slots = SlotReader(0 if count is None else self._slots)
            self._tasks.begin(chain(begun, tasks), later, slots)
            self._fetcher.epoch_id = epoch_id  # workers get a dataset whose epoch is set
            self._generator.manual_seed(worker_seed)
            with worker_startup():
                batches = _receive(iter(self._loader), self._tasks)
        return self._next_batches(batches, count) if self._is_persistent else batches

    def _next_batches(self, batches: Iterator[Any], count: int | None) -> Iterator[Any]:
        yield from islice(batches, count)
        self._ended = batches


def _receive(groups: Iterator[Any], tasks: _TaskSampler) -> Iterator[Any]:
    """Yield the batches of a pass over the loader.

    Refers to no object that keeps the iterator: workers are slow to end if their loader is deleted
    in a reference cycle.
    """
    for group in groups:
        if not isinstance(group, LoadedGroup):
            yield group
            continue
        tasks.adapt(group)
        yield from tasks.slots.unpack(group.packed)
        if group.failed is not None:
            task, error = group.failed
            tasks.begin(iter([task]), iter(()), SlotReader(0))
            for _ in groups:  # the error is raised here, by the task in a group of its own
                pass
            raise DataError(f"a worker failed to load a batch once, but not again:\n{error}")


class _TaskSampler:
    """Sampler of an epoch's tasks, and then of the expected tasks of later epochs."""

    def __init__(self) -> None:
        self.slots = SlotReader(0)
        self.sent_ahead: deque[Task] = deque()
        """Tasks of later epochs that were sent to workers."""
        self._tasks: Iterator[Task] = iter(())
        self._later: Iterator[Task] = iter(())
        self._group = 1

    def begin(self, tasks: Iterator[Task], later: Iterator[Task], slots: SlotReader) -> None:
        """Begin an epoch in a new pass over the loader."""
        self._tasks, self._later, self.slots = tasks, later, slots
        self.sent_ahead.clear()

    def resume(self, tasks: Iterator[Task], later: Iterator[Task], sent: int) -> None:
        """Begin an epoch of which the first ``sent`` tasks were sent."""
        self._tasks = tasks
        for _ in range(sent):
            self.sent_ahead.popleft()
        if not self.sent_ahead:  # else all tasks of the epoch were sent, and later ones
            self._later = later

    def adapt(self, group: LoadedGroup) -> None:
        """Set the size of further groups."""
        size, batches = group.packed.size, len(group.packed.batches)
        limit = min(MAX_BYTES * batches // size, _MAX_GROUP) if size else 1
        self._group = max(1, min(limit, int(_MAX_GROUP_S / group.seconds)))

    def __iter__(self) -> Iterator[Task | TaskGroup]:
        return self

    def __next__(self) -> Task | TaskGroup:
        task = self._next_task()
        if task is None:
            raise StopIteration
        slot = self.slots.assign()
        if slot is None:
            return task
        group = [task]
        while len(group) < self._group and (task := self._next_task()) is not None:
            group.append(task)
        return TaskGroup(group, slot)

    def _next_task(self) -> Task | None:
        task = next(self._tasks, None)
        if task is None:
            task = next(self._later, None)
            if task is not None:
                self.sent_ahead.append(task)
        return task
