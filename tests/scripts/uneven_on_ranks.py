"""What each process of ``test_uneven_data.py`` runs: trainings on uneven data."""

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
    """A batch sampler of one's own: six samples in batches that one or more ranks take in turn."""

    def __init__(self, dataset: Any) -> None:
        self.samples = len(dataset)

    def __iter__(self) -> Any:
        size = 6 // PartialState().num_processes
        return iter(
            [list(range(n, min(n + size, self.samples))) for n in range(0, self.samples, size)]
        )


@dataclass
class Training:
    """One that is compared with itself on another number of processes."""

    samples: int
    batch_size: int = 6
    """Of the whole job."""
    accumulate: int = 1
    optimizer: str = "sgd"
    make_loader: Callable[[Any, int], Any] = lambda dataset, batch_size: DataLoader(
        dataset, batch_size, shuffle=True
    )
    processor: Callable[[], Any] = lambda: SimpleBatchProcessor.from_callable(loss_of)
    resumes: bool = False
    """Whether it is also stopped and gone on with, after each number of steps."""


def shared_out(dataset: Any, batch_size: int) -> Any:
    """Whole batches of the job's data, of which each rank reads its own by itself."""
    rank, ranks = PartialState().process_index, PartialState().num_processes
    return [
        default_collate([dataset[n] for n in range(begin, min(begin + size, len(dataset)))])
        for begin, size in parts_of(len(dataset), rank, ranks)
    ]


def parts_of(samples: int, rank: int, ranks: int) -> list[tuple[int, int]]:
    """Of steps of six samples: where this rank's begin, and how many it has; the first has most."""
    parts = []
    for step in range(0, samples, 6):
        size = 6 if ranks == 1 else (3, 2, 1)[rank] if ranks == 3 else (4, 2)[rank]
        begin = step + (0 if ranks == 1 else (0, 3, 5)[rank] if ranks == 3 else (0, 4)[rank])
        if begin < samples:
            parts.append((begin, size))
    return parts


class Shard(IterableDataset[Any]):
    """Ten samples for the first rank, fourteen for the second, none for others; keeps its place."""

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
    """Five batches of two for the first rank, and seven for the second."""

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
    """Samples in an order that is drawn, of which each rank takes its part by itself."""

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
    """Samples weigh very differently, and batches what theirs add up to."""

    def forward(self, model: Any, batch: Any) -> Any:
        inputs, targets = batch
        outputs = model(inputs)
        each = (outputs - targets).square().mean(1)
        weights = torch.exp(4 * inputs[:, 0])
        weight = weights.sum()
        return outputs, (each * weights).sum() / weight, weight


class Masked(SimpleBatchProcessor):
    """Few samples count at all; the mean over none is no number. The weight is a plain one."""

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
    # Seven batches, the last of which has two samples: one rank of three has none of them.
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
    """What came of it on this rank; saved, where it is stopped or has such a limit."""
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
            args.requests.stop("to be gone on with", by="test")

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


def go_on(training: Training, accelerator: Accelerator, folder: Path, stop: int) -> dict[str, Any]:
    """The same, stopped after some steps on the way."""
    train(training, accelerator, folder, stop)
    return train(training, accelerator, folder, resume_from=folder)


def go_on_from_a_cut(
    training: Training, accelerator: Accelerator, folder: Path
) -> list[dict[str, Any]]:
    """From where a limit has cut a window, straight on and stopped after some more steps."""
    cut = folder / "cut"
    train(training, accelerator, cut, max_step=4)
    runs = [train(training, accelerator, folder, resume_from=cut)]
    for stop in (5, 8):  # within what is left of the window, and in the next epoch
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
                    results[name].append(go_on(training, accelerator, at, stop))
        for name in ("list", "weighted stream"):  # in windows of three
            results[f"{name}, cut"] = go_on_from_a_cut(TRAININGS[name], accelerator, folder / name)
    torch.save(results, folder / f"rank{accelerator.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
