"""Script of ``test_uneven_data.py`` on each rank: trainings on uneven data."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch.utils.data import DataLoader, IterableDataset, Sampler, Subset, default_collate

from robo_orchard_lab.pipeline import (
    HookBasedTrainer,
    PipelineHookArgs,
    PipelineHooks,
    SimpleBatchProcessor,
)
from robo_orchard_lab.pipeline.data import DataOrder
from robo_orchard_lab.pipeline.hooks import (
    GradientClippingHookConfig,
    LossTrackerConfig,
    MetricsLoggerConfig,
)
from robo_orchard_lab.pipeline.hooks.mixin import HookContext
from tiny import loss_of, make_loader, make_model

Optimizer = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


class SixOf(Sampler[list[int]]):
    """A user's batch sampler: six samples per step in batches for one or more ranks."""

    def __init__(self, dataset: Any) -> None:
        self.samples = len(dataset)

    def __iter__(self) -> Any:
        size = 6 // PartialState().num_processes
        return iter(
            [list(range(n, min(n + size, self.samples))) for n in range(0, self.samples, size)]
        )


@dataclass
class Training:
    """A training compared with itself at another world size."""

    samples: int
    batch_size: int = 6
    """Global batch size."""
    accumulate: int = 1
    optimizer: str = "sgd"
    make_loader: Callable[[Any, int], Any] = lambda dataset, batch_size: DataLoader(
        dataset, batch_size, shuffle=True
    )
    processor: Callable[[], Any] = lambda: SimpleBatchProcessor.from_callable(loss_of)
    resumes: bool = False
    """True if the training is also stopped and resumed."""


def shared_out(dataset: Any, batch_size: int) -> Any:
    """Return this rank's batches of the job's data, divided by hand."""
    rank, ranks = PartialState().process_index, PartialState().num_processes
    return [
        default_collate([dataset[n] for n in range(begin, min(begin + size, len(dataset)))])
        for begin, size in parts_of(len(dataset), rank, ranks)
    ]


def parts_of(samples: int, rank: int, ranks: int) -> list[tuple[int, int]]:
    """Return begin and size of this rank's part of each step of six samples."""
    parts = []
    for step in range(0, samples, 6):
        size = 6 if ranks == 1 else (3, 2, 1)[rank] if ranks == 3 else (4, 2)[rank]
        begin = step + (0 if ranks == 1 else (0, 3, 5)[rank] if ranks == 3 else (0, 4)[rank])
        if begin < samples:
            parts.append((begin, size))
    return parts


class Shard(IterableDataset[Any]):
    """Iterable dataset with 10 samples on rank 0, 14 on rank 1, none on others, and a position."""

    def __init__(self, dataset: Any, stateful: bool) -> None:
        rank = PartialState().process_index
        self.samples = [dataset[n] for n in (range(10), range(10, 24), ())[rank]]
        self.place = 0
        if stateful:
            self.state_dict = lambda: {"place": self.place}
            self.load_state_dict = lambda state: setattr(self, "place", state["place"])

    def __iter__(self) -> Any:
        while self.place < len(self.samples):
            self.place += 1
            yield self.samples[self.place - 1]
        self.place = 0


def five_and_seven(kind: str) -> Callable[[Any, int], Any]:
    """Return a loader with five batches of two on rank 0, and seven on rank 1."""

    def make(dataset: Any, batch_size: int) -> Any:
        if PartialState().num_processes == 1:
            firsts, seconds = (
                DataLoader(Subset(dataset, r), 2) for r in (range(10), range(10, 24))
            )
            pairs = zip_longest(map(tuple, firsts), map(tuple, seconds))
            return [tuple(map(torch.cat, zip(*filter(None, pair), strict=True))) for pair in pairs]
        loader = DataLoader(Shard(dataset, kind == "stateful"), 2)
        return list(loader) if kind == "list" else loader

    return make


