"""Side effects of a padding step."""

from __future__ import annotations

import random

import torch

from robo_orchard_lab.pipeline.trainer.accumulation import padding_step


class Counting(torch.nn.Module):
    """Model that changes and replaces buffers, one of them growing, and draws random numbers."""

    mean: torch.Tensor
    count: torch.Tensor
    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.mean.mul_(0.9).add_(inputs.mean())
        self.count = self.count + 1
        self.seen = torch.cat([self.seen, inputs[:1, 0]])
        random.random()
        outputs: torch.Tensor = self.inner(torch.nn.functional.dropout(inputs))
        return outputs


def test_a_padding_step_has_no_side_effects() -> None:
    """A padding step restores buffers, RNG states and gradients, also if the batch gives NaN."""
    model = Counting()
    model(torch.ones(3, 4)).sum().backward()
    random_states = torch.get_rng_state(), random.getstate()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]  # type: ignore[union-attr]
    with padding_step(model):
        model(torch.full((3, 4), torch.nan)).sum().backward()
    assert {name: buffer.tolist() for name, buffer in model.named_buffers()} == {
        name: buffer.tolist() for name, buffer in buffers.items()
    }
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert random.getstate() == random_states[1]
