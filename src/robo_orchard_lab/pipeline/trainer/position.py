"""Where a run is in its data, and how a resumed run gets there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

import torch

from robo_orchard_lab.pipeline.checkpoint import (
    capture_random_state,
    check_random_state,
    restore_random_state,
)

ItemT = TypeVar("ItemT")


class DataPosition:
    """The random state at the start of the epoch, which gives the order of its batches.

    A resumed epoch starts with that state again, loads the batches that were done, and goes on
    with the random state of the moment of saving. This is exact for every loader whose batches
    follow from the random state, and takes the time to load what is skipped.
    """

    def __init__(self, dataloader: Iterable[Any]) -> None:
        self._generators = _generators_of(dataloader)
        self._epoch_start: Mapping[str, Any] | None = None
        self._resume_with: Mapping[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The random states at the start of the epoch and now."""
        now = capture_random_state(self._generators)
        return {"epoch_start": self._epoch_start or now, "now": now}

    def check(self, state: Mapping[str, Any]) -> None:
        """Refuse a state that :meth:`load_state_dict` could not use; raises ``StateError``."""
        for part in ("epoch_start", "now"):
            check_random_state(state[part], self._generators)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Have the next epoch begin, and go on, as the saved run would have."""
        self._epoch_start, self._resume_with = state["epoch_start"], state["now"]

    def go_on(self) -> None:
        """From here on, draw what the saved run would have drawn; nothing if none was loaded."""
        if self._resume_with is not None:
            restore_random_state(self._resume_with, self._generators)
            self._resume_with = None

    def start_epoch(self, step_id: int) -> None:
        """Ahead of making the loader's iterator: draw as at the start of this epoch."""
        if step_id > 0 and self._epoch_start is not None:
            restore_random_state(self._epoch_start, self._generators)
        else:
            self._epoch_start = capture_random_state(self._generators)

    def seek(self, steps: Iterator[ItemT], step_id: int) -> Iterator[ItemT]:
        """Load the batches that are done, then give those that follow."""
        if step_id > 0:
            for _ in islice(steps, step_id):
                pass
            self.go_on()
        return steps


def _generators_of(dataloader: Iterable[Any]) -> dict[str, torch.Generator]:
    """The random generators of its own that a loader draws from, by where they are."""
    holders = {"loader": dataloader}
    for name in ("sampler", "batch_sampler"):
        holders[name] = getattr(dataloader, name, None)  # type: ignore[assignment]  # any object
    found = {name: getattr(holder, "generator", None) for name, holder in holders.items()}
    return {name: value for name, value in found.items() if isinstance(value, torch.Generator)}
