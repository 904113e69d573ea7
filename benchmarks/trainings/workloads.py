"""Models and data of the trainings, equal for all contenders.

The samples are shuffled in advance and read in their order, so that all contenders train on the
same batches.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

LR_FACTOR = 0.5  # after each epoch
STATE, ACTIONS, CHUNK = 39, 4, 8  # sizes of Meta-World's observations and actions
CHARACTERS, CONTEXT = 256, 64
IMAGE_SIZE = 16


@dataclass(frozen=True, slots=True)
class Size:
    """Size of a training, in batches."""

    training: int
    evaluation: int
    log_every: int
    epochs: int = 2


@dataclass(frozen=True, slots=True)
class Workload:
    """Kind of training."""

    title: str
    full: Size
    quick: Size
    batch_size: int
    make_model: Callable[[bool], nn.Module]
    """Returns the model, a smaller one if the argument is True."""
    make_samples: Callable[[int], Any]
    """Returns a TensorDataset or a list of this many samples."""
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    loss: Callable[[Any, Any], torch.Tensor]
    """Loss of a model on a batch."""
    accumulate: int = 1
    bf16: bool = False
    """Autocast, if the CPU has instructions for bf16."""


class Job:
    """Training from the start: everything except the loop."""

    def __init__(self, workload: Workload, folder: Path, *, quick: bool) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.size = size = workload.quick if quick else workload.full
        self.batch_size, self.accumulate = workload.batch_size, workload.accumulate
        self.bf16 = workload.bf16 and has_bf16()
        self.loss = workload.loss
        self.model = workload.make_model(quick)
        self.make_optimizer = partial(workload.make_optimizer, [*self.model.parameters()])
        self.optimizer = self.make_optimizer()
        self.epoch_updates = size.training // self.accumulate
        self.scheduler = torch.optim.lr_scheduler.StepLR(
            self.optimizer, step_size=self.epoch_updates, gamma=LR_FACTOR
        )
        count = size.training * self.batch_size
        samples = workload.make_samples(count + size.evaluation * self.batch_size)
        self.training_set = _part(samples, slice(count))
        self.evaluation_set = _part(samples, slice(count, None))
        self.training_loader = self.make_loader(self.training_set)
        self.evaluation_loader = self.make_loader(self.evaluation_set)

    def make_loader(self, samples: Dataset[Any], batches: int = 1) -> DataLoader[Any]:
        """Return a loader that joins this many of the job's batches to one."""
        return DataLoader(samples, batch_size=self.batch_size * batches)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of the job's precision."""
        return torch.autocast("cpu", torch.bfloat16) if self.bf16 else nullcontext()

    def log(self, **values: Any) -> None:
        """Append a line to a log, for frameworks that write none to a file."""
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def has_bf16() -> bool:
    """Return True if the CPU has instructions for bf16."""
    cpu_info = Path("/proc/cpuinfo")
    flags = cpu_info.read_text(encoding="utf-8") if cpu_info.exists() else platform.processor()
    return "bf16" in flags


def _part(samples: Any, part: slice) -> Any:
    if isinstance(samples, TensorDataset):
        return TensorDataset(*(tensor[part] for tensor in samples.tensors))
    return samples[part]


def _classification_loss(model: Any, batch: Sequence[torch.Tensor]) -> torch.Tensor:
    inputs, labels = batch
    return functional.cross_entropy(model(inputs), labels)


def _resnet(small: bool) -> nn.Module:
    from torchvision.models import ResNet, resnet18
    from torchvision.models.resnet import BasicBlock

    model: nn.Module = (
        ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10) if small else resnet18(num_classes=10)
    )
    return model


def _digits(count: int) -> TensorDataset:
    """Return scikit-learn's digits as images of 3 channels, in [-1, 1]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(1))[:count]
    assert len(order) == count
    pixels = torch.from_numpy(digits.images).float()[order, None] / 8 - 1
    images = functional.interpolate(pixels, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
    return TensorDataset(images.repeat(1, 3, 1, 1), torch.from_numpy(digits.target)[order])


def _mlp(small: bool) -> nn.Module:
    width = 64 if small else 256
    layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def _vectors(count: int) -> TensorDataset:
    """Return vectors, and classes by a linear map."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 64, generator=generator)
    return TensorDataset(inputs, (inputs @ torch.randn(64, 10, generator=generator)).argmax(1))


