"""Losses that come with weights, in one process; ``test_uneven_data.py`` has several."""

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
    """A processor that gives one weight after the other, and none for None."""
    left = list(given)

    def forward(model: Any, batch: Any) -> Any:
        weight = left.pop(0)
        result = loss_of(model, batch)
        return result if weight is None else (*result, weight)

    return SimpleBatchProcessor.from_callable(forward)


def plain(given: Weights, accumulate: int) -> list[torch.Tensor]:
    """The weights of the model after a plain loop."""
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
def test_an_update_is_that_of_the_weighted_mean(accumulate: int) -> None:
    """Of numbers of any kind and tensors, from 0 to a million; a whole window may weigh nothing."""
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


def test_parameters_beside_the_model_take_the_mean_too() -> None:
    """One that only the optimizer has, such as of a learned loss, moves by the weighted mean."""
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


def test_a_loss_that_weighs_nothing_may_be_no_number() -> None:
    """It leaves the weights, and the mean loss, as they are."""
    model = make_model()
    before = weights(model)

    def forward(model: Any, batch: Any) -> Any:
        outputs, loss = loss_of(model, batch)
        return outputs, loss + torch.nan, torch.tensor(0)

    processor = SimpleBatchProcessor.from_callable(forward)
    make_trainer(model=model, batch_processor=processor, max_step=3)()
    assert equal(weights(model), before)


def test_hooks_see_what_a_loss_weighs() -> None:
    """The processor's weight, or else the samples of the batch."""
    seen: list[float] = []
    hooks = PipelineHooks("notes")

    def note(args: PipelineHookArgs) -> None:
        seen.append(float(args.loss_weight))

    hooks.register_hook("on_step", HookContext.from_callable(after=note))
    make_trainer(hooks, batch_processor=weighted([3, 5]), max_step=2)()
    make_trainer(hooks, max_step=1)()
    assert seen == [3, 5, 4]


def test_an_evaluation_weighs_by_it() -> None:
    """The mean loss of a set is that over the weights of its batches."""
    model, loader = make_model(), make_loader(2)
    losses = [loss_of(model, batch)[1].item() for batch in loader]
    found = Evaluator(model, weighted([1, 3]), {"val": loader}).evaluate()
    assert found["val/loss"] == pytest.approx((losses[0] + 3 * losses[1]) / 4)


def test_a_processor_may_write_all_weights_into_one_tensor() -> None:
    """Each loss weighs what the tensor held when it was returned."""
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
def test_what_is_no_weight_is_refused(given: Any, message: str) -> None:
    """With what is expected, in training and in an evaluation."""
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
    """With what is expected."""
    with pytest.raises(BatchProcessorError, match=message):
        make_trainer(batch_processor=weighted(given), max_step=2)()
