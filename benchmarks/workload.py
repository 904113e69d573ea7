"""Training run of every contender:

Linear 32-32-10, SGD, StepLR, data in memory. The benchmark times a framework's bookkeeping, so
everything else is minimal and equal for all contenders: weights, batches, optimizer, LR scheduler,
one torch thread. Batches are cut in advance, and the data loader fetches each with one call.
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
    """Two layers that record the start of each forward pass."""

    def __init__(self) -> None:
        super().__init__(
            torch.nn.Linear(FEATURES, FEATURES),
            torch.nn.ReLU(),
            torch.nn.Linear(FEATURES, CLASSES),
        )
        self.forward_began_ns: list[int] = []
        self.clock = perf_counter_ns
        """Clock that times the forward passes."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # the base class's name
        self.forward_began_ns.append(self.clock())
        logits: torch.Tensor = super().forward(input)  # type: ignore[no-untyped-call]  # torch's
        return logits


class BatchesInMemory(Dataset[Batch]):
    """Dataset of `steps` times `BATCH_SIZE` samples, fetched in complete batches.

    The same pool of batches is repeated: large enough for continued learning, small enough for the
    cache.
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
        """Return the batch at the first index; a sequential sampler requests complete batches."""
        return self.batches[indices[0] // BATCH_SIZE % len(self.batches)]


def identity_collate(batch: Batch) -> Batch:
    """Collate function that returns the dataset's finished batches."""
    return batch


@dataclass(frozen=True, slots=True)
class Settings:
    """Kind of a run."""

    steps: int
    """Steps in the run, in one epoch; each is one batch."""
    accumulate: int = 1
    bf16: bool = False
    block_steps: int = BLOCK_STEPS
    """Steps per timed block: a multiple of recurring events, such as logging every 50 steps."""


class Job:
    """Job to be trained from the start: everything except the loop."""

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
            collate_fn=identity_collate,  # type: ignore[arg-type]  # __getitems__ gives no list
        )

    def make_model(self) -> TinyModel:
        """Return the model with the initial weights of every run."""
        return TinyModel()

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return a new optimizer equal to the job's."""
        return torch.optim.SGD(self.model.parameters(), lr=0.1)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean cross entropy of float32 logits."""
        return cross_entropy(logits, labels)

    def weights(self) -> torch.Tensor:
        """Return all weights of the model in one copied row."""
        return torch.cat([weight.detach().flatten() for weight in self.model.parameters()])

    def ns_per_step(self, quantile: float = 0.25) -> float:
        """Return the time of a step: the lower quartile over blocks of steps after a warm-up.

        A block spans from one forward pass to another, so it includes everything a framework does
        in between, and excludes the run's start and end. A block lasts about 2 ms. Another process
        on the core spoils only the interrupted blocks, of which up to three quarters may be spoilt.
        """
        began = self.model.forward_began_ns
        if len(began) != self.settings.steps:
            raise RuntimeError(f"expected {self.settings.steps} forward passes, got {len(began)}")
        marks = torch.tensor(began[WARM_UP_STEPS :: self.settings.block_steps], dtype=torch.int64)
        return float(marks.diff().double().quantile(quantile)) / self.settings.block_steps