class GPT(nn.Module):
    """Decoder of characters; its head has the weights of the embedding."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, width)
        self.positions = nn.Parameter(torch.zeros(CONTEXT, width))
        self.blocks = nn.ModuleList(GPTBlock(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        """Return logits of shape (batch, time, character)."""
        hidden = self.embedding(characters) + self.positions
        for block in self.blocks:
            hidden = block(hidden)
        return functional.linear(self.norm(hidden), self.embedding.weight)


class GPTBlock(nn.Module):
    """Causal self-attention and a feed-forward network."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention_in, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        parts = self.attention_in(self.attention_norm(hidden)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.attention_out(mixed.transpose(1, 2).flatten(-2))
        output: torch.Tensor = hidden + self.feed_forward(self.norm(hidden))
        return output


def _gpt(small: bool) -> nn.Module:
    return GPT(layers=1, width=64) if small else GPT(layers=8, width=320)  # 10.0 M parameters


def _texts(count: int) -> TensorDataset:
    """Return texts of random words, and the same texts one character later."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(97, 123, (64, 7), generator=generator)  # small letters
    words[:, -1] = ord(" ")
    length = count * CONTEXT + 1
    text = words[torch.randint(64, (length // 7 + 1,), generator=generator)].flatten()[:length]
    return TensorDataset(text[:-1].view(count, CONTEXT), text[1:].view(count, CONTEXT))


def _text_loss(model: Any, batch: Sequence[torch.Tensor]) -> torch.Tensor:
    characters, following = batch
    return functional.cross_entropy(model(characters).float().flatten(0, 1), following.flatten())


def _policy(small: bool) -> nn.Module:
    from robo_orchard_lab.policy import BehaviorCloning

    statistics = {
        name: {"mean": [0.0] * size, "std": [1.0] * size}
        for name, size in {"observation.state": STATE, "action": ACTIONS}.items()
    }
    hidden = [64] if small else [256, 256, 256]
    return BehaviorCloning(statistics, chunk_size=CHUNK, hidden=hidden)


def _demonstrations(count: int) -> list[dict[str, torch.Tensor]]:
    """Return states, and chunks of actions by a linear map; the last frames of some are padding."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(count, STATE, generator=generator)
    expert = torch.randn(STATE, CHUNK * ACTIONS, generator=generator) / STATE**0.5
    actions = (states @ expert).tanh().view(count, CHUNK, ACTIONS)
    frames = torch.randint(1, 4 * CHUNK, (count, 1), generator=generator)  # to the episode's end
    is_padding = torch.arange(CHUNK) >= frames
    names = ("observation.state", "action", "action_is_pad")
    return [
        dict(zip(names, sample, strict=True))
        for sample in zip(states, actions, is_padding, strict=True)
    ]


def _policy_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    loss: torch.Tensor = model(batch)
    return loss


WORKLOADS = {
    "resnet": Workload(
        "digits, ResNet-18",
        full=Size(training=12, evaluation=4, log_every=4),
        quick=Size(training=4, evaluation=1, log_every=2),
        batch_size=64,
        make_model=_resnet,
        make_samples=_digits,
        make_optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=5e-4),
        loss=_classification_loss,
    ),
    "mlp": Workload(
        "MLP on tensors in memory",
        full=Size(training=800, evaluation=80, log_every=50),
        quick=Size(training=20, evaluation=2, log_every=5),
        batch_size=64,
        make_model=_mlp,
        make_samples=_vectors,
        make_optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        loss=_classification_loss,
    ),
    "gpt": Workload(
        "GPT of 10 M parameters",
        full=Size(training=12, evaluation=4, log_every=4),
        quick=Size(training=8, evaluation=2, log_every=4),
        batch_size=2,
        make_model=_gpt,
        make_samples=_texts,
        make_optimizer=partial(torch.optim.AdamW, lr=1e-3),
        loss=_text_loss,
        accumulate=4,
        bf16=True,
    ),
    "policy": Workload(
        "behavior cloning policy",
        full=Size(training=200, evaluation=20, log_every=50),
        quick=Size(training=20, evaluation=2, log_every=5),
        batch_size=256,
        make_model=_policy,
        make_samples=_demonstrations,
        make_optimizer=partial(torch.optim.AdamW, lr=1e-3, weight_decay=1e-4),
        loss=_policy_loss,
    ),
}
