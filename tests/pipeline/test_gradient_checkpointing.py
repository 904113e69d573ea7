"""Gradient checkpointing, compared with training without it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.gradient_checkpointing import enable_gradient_checkpointing


class Block(nn.Module):
    """Dropout, running statistics, a counter that the output depends on, a keyword argument."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        inner: torch.Tensor = self.dropout(self.norm(self.linear(x))) * scale + self.calls
        return torch.relu(inner) + x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, scale=x.sigmoid())
        out: torch.Tensor = self.head(x)
        return out


def trained(patterns: list[str] | None, *, copied: bool = False) -> dict[str, torch.Tensor]:
    """Return the weights and buffers of three updates, with the next random number."""
    torch.manual_seed(0)
    model = Net()
    if patterns is not None:
        enable_gradient_checkpointing(model, patterns)
    if copied:
        model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(3):
        model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {**model.state_dict(), "random": torch.rand(1)}


@pytest.mark.parametrize("patterns", [["blocks.*"], ["blocks.1", "head"], ["*.linear", "*.norm"]])
def test_training_is_identical_to_the_bit(patterns: list[str]) -> None:
    """Weights, buffers and random numbers are those without checkpointing, names included."""
    expected, found = trained(None), trained(patterns)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_a_copy_of_the_model_checkpoints_itself() -> None:
    """A deep copy, as for a moving average, calls its own modules."""
    expected, found = trained(None), trained(["blocks.*"], copied=True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_activations_are_computed_again() -> None:
    """A checkpointed module runs twice for a backward pass, and once without gradients."""
    model = Net()
    enable_gradient_checkpointing(model, ["blocks.*"])
    calls = []
    model.blocks[0].get_submodule("linear").register_forward_hook(lambda *_: calls.append(1))
    loss = model(torch.randn(4, 8)).sum()
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2
    with torch.no_grad():
        model(torch.randn(4, 8))
    assert len(calls) == 3


def test_the_models_own_method_is_called() -> None:
    """Without patterns, a model enables checkpointing by itself, never with reentrant autograd."""
    given = []

    class Own(nn.Module):
        def gradient_checkpointing_enable(
            self, gradient_checkpointing_kwargs: dict[str, bool] | None = None
        ) -> None:
            given.append(gradient_checkpointing_kwargs)

    enable_gradient_checkpointing(Own())
    assert given == [{"use_reentrant": False}]
    with pytest.raises(PipelineConfigError, match="has no gradient_checkpointing_enable"):
        enable_gradient_checkpointing(Net())


def test_a_pattern_without_a_module_is_refused() -> None:
    """The error suggests the nearest name."""
    with pytest.raises(PipelineConfigError, match=r"'block' matches no module.*'blocks'"):
        enable_gradient_checkpointing(Net(), ["block"])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_training_is_identical_to_the_bit(backend: str) -> None:
    """A compiled model with checkpointing trains the weights of one without."""

    def trained(patterns: list[str] | None) -> dict[str, torch.Tensor]:
        torch.compiler.reset()
        torch.manual_seed(0)
        model = Net()
        if patterns is not None:
            enable_gradient_checkpointing(model, patterns)
        compiled = torch.compile(model, backend=backend)
        for _ in range(2):
            compiled(torch.randn(16, 8)).square().mean().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.sub_(parameter.grad)
                    parameter.grad = None
        return model.state_dict()

    expected, found = trained(None), trained(["blocks.*"])
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
