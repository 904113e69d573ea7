"""What a worker does before it loads."""

from __future__ import annotations

from collections.abc import Callable

from torch.utils.data import get_worker_info

from robo_orchard_lab.pipeline.data.fetching import Fetcher
from robo_orchard_lab.pipeline.data.reseeded_stream import ReseededStream


class WorkerStart:
    """Makes a worker what the user's functions expect: ``get_worker_info().dataset`` is theirs."""

    def __init__(self, worker_init_fn: Callable[[int], None] | None) -> None:
        self._worker_init_fn = worker_init_fn

    def __call__(self, worker_id: int) -> None:
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, (Fetcher, ReseededStream)):
            object.__setattr__(info, "dataset", info.dataset.dataset)  # it is read-only
        if self._worker_init_fn is not None:
            self._worker_init_fn(worker_id)
