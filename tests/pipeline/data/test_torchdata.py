"""torchdata's StatefulDataLoader, if installed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import IterableDataset

from loaded_data import Drawing, data_of, resumed, same
from robo_orchard_lab.pipeline.progress import TrainerProgress

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it
stateful: Any = pytest.importorskip("torchdata.stateful_dataloader")


class Count(IterableDataset[int]):
    """Dataset that saves how many samples it yielded."""

    def __init__(self) -> None:
        self.given = self.skip = 0

    def __iter__(self) -> Iterator[int]:
        self.given, self.skip = self.skip, 0
        for index in range(self.given, 26):
            self.given += 1
            yield index

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = state["given"]


def loader(kind: str, workers: int) -> Any:
    options: dict[str, Any] = {"batch_size": 4, "num_workers": workers}
    if kind == "index":
        return stateful.StatefulDataLoader(Drawing(), shuffle=True, **options)
    return stateful.StatefulDataLoader(Count(), **options)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["index", "stream"])
def test_run_resumes_at_every_step(kind: str, workers: int) -> None:
    """Map-style data resumes by position, with its augmentation; streams by their state."""
    progress = TrainerProgress()
    data = data_of(loader(kind, workers), progress=progress)
    batches, states = [], []
    for batch in data.epoch(0):
        batches.append(batch)
        progress.finish_step()
        states.append((data.state_dict(), data.rank_state_dict()))
    progress.finish_epoch()
    following = list(data.epoch(1))
    # Of a stream that has given its last batch, torchdata loads the state and never reads it.
    for step_id, (state, rank_state) in enumerate(states[:-1], start=1):
        again = resumed(loader(kind, workers), state, None, rank_state)
        assert same(list(again.epoch(0, step_id)), batches[step_id:])
        assert same(list(again.epoch(1)), following)
