"""Where a run is in its data, and how a resumed run gets there."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeAlias, TypeVar

from robo_orchard_lab.pipeline.checkpoint import (
    capture_random_state,
    check_random_state,
    generators_of,
    restore_random_state,
)

logger = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")
RandomState: TypeAlias = Mapping[str, Any]


class DataPosition:
    """The random state at the start of the epoch, which gives the order of its batches.

    A resumed epoch starts with that state again, loads the batches that were done, and goes on
    with the random state of the moment of saving. This is exact for every loader whose batches
    follow from the random state, and takes the time to load what is skipped. Persistent workers
    have a random state that outlives the epoch and can't be reached, so their augmentation is
    another one after a resume.
    """

    def __init__(self, dataloader: Iterable[Any]) -> None:
        self._dataloader = dataloader
        self._generators = generators_of(dataloader)
        self._epoch_start: RandomState | None = None
        self._window: dict[str, Any] | None = None  # the one that was last loaded ahead
        self._loaded: Mapping[str, Any] | None = None  # until the run goes on from there

    def state_dict(self) -> Mapping[str, Any]:
        """The random states at the start of the epoch, of an open window, and now."""
        if self._loaded is not None:
            return self._loaded
        now = capture_random_state(self._generators)
        return {"epoch_start": self._epoch_start or now, "window": self._window, "now": now}

    def check(self, state: Mapping[str, Any]) -> None:
        """Refuse a state that :meth:`load_state_dict` could not use; raises ``StateError``."""
        for part in ("epoch_start", "now"):
            check_random_state(state[part], self._generators)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Have the next epoch begin, and go on, as the saved run would have."""
        self._loaded = state
        if getattr(self._dataloader, "persistent_workers", False):
            logger.warning(
                "the data loader has persistent workers, whose random state is not saved: what "
                "they draw (augmentation) will differ from the run that was saved"
            )

    def go_on(self) -> None:
        """From here on, draw what the saved run would have drawn; nothing if none was loaded."""
        if self._loaded is not None:
            self._restore(self._loaded["now"])
            self._loaded = None

    def start_epoch(self, epoch_id: int, step_id: int) -> None:
        """Ahead of making the loader's iterator: draw as at the start of this epoch."""
        self._announce(epoch_id)
        if step_id > 0 and self._loaded is not None:
            self._epoch_start = self._loaded["epoch_start"]
            self._restore(self._loaded["epoch_start"])
        else:
            self._epoch_start = capture_random_state(self._generators)
        self._window = None

    def begin_window(self, step_id: int) -> None:
        """Ahead of loading the batches of an accumulation window, the first being ``step_id``."""
        window = self._loaded["window"] if self._loaded is not None else None
        if window is not None and window["step_id"] == step_id:
            self._restore(window["random"])  # not what loading alone has drawn until here
        self._window = {"step_id": step_id, "random": capture_random_state(self._generators)}

    def seek(self, steps: Iterator[ItemT], step_id: int) -> Iterator[ItemT]:
        """Load the batches that are done, then give those that follow."""
        if step_id > 0:
            for _ in islice(steps, step_id):
                pass
            self.go_on()
        return steps

    def _announce(self, epoch_id: int) -> None:
        """Tell samplers and datasets that shuffle by the epoch which one begins."""
        loader: Any = self._dataloader
        told = [loader]
        if not hasattr(loader, "set_epoch"):  # one that has it tells its own parts
            told += [
                getattr(loader, part, None) for part in ("sampler", "batch_sampler", "dataset")
            ]
        for part in told:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch_id)

    def _restore(self, state: RandomState) -> None:
        restore_random_state(state, self._generators)