class Shuffled(IterableDataset[Any]):
    """Iterable dataset in random order, of which each rank reads its own part."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Any:
        rank, ranks = PartialState().process_index, PartialState().num_processes
        order = torch.randperm(len(self.dataset)).tolist()
        return iter([self.dataset[n] for n in order[rank::ranks]])


class Counting(SimpleBatchProcessor):
    def forward(self, model: Any, batch: Any) -> Any:
        return loss_of(model, batch)

    def count_samples(self, batch: Any) -> int:
        return len(batch[0])


class Weighted(SimpleBatchProcessor):
    """Batch processor with very different sample weights, summed per batch."""

    def forward(self, model: Any, batch: Any) -> Any:
        inputs, targets = batch
        outputs = model(inputs)
        each = (outputs - targets).square().mean(1)
        weights = torch.exp(4 * inputs[:, 0])
        weight = weights.sum()
        return outputs, (each * weights).sum() / weight, weight


class Masked(SimpleBatchProcessor):
    """Batch processor with few counted samples; the mean over none is NaN."""

    def forward(self, model: Any, batch: Any) -> Any:
        inputs, _ = batch
        outputs = model(inputs)
        classes = torch.where(inputs[:, 0] > 1, 1, -100)
        loss = torch.nn.functional.cross_entropy(outputs, classes)
        return outputs, loss, int((classes != -100).sum())


TRAININGS = {
    "weighted": Training(37, processor=Weighted),
    "weighted, accumulated": Training(38, accumulate=3, processor=Weighted, resumes=True),
    "weighted stream": Training(
        24, accumulate=3, processor=Weighted, make_loader=five_and_seven("stream"), resumes=True
    ),
    "masked": Training(38, processor=Masked),
    "masked, accumulated": Training(38, accumulate=2, processor=Masked, optimizer="adamw"),
    "even": Training(24),
    # Seven batches, the last with two samples: one of three ranks gets none.
    "short last batch": Training(38, accumulate=3),
    "short last batch, adamw": Training(38, accumulate=3, optimizer="adamw"),
    "one step of two": Training(37, accumulate=1, optimizer="adamw"),
    "fewer samples than ranks": Training(1),
    "counted": Training(38, accumulate=3, processor=Counting),
    "counted one by one": Training(37, processor=Counting),
    "own batches": Training(
        37, accumulate=2, make_loader=lambda data, size: DataLoader(data, batch_sampler=SixOf(data))
    ),
    "lists": Training(38, accumulate=3, make_loader=shared_out),
    "lists one by one": Training(38, make_loader=shared_out),
    "nothing for some ranks": Training(2, make_loader=shared_out),
    "stateful stream": Training(24, make_loader=five_and_seven("stateful"), resumes=True),
    "stream": Training(24, accumulate=2, make_loader=five_and_seven("stream"), resumes=True),
    "list": Training(24, accumulate=3, make_loader=five_and_seven("list"), resumes=True),
    "shuffled stream": Training(
        36, make_loader=lambda data, size: DataLoader(Shuffled(data), size)
    ),
    "drop_last": Training(
        28, make_loader=lambda data, size: DataLoader(data, size, drop_last=True)
    ),
}


def train(
    training: Training,
    accelerator: Accelerator,
    folder: Path,
    stop: int | None = None,
    resume_from: Path | None = None,
    max_step: int | None = None,
) -> dict[str, Any]:
    """Train on this rank and return the results; save if stopped or limited by max_step."""
    torch.manual_seed(3)  # the seed of the order
    loader = make_loader(1, training.samples)
    model = make_model()
    optimizer = OPTIMIZERS[training.optimizer](model.parameters())
    steps: list[dict[str, Any]] = []

    def note(args: PipelineHookArgs) -> None:
        numbers = args.sample_numbers
        steps.append(
            {
                "numbers": None if numbers is None else list(numbers),
                "indices": args.sample_indices,
                "filler": args.is_padding_step,
                "size": args.batch_size,
                "total": args.run.steps_per_epoch,
                "ends": args.at_accumulation_boundary,
                "divisor": args.loss_divisor,
            }
        )
        if args.global_step_id + 1 == stop:
            args.requests.stop("to be resumed", by="test")

    losses: list[Any] = []
    hooks = PipelineHooks("notes")
    hooks.register_hook("on_step", HookContext.from_callable(after=note))
    hooks.register_hook(
        "on_loop", HookContext.from_callable(before=lambda args: args.metrics.listen(losses.append))
    )
    accelerator.gradient_accumulation_steps = training.accumulate
    trainer = HookBasedTrainer(
        accelerator,
        model,
        training.make_loader(loader.dataset, training.batch_size // accelerator.num_processes),
        training.processor(),
        optimizer,
        hooks=[
            hooks,
            LossTrackerConfig(),
            MetricsLoggerConfig(every="1 epoch"),
            GradientClippingHookConfig(max_norm=0.5),
        ],
        max_step=max_step,
        max_epoch=2,
        resume_from=resume_from,
        data_order=DataOrder(fast_forward=True),
    )
    trainer()
    if stop is not None or max_step is not None:
        trainer.save_checkpoint(folder)
    return {
        "weights": torch.cat([p.detach().flatten() for p in model.parameters()]),
        "steps": steps,
        "losses": {
            value.name: value.value
            for value in losses[-1].values
            if value.name.startswith(("loss", "grad"))
        }
        if losses
        else {},
        "progress": trainer.progress.state_dict(),
    }


def stop_and_resume(
    training: Training, accelerator: Accelerator, folder: Path, stop: int
) -> dict[str, Any]:
    """Train with a stop and a resume, and return the results."""
    train(training, accelerator, folder, stop)
    return train(training, accelerator, folder, resume_from=folder)


def resume_from_a_cut(
    training: Training, accelerator: Accelerator, folder: Path
) -> list[dict[str, Any]]:
    """Resume from a window cut by a limit, without and with further stops."""
    cut = folder / "cut"
    train(training, accelerator, cut, max_step=4)
    runs = [train(training, accelerator, folder, resume_from=cut)]
    for stop in (5, 8):  # within the cut window, and in the next epoch
        at = folder / f"cut {stop}"
        train(training, accelerator, at, stop, resume_from=cut)
        runs.append(train(training, accelerator, folder, resume_from=at))
    return runs


def main(folder: Path) -> None:
    torch.set_default_dtype(torch.float64)
    accelerator = Accelerator(cpu=True)
    results = {
        name: [train(training, accelerator, folder) for _ in range(2)]
        for name, training in TRAININGS.items()
    }
    if accelerator.num_processes > 1:
        for name, training in TRAININGS.items():
            if training.resumes:
                for stop in (3, 4, 6):
                    at = folder / f"{name} {stop}"
                    results[name].append(stop_and_resume(training, accelerator, at, stop))
        for name in ("list", "weighted stream"):  # in windows of three
            results[f"{name}, cut"] = resume_from_a_cut(TRAININGS[name], accelerator, folder / name)
    torch.save(results, folder / f"rank{accelerator.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
