"""A tiny GAN on random data, trained by named losses for two optimizers, shared by tests."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from robo_orchard_lab.pipeline import NamedSteps, SimpleBatchProcessor
from robo_orchard_lab.pipeline.batch_processor import ForwardResult

CACHES_CASTS = not torch.__version__.startswith("2.8.")
"""True if the trainer's autocast reuses the casts of weights within a batch."""

Batch = tuple[torch.Tensor, torch.Tensor]


def make_model() -> torch.nn.ModuleDict:
    torch.manual_seed(0)
    generator = torch.nn.Sequential(
        torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
    )
    critic = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    return torch.nn.ModuleDict({"g": generator, "d": critic})


def make_batches(count: int = 7, last: int = 4) -> list[Batch]:
    source = torch.Generator().manual_seed(1)
    sizes = [4] * (count - 1) + [last]
    return [
        (torch.randn(n, 2, generator=source), torch.randn(n, 3, generator=source)) for n in sizes
    ]


def loss_d(model: Any, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    good, bad = model["d"](real), model["d"](fake.detach())
    ones, zeros = torch.ones_like(good), torch.zeros_like(bad)
    return binary_cross_entropy_with_logits(good, ones) + binary_cross_entropy_with_logits(
        bad, zeros
    )


def loss_g(model: Any, fake: torch.Tensor) -> torch.Tensor:
    judged = model["d"](fake)
    return binary_cross_entropy_with_logits(judged, torch.ones_like(judged))


class GAN(SimpleBatchProcessor):
    """Named steps: the critic's update precedes the generator's forward pass."""

    def forward(self, model: Any, batch: Batch) -> NamedSteps:
        real, noise = batch
        fake = model["g"](noise)
        yield "d", loss_d(model, real, fake)
        yield "g", loss_g(model, fake)
        return fake.detach()


class JointGAN(SimpleBatchProcessor):
    """One forward pass, and a mapping of losses."""

    def forward(self, model: Any, batch: Batch) -> ForwardResult:
        real, noise = batch
        fake = model["g"](noise)
        return fake.detach(), {"g": loss_g(model, fake), "d": loss_d(model, real, fake)}


def adams(model: Any, lr: float = 0.01) -> dict[str, torch.optim.Optimizer]:
    return {name: torch.optim.Adam(model[name].parameters(), lr) for name in ("g", "d")}
