"""Fields of a hook's arguments: what a hook may replace, and what only the engine sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from launching import SCRIPTS, launch
from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks
from tiny import equal, loss_of, make_loader, make_model, make_trainer, weights

ASSIGNABLE = {
    "batch",
    "model_outputs",
    "attached_loss",
    "grad_norm",
    "grad_norm_order",
    "gradients_changed",
    "skip_reason",
}
NAMES = [name for name in dir(PipelineHookArgs) if not name.startswith("_")]
READ_ONLY = [
    name
    for name in NAMES
    if name not in ASSIGNABLE and isinstance(getattr(PipelineHookArgs, name), property)
]


def test_assignable_fields_are_declared() -> None:
    """Exactly the documented fields are assignable; an unknown field is an error."""
    assert {name for name in NAMES if name not in READ_ONLY} - ASSIGNABLE == {
        "allow_skip_batch",
        "begin_entry",
        "channels_of",
        "evaluating",
        "failing",
        "is_assignable",
        "metric_name",
        "skip_batch",
    }
    assert all(PipelineHookArgs.is_assignable(name) for name in ASSIGNABLE)
    assert not any(PipelineHookArgs.is_assignable(name) for name in READ_ONLY)
    with pytest.raises(AttributeError, match="no field 'bach'"):
        PipelineHookArgs.is_assignable("bach")


@pytest.mark.parametrize("name", READ_ONLY)
def test_read_only_field_refuses_assignment(name: str) -> None:
    """The error names the field and what to do instead."""
    with pytest.raises(AttributeError, match=rf"args\.{name} is read-only for hooks; .*\w"):
        setattr(PipelineHookArgs(), name, True)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("loss", "assign args.attached_loss in a before of on_model_backward"),
        ("at_accumulation_boundary", r"gradient_accumulation_steps=.*args\.skip_reason"),
        ("loss_divisor", "assign args.attached_loss"),
        ("epoch_completed", r"args\.requests\.stop"),
        ("loss_weight", r"return \(outputs, loss, weight\)"),
        ("run", "hooks may assign batch, model_outputs, attached_loss, grad_norm"),
    ],
)
def test_refused_assignment_has_advice(name: str, advice: str) -> None:
    """Each steering field has its own remedy; the others list the assignable fields."""
    with pytest.raises(AttributeError, match=advice):
        setattr(PipelineHookArgs(), name, None)


def train(channel: str, role: str, assign: Any, **options: Any) -> list[torch.Tensor]:
    """Train with a hook that assigns fields; return the weights."""
    hooks = PipelineHooks()
    getattr(getattr(hooks, channel), role)(assign)
    model = make_model()
    make_trainer(hooks, model=model, loader=make_loader(4), max_epoch=1, **options)()
    return weights(model)


def plain(change_batch: Any, change_loss: Any) -> list[torch.Tensor]:
    """Return the weights after a plain loop on changed batches and losses."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in make_loader(4):
        optimizer.zero_grad()
        change_loss(model, loss_of(model, change_batch(batch))[1]).backward()
        optimizer.step()
    return weights(model)


@pytest.mark.parametrize("channel", ["on_step", "on_batch", "on_model_forward"])
def test_assigned_batch_is_used_by_forward(channel: str) -> None:
    """A batch assigned in a before is the batch of the forward pass and of later hooks."""

    def halve(batch: Any) -> Any:
        return tuple(part[:2] / 2 for part in batch)

    def assign(args: PipelineHookArgs) -> None:
        assert args.batch_size == 4
        args.batch = halve(args.batch)
        assert args.batch_size == 4  # of the data, which windows and means use

    assert equal(train(channel, "before", assign), plain(halve, lambda model, loss: loss))


