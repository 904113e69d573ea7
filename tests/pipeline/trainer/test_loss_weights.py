"""Losses with weights, in one process; ``test_uneven_data.py`` has several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks, SimpleBatchProcessor
from robo_orchard_lab.pipeline.errors import BatchProcessorError
from robo_orchard_lab.pipeline.evaluator import Evaluator
from robo_orchard_lab.pipeline.hooks.mixin import HookContext
from tiny import equal, loss_of, make_loader, make_model, make_trainer, weights

Weights = Sequence[Any]


def weighted(given: Weights) -> SimpleBatchProcessor:
    """Return a processor with one weight per loss, or no weight for None."""
    left = list(given)

    def forward(model: Any, batch: Any) -> Any:
        weight = left.pop(0)
        result = loss_of(model, batch)
        return result if weight is None else (*result, weight)

    return SimpleBatchProcessor.from_callable(forward)


def plain(given: Weights, accumulate: int) -> list[torch.Tensor]:
    """Return the weights of the model after a plain loop."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = list(zip(make_loader(len(given)), given, strict=True))
    for begin in range(0, len(batches), accumulate):
        window = batches[begin : begin + accumulate]
        total = sum(float(weight) for _, weight in window)
        loss = sum(loss_of(model, batch)[1] * float(w) / max(total, 1e-9) for batch, w in window)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]  # a tensor
        optimizer.step()
    return weights(model)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_update_uses_the_weighted_mean(accumulate: int) -> None:
    """Weights may be numbers or tensors from 0 to a million, and a window may sum to zero."""
    given = [np.float32(2), 0.0, torch.tensor(1e6), torch.tensor([0.0]), np.int64(0), 0, 7.5]
    model = make_model()
    make_trainer(
        model=model,
        loader=make_loader(7),
        batch_processor=weighted(given),
        accumulate=accumulate,
        max_epoch=1,
    )()
    for ours, theirs in zip(weights(model), plain(given, accumulate), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_parameters_outside_the_model_use_the_weighted_mean() -> None:
    """A parameter known only to the optimizer, as of a learned loss, uses the weighted mean."""
    factor = torch.nn.Parameter(torch.ones(()))
    left = [2.0, 6.0]

    def forward(model: Any, batch: Any) -> Any:
        outputs, loss = loss_of(model, batch)
        losses.append(loss.item())
        return outputs, loss * factor, left.pop(0)

    losses: list[float] = []
    make_trainer(
        optimizer=torch.optim.SGD([factor], lr=1.0),
        batch_processor=SimpleBatchProcessor.from_callable(forward),
        accumulate=2,
        max_step=2,
    )()
    assert factor.item() == pytest.approx(1 - (2 * losses[0] + 6 * losses[1]) / 8)


def test_a_loss_of_weight_zero_may_be_nan() -> None:
    """A NaN loss of weight zero changes neither the weights nor the mean loss."""
    model = make_model()
    before = weights(model)

    def forward(model: Any, batch: Any) -> Any:
        outputs, loss = loss_of(model, batch)
        return outputs, loss + torch.nan, torch.tensor(0)

    processor = SimpleBatchProcessor.from_callable(forward)
    make_trainer(model=model, batch_processor=processor, max_step=3)()
    assert equal(weights(model), before)


def test_hooks_see_the_weight_of_a_loss() -> None:
    """Hooks see the processor's weight, or else the number of samples of the batch."""
    seen: list[float] = []
    hooks = PipelineHooks("notes")

    def note(args: PipelineHookArgs) -> None:
        seen.append(float(args.loss_weight))

    hooks.register_hook("on_step", HookContext.from_callable(after=note))
    make_trainer(hooks, batch_processor=weighted([3, 5]), max_step=2)()
    make_trainer(hooks, max_step=1)()
    assert seen == [3, 5, 4]


def test_an_evaluation_uses_the_weights() -> None:
    """The mean loss of an evaluation is weighted by its batches' weights."""
    model, loader = make_model(), make_loader(2)
    losses = [loss_of(model, batch)[1].item() for batch in loader]
    found = Evaluator(model, weighted([1, 3]), {"val": loader}).evaluate()
    assert found["val/loss"] == pytest.approx((losses[0] + 3 * losses[1]) / 4)


def test_a_processor_may_write_all_weights_into_one_tensor() -> None:
    """Each loss has the weight held by the tensor when the loss was returned."""
    weight = torch.zeros((), dtype=torch.float64)
    given = [3.0, 5.0, 1.0]
    left = list(given)

    def forward(model: Any, batch: Any) -> Any:
        return *loss_of(model, batch), weight.fill_(left.pop(0))

    model = make_model()
    make_trainer(
        model=model,
        loader=make_loader(3),
        batch_processor=SimpleBatchProcessor.from_callable(forward),
        accumulate=3,
        max_epoch=1,
    )()
    for ours, theirs in zip(weights(model), plain(given, 3), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (-1, "must be a number >= 0 or a tensor of one.*got -1"),
        (float("nan"), "got nan"),
        ("many", "got 'many'"),
        (torch.ones(2), "got tensor"),
        (True, "got True"),
    ],
)
def test_an_invalid_weight_is_refused(given: Any, message: str) -> None:
    """Training and evaluation refuse an invalid weight with the expected type."""
    with pytest.raises(BatchProcessorError, match=message):
        make_trainer(batch_processor=weighted([given]), max_step=1)()
    with pytest.raises(BatchProcessorError, match=message):
        Evaluator(make_model(), weighted([given]), {"val": make_loader(1)}).evaluate()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1, None], "the same in every step; got no weight in this step"),
        (
            [None, 1],
            "the same in every step; got a weight in this step, and none in the steps before",
        ),
    ],
)
def test_weights_in_some_steps_only_are_refused(given: Weights, message: str) -> None:
    """A processor that returns weights in some steps only is refused."""
    with pytest.raises(BatchProcessorError, match=message):
        make_trainer(batch_processor=weighted(given), max_step=2)()
