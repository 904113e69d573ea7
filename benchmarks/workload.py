"""The training run that every contender performs: Linear 32-32-10, SGD, StepLR, data in memory.

What is timed is a framework's bookkeeping, so everything else is as small as it gets and the same
for all: weights, batches, optimizer, schedule, one torch thread. Batches are cut beforehand, and
the data loader fetches each with one call.
"""

from dataclasses import dataclass
from time import perf_counter_ns
from typing import TypeAlias

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

BATCH_SIZE = 16
FEATURES, CLASSES = 32, 10
SCHEDULE_STEP_SIZE, SCHEDULE_GAMMA = 100, 0.9  # in optimizer steps
WARM_UP_STEPS = 100
BLOCK_STEPS = 20  # a multiple of every accumulation window

Batch: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Inputs (16, 32) and class labels (16,)."""


class TinyModel(torch.nn.Sequential):
    """Two layers, and a note of when each forward pass began."""

    def __init__(self) -> None:
        super().__init__(
            torch.nn.Linear(FEATURES, FEATURES),
            torch.nn.ReLU(),
            torch.nn.Linear(FEATURES, CLASSES),
        )
        self.forward_began_ns: list[int] = []
        self.clock = perf_counter_ns
        """What it is noted by."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # the base class's name
        self.forward_began_ns.append(self.clock())
        logits: torch.Tensor = super().forward(input)  # type: ignore[no-untyped-call]  # torch's
        return logits


class BatchesInMemory(Dataset[Batch]):
    """`steps` times `BATCH_SIZE` samples, of which a loader gets whole batches at a time.

    A pool of batches is passed over again and again: enough of them that learning goes on, and
    few enough that they stay in the cache.
    """

    def __init__(self, steps: int, pool: int = 256) -> None:
        self.samples = steps * BATCH_SIZE
        generator = torch.Generator().manual_seed(1)
        self.batches: list[Batch] = [
            (
                torch.randn(BATCH_SIZE, FEATURES, generator=generator),
                torch.randint(CLASSES, (BATCH_SIZE,), generator=generator),
            )
            for _ in range(min(pool, steps))
        ]

    def __len__(self) -> int:
        return self.samples

    def __getitems__(self, indices: list[int]) -> Batch:
        """The batch that begins at the first index; a sequential sampler asks for whole ones."""
        return self.batches[indices[0] // BATCH_SIZE % len(self.batches)]


def as_it_is(batch: Batch) -> Batch:
    """The collate function: the dataset hands out finished batches."""
    return batch


@dataclass(frozen=True, slots=True)
class Settings:
    """What kind of run it is."""

    steps: int
    """Steps in the run, in one epoch; each is one batch."""
    accumulate: int = 1
    bf16: bool = False
    block_steps: int = BLOCK_STEPS
    """What is timed together: a multiple of whatever recurs, such as logging every 50 steps."""


class Job:
    """One run to be trained from the start: everything but the loop."""

    def __init__(self, settings: Settings) -> None:
        torch.manual_seed(0)
        self.settings = settings
        self.model = self.make_model()
        self.optimizer = self.make_optimizer()
        self.scheduler = torch.optim.lr_scheduler.StepLR(
            self.optimizer, step_size=SCHEDULE_STEP_SIZE, gamma=SCHEDULE_GAMMA
        )
        self.dataset = BatchesInMemory(settings.steps)
        self.loader: DataLoader[Batch] = DataLoader(
            self.dataset,
            batch_size=BATCH_SIZE,
            collate_fn=as_it_is,  # type: ignore[arg-type]  # __getitems__ gives no list
        )

    def make_model(self) -> TinyModel:
        """The model, with the weights that every run begins with."""
        return TinyModel()

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Another optimizer like the job's."""
        return torch.optim.SGD(self.model.parameters(), lr=0.1)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean cross entropy of float32 logits."""
        return cross_entropy(logits, labels)

    def weights(self) -> torch.Tensor:
        """All weights of the model in one copied row."""
        return torch.cat([weight.detach().flatten() for weight in self.model.parameters()])

    def ns_per_step(self, quantile: float = 0.25) -> float:
        """What a step took: the lower quartile over blocks of steps, after some to warm up.

        From one forward pass to the one a block later: a whole number of steps, whatever a
        framework does between two forward passes, without its start and its end. A block lasts
        some 2 ms. Where another process takes the core for its turn, it spoils the blocks that it
        interrupts, and up to three quarters of them may be spoilt.
        """
        began = self.model.forward_began_ns
        if len(began) != self.settings.steps:
            raise RuntimeError(f"expected {self.settings.steps} forward passes, got {len(began)}")
        marks = torch.tensor(began[WARM_UP_STEPS :: self.settings.block_steps], dtype=torch.int64)
        return float(marks.diff().double().quantile(quantile)) / self.settings.block_steps