@pytest.mark.parametrize(
    ("channel", "role"), [("on_model_forward", "after"), ("on_model_backward", "before")]
)
def test_assigned_loss_is_used_by_backward(channel: str, role: str) -> None:
    """A loss assigned before the backward pass determines the gradients."""

    def penalize(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
        return loss * 3 + sum(p.square().sum() for p in model.parameters())

    def assign(args: PipelineHookArgs) -> None:
        assert args.attached_loss is not None
        args.attached_loss = penalize(args.model, args.attached_loss)

    assert equal(train(channel, role, assign), plain(lambda batch: batch, penalize))


def test_assigned_outputs_reach_later_hooks() -> None:
    """Outputs assigned in an after of on_model_forward are read by every later hook."""
    seen = []
    hooks = PipelineHooks()
    hooks.on_batch.after(lambda args: seen.append(args.model_outputs))

    @hooks.on_model_forward.after
    def assign(args: PipelineHookArgs) -> None:
        args.model_outputs = "replaced"

    make_trainer(hooks, max_step=2)()
    assert seen == ["replaced"] * 2


@pytest.mark.parametrize(
    ("channel", "name", "value"),
    [
        ("on_step", "at_accumulation_boundary", True),  # made an update within the window
        ("on_step", "at_accumulation_boundary", False),  # made no update at all
        ("on_batch", "loss_divisor", 1.0),  # doubled the gradients
        ("on_epoch", "epoch_completed", False),  # repeated the epoch without end
        ("on_model_backward", "given_loss_weight", torch.ones(())),
        ("on_optimizer_step", "update_committed", True),
    ],
)
def test_hook_cannot_steer_the_engine(channel: str, name: str, value: Any) -> None:
    """An assignment that used to change updates fails; the error names hook and field."""

    def assign(args: PipelineHookArgs) -> None:
        setattr(args, name, value)

    with pytest.raises(AttributeError, match=f"args.{name} is read-only") as caught:
        train(channel, "after" if channel == "on_epoch" else "before", assign, accumulate=2)
    assert any(channel in note for note in caught.value.__notes__)


def test_swallowed_exception_makes_no_update() -> None:
    """A hook can't hide the error of a step from the optimizer."""
    model = make_model()
    before = weights(model)
    hooks = PipelineHooks()

    @hooks.on_step.after
    def swallow(args: PipelineHookArgs) -> None:
        assert isinstance(args.exception, ZeroDivisionError)
        args.exception = None  # type: ignore[misc]  # what is tested

    hooks.on_batch.after(lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        make_trainer(hooks, model=model, max_step=1)()
    assert equal(weights(model), before)
    assert "args.exception is read-only" in str(caught.value.__notes__)


def test_exception_is_reset_after_unwinding() -> None:
    """After the last hook of a failed scope, the arguments hold no error."""
    seen: list[Any] = []
    hooks = PipelineHooks()
    hooks.on_step.before(seen.append)
    hooks.on_step.after(lambda args: seen.append(args.exception))
    hooks.on_batch.before(lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        make_trainer(hooks, max_step=1)()
    args, during = seen
    assert during is caught.value
    assert args.exception is None


def test_assignments_on_ranks_train_like_one_process(tmp_path: Path) -> None:
    """Assigned batches and losses give the update of one process with larger batches."""
    launch(SCRIPTS / "assign_on_ranks.py", tmp_path, "assigns")
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert equal(first, second)
    torch.set_default_dtype(torch.float64)
    try:
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        inputs, targets = make_loader(6, batch_size=2).dataset.tensors  # type: ignore[attr-defined]
        for window in (slice(0, 8), slice(8, 12)):
            optimizer.zero_grad()
            (loss_of(model, (inputs[window] * 2, targets[window]))[1] * 3).backward()
            optimizer.step()
        for ours, theirs in zip(first, weights(model), strict=True):
            torch.testing.assert_close(ours, theirs)
    finally:
        torch.set_default_dtype(torch.float32)


def test_steering_on_one_rank_ends_all_ranks(tmp_path: Path) -> None:
    """A refused assignment on one rank is the error of the job; no rank trains on alone."""
    done = launch(SCRIPTS / "assign_on_ranks.py", tmp_path, "steers", fails=True)
    assert "args.at_accumulation_boundary is read-only for hooks" in done.stderr
    assert not list(tmp_path.glob("rank*.pt"))
