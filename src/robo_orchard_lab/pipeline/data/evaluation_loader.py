"""Batches of an evaluation: checked loaders, divided among the ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeAlias

from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from robo_orchard_core.utils.config.errors import suggest_name
from robo_orchard_lab.pipeline.batch_processor import count_batches
from robo_orchard_lab.pipeline.data.fetching import indexed_seed, seed_generators, seed_rng
from robo_orchard_lab.pipeline.data.loader import batches_of, copy_loader
from robo_orchard_lab.pipeline.data.random_generators import (
    dataset_generators,
    iter_samplers,
    loader_generators,
)
from robo_orchard_lab.pipeline.data.workers import IgnoreSignals, worker_startup
from robo_orchard_lab.pipeline.errors import DataError, PipelineConfigError
from robo_orchard_lab.pipeline.job_log import job_logger

logger = job_logger(__name__)

_END = object()
MaxBatches: TypeAlias = int | Mapping[str, int] | None
"""Limit of batches of each loader, or limits by the names of loaders; None for no limit."""


def check_dataloaders(dataloaders: Any, who: str) -> dict[str, Iterable[Any]]:
    """Return the named loaders of an evaluation as a dict.

    Raises:
        PipelineConfigError: ``dataloaders`` is empty or no mapping from names to iterables.
        DataError: a loader is known to be empty.
    """
    if not isinstance(dataloaders, Mapping):
        raise PipelineConfigError(
            f"{who}: dataloaders must be a mapping from names to loaders, got "
            f"{type(dataloaders).__name__}; write dataloaders={{'val': ...}}"
        )
    if not dataloaders:
        raise PipelineConfigError(f"{who}: dataloaders is empty; write dataloaders={{'val': ...}}")
    for name, loader in dataloaders.items():
        if not isinstance(name, str) or not name:
            raise PipelineConfigError(
                f"{who}: names in dataloaders must be non-empty strings, got {name!r}"
            )
        if not isinstance(loader, Iterable):
            raise PipelineConfigError(
                f"{who}: dataloaders[{name!r}] must be an iterable of batches, "
                f"got {type(loader).__name__}"
            )
        if count_batches(loader) == 0:
            raise _no_batch(name, who)
    return dict(dataloaders)


def check_max_batches(limits: MaxBatches, names: Iterable[str], who: str) -> dict[str, int | None]:
    """Return the limit of batches of each loader.

    Raises:
        PipelineConfigError: a limit is below 1, or of an unknown loader.
    """
    names = list(names)
    given = limits if isinstance(limits, Mapping) else dict.fromkeys(names, limits)
    for name, limit in given.items():
        of = f"max_batches[{name!r}]" if given is limits else "max_batches"
        if name not in names:
            advice = suggest_name(name, names, "expected one of")
            raise PipelineConfigError(
                f"{who}.{of}: there is no loader {name!r}; {advice}", setting=("max_batches", name)
            )
        if (limit is not None or given is limits) and (type(limit) is not int or limit < 1):
            raise PipelineConfigError(
                f"{who}.{of}: expected a number of batches >= 1, found {limit!r}; leave it out to "
                "use all batches"
            )
    return {name: given.get(name) for name in names}


def _no_batch(name: str, who: str) -> DataError:
    return DataError(
        f"{who}: the evaluation loader dataloaders[{name!r}] gave no batch; add data, leave out "
        "drop_last, or replace an iterator, which can be read only once, by an iterable that can "
        "be iterated for every evaluation"
    )


class EvaluationLoader:
    """This rank's batches of one loader, in an order equal on all ranks.

    A plain ``DataLoader`` of a map-style dataset is divided before loading: each rank loads its
    own batches, in workers of its own, also while the loader is iterated elsewhere. Any other
    iterable is read completely by every rank, which keeps every n-th batch.

    Random numbers depend on the seed: the order, and for batch i the numbers drawn in the main
    process while batch i is loaded and used, at any world size. Numbers drawn in workers are
    reproducible at one world size.

    With ``max_batches``, the first batches of the complete job are used, the same at any world
    size.

    Raises:
        PipelineConfigError: the loader is divided among the processes already.
    """

    def __init__(
        self,
        name: str,
        loader: Iterable[Any],
        rank: int,
        processes: int,
        who: str,
        max_batches: int | None = None,
    ) -> None:
        self.name = name
        self._max_batches = max_batches
        self._who = who
        self._rank = rank
        self._processes = processes
        self.generators = loader_generators(loader)
        """Random generators of the loader, its samplers and its dataset, by path."""
        self._dataset_generators = dataset_generators("dataset", getattr(loader, "dataset", None))
        self._order: Iterable[Any] | None = None
        self._has_sample_indices = False
        self._own_batches: list[Any] = []
        self._loader = loader
        _check_undivided(name, loader, processes, who)
        if type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset):
            self._order = batches_of(loader)
            self._has_sample_indices = (
                loader.batch_sampler is not None or type(self._order) is BatchSampler
            )
            key = "sampler" if loader.batch_sampler is None else "batch_sampler"
            options = {key: self._own_batches}
            self._loader = copy_loader(
                loader,
                **(options if key == "batch_sampler" else {"batch_size": None, **options}),
                worker_init_fn=IgnoreSignals(loader.worker_init_fn),
                in_order=True,
                persistent_workers=False,  # their RNGs would outlive an evaluation
            )
        if getattr(getattr(loader, "batch_sampler", None), "drop_last", False):
            logger.warning(
                "%s: dataloaders[%r] has drop_last=True: samples of a shorter last batch are not "
                "evaluated; leave out drop_last",
                who,
                name,
            )

    def batches(
        self, seed: int, *, even: bool = False, limit: int | None = None
    ) -> Iterator[tuple[Any, Sequence[Any] | None]]:
        """Yield this rank's batches, each with its dataset indices; None if unknown.

        Advances the global RNGs and :attr:`generators`; the caller restores them.

        Args:
            seed: seed of all random numbers.
            even: yield equally many batches on all ranks: a rank with fewer repeats another rank's
                batch, without indices: it does not count.
            limit: use only the first batches of the job, as ``max_batches`` does.

        Raises:
            DataError: at the end, on all ranks: no rank had a batch.
        """
        seed_rng(seed, cuda=True)
        seed_generators(self.generators, seed)
        first, stride = 0, 1
        limit = min(filter(None, (limit, self._max_batches)), default=None)
        if self._order is not None:
            # Before the ranks draw different random numbers.
            order = list(islice(self._order, limit))
            self._own_batches[:] = order[self._rank :: self._processes]
            if even and self._lacks_one(len(order)):
                self._own_batches.append(order[0])
            first, stride = self._rank, self._processes
        with worker_startup():
            batches = iter(self._loader)
        index = first
        other: Any = None
        while self._order is not None or limit is None or index < limit:
            batch_seed = indexed_seed(seed, 1 + index)
            seed_rng(batch_seed, cuda=True)
            seed_generators(self._dataset_generators, batch_seed)
            batch = next(batches, _END)
            if batch is _END:
                break
            if self._order is not None:
                indices = self._own_batches[index // self._processes]
                known = indices if self._has_sample_indices else None
                yield batch, known if index < len(order) else ()
            elif index % self._processes == self._rank:
                yield batch, None
            elif even:
                other = batch
            index += stride
        count = index if self._order is None else len(order)
        if count == 0:
            raise _no_batch(self.name, self._who)
        if even and self._order is None and self._lacks_one(count):
            yield other, ()

    def _lacks_one(self, batches: int) -> bool:
        """Return True if another rank has one batch more than this rank."""
        return 0 < batches % self._processes <= self._rank


def _check_undivided(name: str, loader: Any, processes: int, who: str) -> None:
    if processes > 1 and isinstance(loader, (DataLoaderShard, DataLoaderDispatcher)):
        raise PipelineConfigError(
            f"{who}: dataloaders[{name!r}] was prepared by Accelerate, which repeats batches to "
            f"divide them evenly among {processes} processes; give the plain DataLoader"
        )
    for _, sampler in iter_samplers(loader):
        if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
            raise PipelineConfigError(
                f"{who}: dataloaders[{name!r}] has a DistributedSampler, which repeats samples to "
                "divide them evenly; give a DataLoader without a DistributedSampler"
            )
