"""Cost of the exact data order over the plain DataLoader, and of a resume over a start.

Both read the same dataset in shuffled order with equal options. A loader's figure is the time of
512 samples after the first batch, when workers have started, as the lower quartile of an epoch's
blocks. A resume's figure is the time to the first batch, the shortest of three.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from statistics import quantiles
from time import perf_counter
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import skip_first_batches
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

from benchmarks.environment import describe
from benchmarks.report import Report, Row, Table
from benchmarks.timing import interleave
from robo_orchard_lab.pipeline.data import DataOrder, KeyedBy, TrainingData
from robo_orchard_lab.pipeline.progress import TrainerProgress

PLAIN = "plain DataLoader"
OURS = "exact order"
TOLD = "exact order, nothing drawn"
PREPARED = "Accelerate's loader (order not exact)"
# A bar of 0.97 of the throughput is a bar of 1 / 0.97 of the time.
BAR_IMAGES = round(1 / 0.97, 3)
BAR_TENSORS = round(1 / 0.93, 3)
BAR_RESUME = 1.1
FAR = 1_000_000
BATCH_SIZE = 32
BLOCK = 512
"""How many samples are timed at once."""


class Images(Dataset[tuple[torch.Tensor, int]]):
    """Images of 256 x 256 in memory, randomly cropped, flipped and scaled: 0.5 ms each."""

    def __init__(self, length: int) -> None:
        self._picture = torch.randint(0, 256, (3, 256, 256), dtype=torch.uint8)
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        top, left = random.randrange(32), random.randrange(32)
        picture = self._picture[:, top : top + 224, left : left + 224]
        if torch.rand(()) < 0.5:
            picture = picture.flip(-1)
        return (picture.float() - 120.0) / 60.0, index


class Rows(Dataset[tuple[torch.Tensor, ...]]):
    """Rows of tensors in a custom dataset of unknown kind."""

    def __init__(self, *columns: torch.Tensor) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return len(self._columns[0])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return tuple(column[index] for column in self._columns)


class Numbers(Dataset[int]):
    """Indexable dataset without memory."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:
        return index


def run(*, quick: bool) -> Report:
    rounds = 2 if quick else 25
    count = 2_048 if quick else 16_384
    columns = torch.randn(count, 32), torch.randint(10, (count,))
    tensors, images = TensorDataset(*columns), Images(1_216 if quick else 3_200)
    tables = [
        _throughput(
            "Images, by 2 workers",
            lambda: DataLoader(images, BATCH_SIZE, shuffle=True, num_workers=2),
            bar=BAR_IMAGES,
            rounds=1 if quick else 11,
        ),
        _throughput(
            "Tensors in memory, by sample, without workers",
            lambda: DataLoader(tensors, BATCH_SIZE, shuffle=True),
            bar=BAR_TENSORS,
            rounds=rounds,
        ),
        _throughput(
            "Tensors in memory, by batch, without workers",
            lambda: DataLoader(tensors, None, sampler=_shuffled_batches(tensors)),
            bar=BAR_TENSORS,
            rounds=rounds,
            prepared=False,  # Accelerate can't prepare it
        ),
        _throughput(
            "Tensors in a dataset of one's own, by sample, without workers",
            lambda: DataLoader(Rows(*columns), BATCH_SIZE, shuffle=True),
            bar=BAR_TENSORS,
            rounds=rounds,
            told=True,
            note="it may draw, so that each batch is seeded for, and the process's own random "
            'streams are put aside, unless keyed_by="none" says that it does not',
        ),
        _resumes(rounds=1 if quick else 25),
    ]
    return Report("loading", tables, environment=describe(["robo-orchard-hooks", "torch"]))


def _shuffled_batches(dataset: TensorDataset) -> BatchSampler:
    return BatchSampler(RandomSampler(dataset), BATCH_SIZE, drop_last=False)


def _throughput(
    title: str,
    make: Callable[[], DataLoader[Any]],
    *,
    bar: float,
    rounds: int,
    prepared: bool = True,
    told: bool = False,
    note: str = "",
) -> Table:
    contenders: dict[str, Callable[[], float]] = {
        PLAIN: lambda: _seconds_per_sample(make()),
        OURS: lambda: _seconds_per_sample(_ordered(make()).epoch(0)),
    }
    if told:
        contenders[TOLD] = lambda: _seconds_per_sample(_ordered(make(), "none").epoch(0))
    if prepared:
        contenders[PREPARED] = lambda: _seconds_per_sample(Accelerator(cpu=True).prepare(make()))
    samples = interleave(contenders, reference=PLAIN, rounds=rounds)
    rows = [
        Row.of(
            name,
            values,
            reference=samples.references.get(name),
            bar=bar if name == OURS else None,
            scale=1e6,
        )
        for name, values in samples.values.items()
    ]
    return Table(title, "us per sample", rows, notes=[note] if note else [])


def _seconds_per_sample(batches: Iterable[Any]) -> float:
    given: Iterator[Any] = iter(batches)
    next(given)
    blocks = []
    count = 0
    begin = perf_counter()
    for batch in given:
        count += len(batch[0])
        if count >= BLOCK:
            now = perf_counter()
            blocks.append((now - begin) / count)
            begin, count = now, 0
    # Other processes only ever add time.
    return quantiles(blocks, n=4, method="inclusive")[0]


def _ordered(loader: DataLoader[Any], keyed_by: KeyedBy = "batch") -> TrainingData:
    order = DataOrder(seed=1, keyed_by=keyed_by)
    return TrainingData(loader, order, Accelerator(cpu=True), TrainerProgress())


def _resumes(*, rounds: int) -> Table:
    dataset = Numbers(2 * FAR)
    size = 10

    def loader() -> DataLoader[Any]:
        return DataLoader(dataset, size, shuffle=True)

    def ours(sample: int) -> None:
        next(_ordered(loader()).epoch(0, sample // size))

    def theirs(sample: int) -> None:
        next(iter(skip_first_batches(loader(), sample // size)))

    start = "from the start"
    contenders: dict[str, Callable[[], float]] = {
        start: partial(_shortest, ours, 0),
        "at sample 10": partial(_shortest, ours, 10),
        f"at sample {FAR:,}": partial(_shortest, ours, FAR),
        "Accelerate's skip_first_batches, 0": partial(_shortest, theirs, 0),
        f"Accelerate's skip_first_batches, {FAR:,}": partial(_shortest, theirs, FAR),
    }
    samples = interleave(contenders, reference=start, rounds=rounds)
    rows = [
        Row.of(
            name,
            values,
            reference=samples.references.get(name),
            bar=BAR_RESUME if name.startswith("at ") else None,
            scale=1e3,
        )
        for name, values in samples.values.items()
    ]
    return Table("First batch of a shuffled epoch of 2,000,000 samples", "ms", rows)


def _shortest(begin_at: Callable[[int], None], sample: int) -> float:
    times = []
    for _ in range(3):
        begin = perf_counter()
        begin_at(sample)
        times.append(perf_counter() - begin)
    return min(times)
