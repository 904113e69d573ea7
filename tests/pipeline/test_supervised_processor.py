"""SupervisedProcessor of (inputs, targets) batches."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torchmetrics import MeanSquaredError

from robo_orchard_lab.pipeline import SupervisedProcessor
from robo_orchard_lab.pipeline.errors import BatchProcessorError
from robo_orchard_lab.pipeline.hooks import MetricTrackerConfig, ValidationHookConfig
from tiny import equal, loss_of, make_loader, make_model, make_trainer, weights


@pytest.mark.parametrize("loss", [torch.nn.MSELoss(), torch.nn.functional.mse_loss])
def test_training_equals_a_handwritten_function(loss: Any) -> None:
    """The weights equal a handwritten function's with a module or a function as loss."""
    by_hand, supervised = make_model(), make_model()
    make_trainer(model=by_hand, max_epoch=1)()
    make_trainer(model=supervised, batch_processor=SupervisedProcessor(loss), max_epoch=1)()
    assert equal(weights(supervised), weights(by_hand))


def test_metrics_get_outputs_and_targets() -> None:
    """Metrics of training and evaluation need no metric_inputs."""
    metrics = {"mse": MeanSquaredError()}
    trainer = make_trainer(
        [
            MetricTrackerConfig()(metrics=metrics),
            ValidationHookConfig()(dataloaders={"val": make_loader(2)}, metrics=metrics),
        ],
        batch_processor=SupervisedProcessor(torch.nn.MSELoss()),
        max_epoch=1,
    )
    trainer()
    latest = trainer.metrics.latest
    assert latest("eval/val/mse") == pytest.approx(latest("eval/val/loss"))
    pairs = [(inputs, targets) for inputs, targets in make_loader(2)]
    with torch.no_grad():
        losses = [float(loss_of(trainer.model, pair)[1]) for pair in pairs]
    assert latest("eval/val/mse") == pytest.approx(sum(losses) / 2)


def test_loss_tensors_follow_the_outputs() -> None:
    """Class weights of a loss move to the device of the outputs."""
    processor = SupervisedProcessor(torch.nn.CrossEntropyLoss(weight=torch.ones(2)))
    model = torch.nn.Linear(4, 2, device="meta")
    batch = torch.ones(3, 4, device="meta"), torch.ones(3, dtype=torch.long, device="meta")
    assert processor.forward(model, batch)[1].device.type == "meta"


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ({"input": torch.ones(1)}, "a dict"),
        ((torch.ones(1),), "a tuple of length 1"),
        (torch.ones(2, 4), "a Tensor"),
    ],
)
def test_batch_that_is_no_pair_is_refused(batch: Any, found: str) -> None:
    """The error names the batch's type and the remedy."""
    message = re.escape(f"pairs (inputs, targets), got {found}; change the dataset")
    with pytest.raises(BatchProcessorError, match=message):
        SupervisedProcessor(torch.nn.MSELoss()).forward(make_model(), batch)


def test_loss_must_be_callable() -> None:
    """The constructor raises the error."""
    with pytest.raises(TypeError, match=r"callable as loss\(outputs, targets\), got str"):
        SupervisedProcessor("mse")  # type: ignore[arg-type]
