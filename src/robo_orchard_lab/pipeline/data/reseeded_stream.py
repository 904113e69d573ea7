"""A stream in workers that outlive an epoch, seeded anew for each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from robo_orchard_lab.pipeline.data.kept_generators import kept_generators, seed_generators
from robo_orchard_lab.pipeline.data.random_keys import (
    Purpose,
    epoch_key,
    numbered_seed,
    seed_streams,
)


class ReseededStream(IterableDataset[Any]):
    """The user's dataset, whose workers draw from (seed, epoch, worker) in every epoch.

    A plain loader seeds workers when they start, so that those which outlive an epoch draw from
    where they were, which no resumed run could know. Each time that a worker begins to iterate,
    the next epoch begins.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.seed = 0
        self.epoch_id = 0
        """The epoch that the next iteration is of."""

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        key = epoch_key(self.seed, self.epoch_id, Purpose.WORKERS)
        seed = numbered_seed(key, 0 if info is None else info.id)
        seed_streams(seed)
        seed_generators(kept_generators("", self.dataset), seed)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self.epoch_id)
        self.epoch_id += 1
        return iter(self.dataset)
