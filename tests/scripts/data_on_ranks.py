"""Processes of ``test_data_processes.py``: this library's batches and Accelerate's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from launching import end_group
from loaded_data import Drawing, Indices
from robo_orchard_lab.pipeline.data import DataOrder, TrainingData
from robo_orchard_lab.pipeline.data.order import KeyedBy
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.progress import TrainerProgress


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(21))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


LOADERS: dict[str, Callable[[], Any]] = {
    "sequential": lambda: DataLoader(Indices(25), 4),
    "generator": lambda: DataLoader(Indices(27), 4, shuffle=True, generator=generator()),
    "drop_last": lambda: DataLoader(Indices(27), 4, drop_last=True),
    "shuffled": lambda: DataLoader(Indices(27), 4, shuffle=True),
    "stream": lambda: DataLoader(Stream(), 4),
}


def main(folder: Path) -> None:
    accelerators = {
        kind: Accelerator(
            cpu=True,
            dataloader_config=DataLoaderConfiguration(
                split_batches="split" in kind,
                # Else each rank reads all of a stream.
                dispatch_batches=True if "stream" in kind else None,
            ),
        )
        for kind in ("per_rank", "split", "per_rank stream", "split stream")
    }
    accelerator = accelerators["per_rank"]
    rank = accelerator.process_index

    def data_of(loader: Any, prepare: bool = False, kind: str = "per_rank") -> TrainingData:
        if prepare:
            loader = accelerators[kind].prepare(loader)
        return TrainingData(loader, DataOrder(seed=7), accelerators[kind], TrainerProgress())

    result: dict[str, Any] = {}
    for kind in ("per_rank", "split"):
        for name, make in LOADERS.items():
            of_kind = f"{kind} stream" if name == "stream" else kind
            theirs = accelerators[of_kind]
            prepared = theirs.prepare(make())
            ours = [data_of(make(), False, of_kind), data_of(make(), True, of_kind)]
            result[f"{kind} {name}"] = [
                [[batch.tolist() for batch in prepared] for _ in range(2)],
                *([_local_indices(data, e) for e in range(2)] for data in ours),
            ]

    order = DataOrder(seed=7, fast_forward=True)
    for name, make in LOADERS.items():
        progress = TrainerProgress()
        of_kind = accelerators["per_rank stream" if name == "stream" else "per_rank"]
        data = TrainingData(make(), order, of_kind, progress)
        given = data.epoch(0)
        next(given)
        progress.finish_step()
        state, rank_state = data.state_dict(), data.rank_state_dict()
        rest = [batch.tolist() for batch in given]
        data = TrainingData(make(), order, of_kind, progress)
        data.check(state, rank_state)
        data.load_state_dict(state, rank_state)
        result[f"resumed {name}"] = [rest, [batch.tolist() for batch in data.epoch(0, 1)]]

    torch.manual_seed(rank)  # equal seeds would hide a missing broadcast
    loader = DataLoader(Drawing(26), 4, shuffle=True, num_workers=1)
    data = TrainingData(loader, DataOrder(), accelerator, TrainerProgress())
    result["unseeded"] = data.seed
    orders: tuple[KeyedBy, ...] = ("batch", "sample")
    for keyed_by in orders:
        loader = DataLoader(Drawing(32), 4, shuffle=True)
        data = TrainingData(loader, DataOrder(7, keyed_by), accelerator, TrainerProgress())
        result[f"by {keyed_by}"] = [torch.stack(list(b), 1) for b in map(_columns, data.epoch(0))]
    # An order drawn from a generator with a different seed on each rank.
    own = torch.Generator().manual_seed(rank)
    indices = DataLoader(Indices(32), 4, shuffle=True, generator=own)
    data = TrainingData(indices, DataOrder(), accelerator, TrainerProgress())
    result["own"] = [batch.tolist() for batch in data.epoch(0)]
    try:
        sampler: Any = DistributedSampler(Indices(26))
        data_of(DataLoader(Indices(26), 4, sampler=sampler))
    except PipelineConfigError as error:
        result["refused"] = str(error)
    torch.save(result, folder / f"rank{rank}.pt")
    end_group()


def _local_indices(data: TrainingData, epoch_id: int) -> list[list[int]]:
    """Return this rank's indices in each step; empty in a padding step."""
    progress = data._progress
    progress.epoch_id, progress.step_id = epoch_id, 0
    given = []
    for batch in data.epoch(epoch_id):
        indices = data.sample_indices
        assert indices is None or indices == [] or indices == batch.tolist()
        assert indices != [] or (len(batch) == 1 and data.sample_numbers == [])
        given.append(batch.tolist() if indices is None else indices)
        progress.step_id += 1
    return given


def _columns(batch: Any) -> list[torch.Tensor]:
    indices, drawn = batch
    return [indices.double(), *drawn.T]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
