"""Batches of many structures, counted on one or several ranks; also the script of the ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHooks, SimpleBatchProcessor
from robo_orchard_lab.pipeline.evaluator import Evaluator
from tiny import make_model, weights

SAMPLES = 11
BATCHES = [[0, 1], [2], [3, 4, 5], [6], [7, 8], [9], [10]]
"""Batches of a custom batch sampler, of a list and of a stream."""
BATCH_SIZE = 2
WINDOW = 2


@dataclass
class Batch:
    inputs: torch.Tensor
    targets: torch.Tensor


class Pair(NamedTuple):
    names: list[str]
    inputs: torch.Tensor
    targets: torch.Tensor


def sample(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.linspace(-1, 1, SAMPLES * 6).view(SAMPLES, 6)[index]
    return values[:4], values[4:].square()


class Samples(Dataset[tuple[int, torch.Tensor, torch.Tensor]]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        return (index, *sample(index))


def detection(samples: Sequence[Any]) -> Any:
    """A list of images with three channels, and a list of dicts with their boxes."""
    images = [torch.zeros(3, 5 + i, 4) + x for i, x, _ in samples]
    return images, [{"boxes": torch.zeros(1 + i % 3, 4), "y": y, "id": i} for i, _, y in samples]


def stacked(samples: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([x for _, x, _ in samples]), torch.stack([y for _, _, y in samples])


COLLATED: dict[str, Any] = {
    "detection": detection,
    "dataclass": lambda samples: Batch(*stacked(samples)),
    "strings": lambda samples: [str(i) for i, _, _ in samples],
    "named tuple": lambda samples: Pair([str(i) for i, _, _ in samples], *stacked(samples)),
    "metadata": lambda samples: {"camera": torch.eye(3), "pair": stacked(samples)},
}
"""Function that collates samples, by the kind of batch."""
SOURCES = ("loader", "batch sampler", "list", "stream")


def tensors_of(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of a batch of any kind."""
    if isinstance(batch, (Batch, Pair)):
        return batch.inputs, batch.targets
    if isinstance(batch, dict):
        return batch["pair"]  # type: ignore[no-any-return]  # of "metadata"
    if isinstance(batch, list):
        return stacked([(0, *sample(int(text))) for text in batch])
    images, targets = batch
    return torch.stack([i[0, 0] for i in images]), torch.stack([t["y"] for t in targets])


def loss_of_batch(model: Any, batch: Any) -> tuple[None, torch.Tensor]:
    inputs, targets = tensors_of(batch)
    return None, (model(inputs) - targets).square().mean()


class Stream:
    """An iterable without a length."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def make_data(kind: str, source: str, rank: int = 0, processes: int = 1) -> Iterable[Any]:
    collate = COLLATED[kind]
    if source == "loader":
        return DataLoader(Samples(), BATCH_SIZE, collate_fn=collate)
    if source == "batch sampler":
        return DataLoader(Samples(), batch_sampler=BATCHES, collate_fn=collate)
    data = Samples()
    batches = [collate([data[i] for i in batch]) for batch in BATCHES[rank::processes]]
    return batches if source == "list" else Stream(batches)


def windows_of(source: str, processes: int) -> list[list[int]]:
    """Samples of each update."""
    if source == "loader":
        size = BATCH_SIZE * WINDOW * processes
        return [list(range(SAMPLES))[i : i + size] for i in range(0, SAMPLES, size)]
    size = WINDOW * processes
    return [list(chain(*BATCHES[i : i + size])) for i in range(0, len(BATCHES), size)]


def plain(source: str, processes: int) -> list[torch.Tensor]:
    """The weights after a plain loop with one batch for each window."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for window in windows_of(source, processes):
        optimizer.zero_grad()
        loss_of_batch(model, [str(i) for i in window])[1].backward()
        optimizer.step()
    return weights(model)


def train(accelerator: Accelerator, kind: str, source: str) -> dict[str, Any]:
    """The weights after an epoch, and the counts of all steps."""
    sizes: list[int] = []
    hooks = PipelineHooks()
    hooks.on_step.after(lambda args: sizes.append(args.batch_size))
    model = make_model()
    HookBasedTrainer(
        accelerator,
        model,
        make_data(kind, source, accelerator.process_index, accelerator.num_processes),
        SimpleBatchProcessor.from_callable(loss_of_batch),
        torch.optim.SGD(model.parameters(), lr=0.1),
        hooks=hooks,
        max_epoch=1,
    )()
    return {"weights": weights(model), "sizes": sizes}


def evaluate(accelerator: Accelerator, kind: str, source: str) -> float:
    """The mean loss of the fresh model; every rank has all batches of a list."""
    processor = SimpleBatchProcessor.from_callable(loss_of_batch, need_backward=False)
    loaders = {"val": make_data(kind, source)}
    return Evaluator(make_model(), processor, loaders, accelerator=accelerator).evaluate()[
        "val/loss"
    ]


def main(folder: Path) -> None:
    torch.set_default_dtype(torch.float64)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=WINDOW)
    found = {
        (kind, source): train(accelerator, kind, source)
        | {"val/loss": evaluate(accelerator, kind, source)}
        for kind in COLLATED
        for source in SOURCES
    }
    torch.save(found, folder / f"rank{accelerator.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
