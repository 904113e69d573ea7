"""Map-style datasets with a state, which may grow between epochs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.errors import CheckpointError, StateError
from tiny import Batch, equal, make_model, make_trainer, weights

STEPS = 2 + 3 + 5  # of epochs with 6, 11 and 17 samples


class Rollouts(Dataset[Batch]):
    """Samples that depend on the weights when they were added."""

    def __init__(self) -> None:
        self.inputs, self.targets = torch.zeros(6, 4), torch.ones(6, 2)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Batch:
        return self.inputs[index], self.targets[index]

    @torch.no_grad()
    def add(self, model: torch.nn.Module, samples: int) -> None:
        inputs = torch.linspace(-1, 1, 4 * samples).view(-1, 4)
        self.inputs = torch.cat([self.inputs, inputs])
        self.targets = torch.cat([self.targets, model(inputs)])


class SavedRollouts(Rollouts):
    def state_dict(self) -> dict[str, Any]:
        return {"inputs": self.inputs, "targets": self.targets}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.inputs, self.targets = state["inputs"], state["targets"]


def trainer_of(
    dataset: Rollouts,
    resume_from: Path | None = None,
    within_epochs: bool = False,
    max_epoch: int = 3,
    max_step: int | None = None,
) -> HookBasedTrainer:
    grow = PipelineHooks("grow")
    model = make_model()

    @(grow.on_step if within_epochs else grow.on_epoch).after
    def add_rollouts(args: PipelineHookArgs) -> None:
        if within_epochs or args.epoch_completed:
            dataset.add(model, 5 + args.epoch_id)

    return make_trainer(
        grow,
        model=model,
        loader=DataLoader(dataset, batch_size=4, shuffle=True),
        resume_from=resume_from,
        max_epoch=max_epoch,
        max_step=max_step,
    )


@pytest.mark.parametrize("stop", [1, 2, 4, 5, 6, STEPS - 1])
def test_resume_restores_a_dataset_that_grows_between_epochs(stop: int, tmp_path: Path) -> None:
    """Within an epoch and between epochs, samples, order and weights are those of one run."""
    expected = SavedRollouts()
    uninterrupted = trainer_of(expected)
    uninterrupted()
    assert uninterrupted.progress.global_step_id == STEPS

    stopped = trainer_of(SavedRollouts(), max_step=stop)
    stopped()
    stopped.save_checkpoint(tmp_path / "saved")
    dataset = SavedRollouts()
    resumed = trainer_of(dataset, tmp_path / "saved")
    resumed()
    assert equal(weights(resumed.model), weights(uninterrupted.model))
    assert torch.equal(dataset.targets, expected.targets)


def test_growth_within_an_epoch_is_refused_on_resume(tmp_path: Path) -> None:
    """The order was made for fewer samples; the error says when a dataset may grow."""
    stopped = trainer_of(SavedRollouts(), within_epochs=True, max_step=1)
    stopped()
    stopped.save_checkpoint(tmp_path / "saved")
    resumed = trainer_of(SavedRollouts(), tmp_path / "saved", within_epochs=True)
    with pytest.raises(StateError, match=r"length 6 when .* has 11.*grow .* between epochs only"):
        resumed()


@pytest.mark.parametrize(
    ("saved", "resumed", "message"),
    [
        (Rollouts, Rollouts, "length 11 when .* and has 6.*with state_dict and load_state_dict"),
        (SavedRollouts, Rollouts, "Rollouts has no state_dict and load_state_dict"),
    ],
)
def test_a_dataset_without_state_is_refused(
    saved: type[Rollouts], resumed: type[Rollouts], message: str, tmp_path: Path
) -> None:
    """The trainer can't restore samples of a dataset without a state; the error says so."""
    stopped = trainer_of(saved(), max_epoch=1)
    stopped()
    stopped.save_checkpoint(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=message):
        trainer_of(resumed(), tmp_path / "saved")
