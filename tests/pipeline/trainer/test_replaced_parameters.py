"""Resume of models whose ``load_state_dict`` replaces or materializes parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from robo_orchard_lab.pipeline import HookBasedTrainer
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.hooks import EMAConfig
from tiny import equal, make_model, make_trainer, weights


def adapted(kind: type[torch.nn.Module]) -> torch.nn.Sequential:
    """Return a model with a layer of ``kind`` between two plain ones, and a frozen layer."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), kind(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
    )
    model[0].requires_grad_(False)
    return model


class Assigned(torch.nn.Linear):
    """Layer whose weight is a new parameter after loading, as of quantized layers."""

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("weight", "bias"):
            setattr(self, name, torch.nn.Parameter(state[f"{prefix}{name}"]))


class AssignedByWrapper(torch.nn.Sequential):
    """Model that loads all tensors with ``assign=True``."""

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        return super().load_state_dict(state_dict, strict, assign=True)


class Widened(torch.nn.Linear):
    """Layer whose weight changes its dtype when loading."""

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        self.weight = torch.nn.Parameter(state[f"{prefix}weight"].double())
        self.bias.data.copy_(state[f"{prefix}bias"])


class Merged(torch.nn.Linear):
    """Layer that loses its bias when loading."""

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        self.weight.data.copy_(state[f"{prefix}weight"])
        self.register_parameter("bias", None)


def run(
    model: torch.nn.Module, max_step: int, resume_from: Path | None = None
) -> tuple[HookBasedTrainer, dict[str, torch.Tensor]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ema = EMAConfig(decay=0.5)()
    trainer = make_trainer(
        ema, model=model, optimizer=optimizer, max_step=max_step, resume_from=resume_from
    )
    trainer()
    return trainer, ema.weights()


@pytest.mark.parametrize(
    "make",
    [lambda: adapted(Assigned), lambda: AssignedByWrapper(*adapted(torch.nn.Linear))],
    ids=["layer", "wrapper"],
)
def test_resume_trains_replaced_parameters(make: Any, tmp_path: Path) -> None:
    """A resumed run trains the new parameters with the optimizer's state, bit for bit."""
    uninterrupted, model = make(), make()
    _, expected = run(uninterrupted, 10)
    run(model, 4)[0].save_checkpoint(tmp_path / "half")
    resumed = make()
    trainer, average = run(resumed, 10, tmp_path / "half")
    assert equal(weights(resumed), weights(uninterrupted))
    assert equal([*average.values()], [*expected.values()])
    assert trainer.optimizer is not None
    held = {p for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {*resumed.parameters()}
    frozen = [name for name, p in resumed.named_parameters() if not p.requires_grad]
    assert frozen == ["0.weight", "0.bias"]
    trainer.save_checkpoint(tmp_path / "again")


def test_resume_of_a_lazy_model(tmp_path: Path) -> None:
    """A model with uninitialized parameters resumes as an uninterrupted run."""

    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.LazyLinear(8), torch.nn.Tanh(), torch.nn.LazyLinear(2))

    def train(max_step: int, resume_from: Path | None = None) -> tuple[Any, torch.nn.Module]:
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        trainer = make_trainer(
            model=model, optimizer=optimizer, max_step=max_step, resume_from=resume_from
        )
        trainer()
        return trainer, model

    _, uninterrupted = train(10)
    train(4)[0].save_checkpoint(tmp_path / "half")
    _, resumed = train(10, tmp_path / "half")
    assert equal(weights(resumed), weights(uninterrupted))


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (Widened, "1.weight was float32[8, 8], and is float64[8, 8] afterwards"),
        (Merged, "1.bias was float32[8], and is no parameter afterwards"),
    ],
)
def test_other_parameters_are_refused(
    kind: type[torch.nn.Module], problem: str, tmp_path: Path
) -> None:
    """Parameters of another dtype or name are an error that names the module."""
    run(adapted(kind), 4)[0].save_checkpoint(tmp_path / "half")
    expected = f"load_state_dict of the module {kind.__name__} (1) replaced parameters: {problem}"
    with pytest.raises(StateError, match=re.escape(expected)):
        run(adapted(kind), 10, tmp_path / "half")


def test_untied_parameters_are_refused(tmp_path: Path) -> None:
    """Tied weights that ``assign=True`` unties are an error that names the module."""

    def make() -> torch.nn.Module:
        model = AssignedByWrapper(
            *make_model().children(), torch.nn.Linear(2, 8), torch.nn.Linear(8, 2)
        )
        model[4].weight = model[2].weight
        return model

    run(make(), 4)[0].save_checkpoint(tmp_path / "half")
    with pytest.raises(StateError, match=r"module Linear \(4\) .* 4.weight was no parameter"):
        run(make(), 10, tmp_path / "half")


def test_replaced_parameters_in_ddp_are_refused(tmp_path: Path) -> None:
    """With DDP, whose reducer has the former parameters, the error names the module."""
    run(adapted(Assigned), 4)[0].save_checkpoint(tmp_path / "half")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        model = torch.nn.parallel.DistributedDataParallel(adapted(Assigned))
        with pytest.raises(StateError, match=r"module Assigned \(1\) .* DDP would not reduce"):
            run(model, 10, tmp_path / "half")
    finally:
        torch.distributed.destroy_process_group()
