"""The batches of an evaluation: each of them once, on one of the ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from robo_orchard_lab.pipeline.batch_processor import count_batches
from robo_orchard_lab.pipeline.data.fetching import IgnoreSignals, worker_startup
from robo_orchard_lab.pipeline.data.loader import copy_loader
from robo_orchard_lab.pipeline.data.rng import (
    dataset_generators,
    indexed_seed,
    loader_generators,
    seed_generators,
)
from robo_orchard_lab.pipeline.errors import DataError, PipelineConfigError
from robo_orchard_lab.pipeline.isolation import seed_random_state
from robo_orchard_lab.pipeline.job_log import job_logger

logger = job_logger(__name__)

_END = object()


def check_dataloaders(dataloaders: Any, who: str) -> dict[str, Iterable[Any]]:
    """The loaders of an evaluation by name.

    Raises:
        PipelineConfigError: there is none, or they are no mapping from names to iterables.
        DataError: one is known to be empty.
    """
    if not isinstance(dataloaders, Mapping):
        raise PipelineConfigError(
            f"{who}: dataloaders must be a mapping from names to loaders, got "
            f"{type(dataloaders).__name__}; write dataloaders={{'val': ...}}"
        )
    if not dataloaders:
        raise PipelineConfigError(
            f"{who}: dataloaders is empty, so that there is nothing to evaluate on; "
            "write dataloaders={'val': ...}"
        )
    for name, loader in dataloaders.items():
        if not isinstance(name, str) or not name:
            raise PipelineConfigError(
                f"{who}: the names in dataloaders must be texts that aren't empty, got {name!r}"
            )
        if not isinstance(loader, Iterable):
            raise PipelineConfigError(
                f"{who}: dataloaders[{name!r}] must be an iterable of batches, "
                f"got {type(loader).__name__}"
            )
        if count_batches(loader) == 0:
            raise empty_loader(name, who)
    return dict(dataloaders)


def empty_loader(name: str, who: str) -> DataError:
    """The error that a loader has no batch."""
    return DataError(
        f"{who}: the evaluation loader dataloaders[{name!r}] gave no batch; give it data, and if "
        "drop_last is set, leave that out. An iterator can be read only once: pass an iterable "
        "that can be iterated for every evaluation"
    )


class EvaluationLoader:
    """One loader's batches of this rank: every so many-th of an order that all ranks share.

    A plain ``DataLoader`` of a dataset with an index is divided before it loads: each rank loads
    its own batches, in workers of its own, also where the same loader is being iterated
    elsewhere. Of any other iterable every rank reads all batches and takes its own.

    What is drawn at random is that of the seed: the order, what the main process draws while it
    loads batch i, and what the body draws that uses it, whatever the number of processes. What
    workers draw is fixed for a number of processes.

    Args:
        name: of the loader.
        loader: any iterable of batches that can be iterated for every evaluation.
        rank: this process's.
        processes: how many there are.
        who: evaluates, for errors.

    Raises:
        PipelineConfigError: the loader gives each rank batches of its own already.
    """

    def __init__(
        self, name: str, loader: Iterable[Any], rank: int, processes: int, who: str
    ) -> None:
        self._name = name
        self._who = who
        self._rank = rank
        self._processes = processes
        self.generators = loader_generators(loader)
        """The random generators that it, its samplers and its dataset keep, by name."""
        self._of_dataset = dataset_generators("dataset", getattr(loader, "dataset", None))
        self._order: Iterable[Any] | None = None
        self._picked = _Picked()
        self._loader = loader
        _check_undivided(name, loader, processes, who)
        if type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset):
            self._order = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
            self._loader = _picking(loader, self._picked)
        if getattr(getattr(loader, "batch_sampler", None), "drop_last", False):
            logger.warning(
                "%s: dataloaders[%r] has drop_last=True, so that samples of a last, shorter batch "
                "are not evaluated; leave it out",
                who,
                name,
            )

    def batches(self, seed: int, *, even: bool = False) -> Iterator[tuple[Any, bool]]:
        """This rank's batches, which may be none, each with whether it counts.

        The random state is moved; that is for the caller to restore.

        Args:
            seed: of what is random.
            even: whether every rank is to have the same number of batches; one that has a batch
                less gets another rank's at the end, which does not count.

        Raises:
            DataError: at its end, on every rank alike: there was no batch for any of them.
        """
        seed_random_state(seed, stream=0)
        seed_generators(self.generators, seed)
        first, stride = 0, 1
        if self._order is not None:
            order = list(self._order)  # before any rank draws anything else
            self._picked.items = order[self._rank :: self._processes]
            if even and self._lacks_one(len(order)):
                self._picked.items.append(order[0])
            first, stride = self._rank, self._processes
        with worker_startup():
            batches = iter(self._loader)
        index = first
        other: Any = None
        while True:
            seed_random_state(seed, stream=1 + index)
            seed_generators(self._of_dataset, indexed_seed(seed, 1 + index))
            batch = next(batches, _END)
            if batch is _END:
                break
            if self._order is not None:
                yield batch, index < len(order)
            elif index % self._processes == self._rank:
                yield batch, True
            elif even:
                other = batch
            index += stride
        count = index if self._order is None else len(order)
        if count == 0:
            raise empty_loader(self._name, self._who)
        if even and self._order is None and self._lacks_one(count):
            yield other, False

    def _lacks_one(self, batches: int) -> bool:
        """Whether another rank has one more of so many batches of all."""
        return 0 < batches % self._processes <= self._rank


class _Picked:
    """A sampler of what is put into it."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def _picking(loader: DataLoader[Any], picked: _Picked) -> DataLoader[Any]:
    """The same loader, but of the batches that are picked."""
    batches = loader.batch_sampler is not None
    chosen = {"batch_sampler": picked} if batches else {"batch_size": None, "sampler": picked}
    return copy_loader(
        loader,
        **chosen,
        worker_init_fn=IgnoreSignals(loader.worker_init_fn),
        persistent_workers=False,  # their random state would outlive an evaluation
    )


def _check_undivided(name: str, loader: Any, processes: int, who: str) -> None:
    if processes > 1 and isinstance(loader, (DataLoaderShard, DataLoaderDispatcher)):
        raise PipelineConfigError(
            f"{who}: dataloaders[{name!r}] was prepared by Accelerate, which divides the batches "
            f"among the {processes} processes and repeats some to make them even; give the plain "
            "DataLoader, which is divided here without repeats"
        )
    samplers = (
        getattr(loader, "sampler", None),
        getattr(getattr(loader, "batch_sampler", None), "sampler", None),
    )
    if any(isinstance(s, DistributedSampler) and s.num_replicas > 1 for s in samplers):
        raise PipelineConfigError(
            f"{who}: dataloaders[{name!r}] has a DistributedSampler, which repeats samples to make "
            "the processes' shares even; give a DataLoader without it, which is divided here "
            "without repeats"
        )
