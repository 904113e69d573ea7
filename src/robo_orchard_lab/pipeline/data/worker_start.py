"""What a worker does before it loads."""

from __future__ import annotations

from torch.utils.data import get_worker_info

from robo_orchard_lab.pipeline.data.fetching import Fetcher
from robo_orchard_lab.pipeline.data.reseeded_stream import ReseededStream
from robo_orchard_lab.pipeline.worker_signals import LeavesSignals


class WorkerStart(LeavesSignals):
    """Makes a worker what the user's functions expect: ``get_worker_info().dataset`` is theirs.

    It also leaves to the main process the signals that are for that.
    """

    def __call__(self, worker_id: int) -> None:
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, (Fetcher, ReseededStream)):
            object.__setattr__(info, "dataset", info.dataset.dataset)  # it is read-only
        super().__call__(worker_id)
