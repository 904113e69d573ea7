"""Gradient norms shared by all hooks, and clipping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHookArgs, SimpleBatchProcessor
from robo_orchard_lab.pipeline.gradient_norm import gradient_norm
from robo_orchard_lab.pipeline.hook_set import HookLike
from robo_orchard_lab.pipeline.hooks import GradientClippingHookConfig
from robo_orchard_lab.pipeline.hooks.mixin import HookContext, PipelineHooks
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from tiny import equal, loss_of, make_loader, make_model, make_trainer, weights


class Norms(PipelineHooks):
    """Hook that requests the norm before each update, as statistics do."""

    def __init__(self, norm_type: float | None = None) -> None:
        super().__init__()
        self.norm_type = norm_type
        self.found: list[torch.Tensor] = []
        self.register_hook("on_optimizer_step", HookContext.from_callable(before=self.ask))

    def ask(self, args: PipelineHookArgs) -> None:
        norm = gradient_norm(args, self.norm_type)
        assert norm is not None
        self.found.append(norm.clone())


class CountNorms(torch.overrides.TorchFunctionMode):
    """Counter of computed norms."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.norms += getattr(function, "__name__", "") == "_foreach_norm"
        return function(*args, **(kwargs or {}))


def plain_weights(bounds: list[tuple[str, float, float]], steps: int = 7) -> list[torch.Tensor]:
    """Return the weights of a plain loop that clips in turn, by norm or by value."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch, _ in zip(make_loader(), range(steps), strict=False):
        loss_of(model, batch)[1].backward()
        for kind, bound, order in bounds:
            if kind == "norm":
                torch.nn.utils.clip_grad_norm_(model.parameters(), bound, order)
            else:
                torch.nn.utils.clip_grad_value_(model.parameters(), bound)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


@pytest.mark.parametrize("requested_first", [False, True])
@pytest.mark.parametrize("order", [2.0, 1.0])
def test_known_norm_is_reused_for_clipping(requested_first: bool, order: float) -> None:
    """Clipping in any order of hooks equals torch's bit for bit, with one norm computed."""
    clip, norms = GradientClippingHookConfig(max_norm=0.05, norm_type=order), Norms(order)
    model = make_model()
    hooks: list[HookLike] = [norms, clip] if requested_first else [clip, norms]
    trainer = make_trainer(hooks, model=model, max_epoch=1)
    with CountNorms() as counted:
        trainer()
    assert equal(weights(model), plain_weights([("norm", 0.05, order)]))
    if requested_first:
        assert counted.norms == 7
    else:  # an explicit order measures the current gradients
        assert all(norm <= 0.05 * 1.001 for norm in norms.found)


def test_norm_without_order_is_the_first_one() -> None:
    """After clipping, the norm is the earlier one, and nothing is computed."""
    norms = Norms()
    trainer = make_trainer([GradientClippingHookConfig(max_norm=0.05), norms], max_step=3)
    with CountNorms() as counted:
        trainer()
    assert counted.norms == 3
    assert trainer.metrics.latest("grad_norm") == norms.found[-1].item() > 0.06


def test_another_order_is_computed_separately() -> None:
    """Clipping by a norm of another order equals torch's bit for bit."""
    model, norms = make_model(), Norms()
    config = GradientClippingHookConfig(max_norm=0.02, norm_type=4.0)
    trainer = make_trainer([norms, config], model=model, max_epoch=1)
    trainer()
    assert equal(weights(model), plain_weights([("norm", 0.02, 4.0)]))
    assert trainer.metrics.latest("grad_norm") < norms.found[-1].item()


@pytest.mark.parametrize("value_first", [False, True])
def test_two_hooks_clip_in_turn(value_first: bool) -> None:
    """The second hook clips by the norm after the first."""
    bounds = [("norm", 0.05, 2.0), ("norm", 0.03, 2.0)]
    hooks = {
        "a": GradientClippingHookConfig(max_norm=0.05),
        "b": GradientClippingHookConfig(max_norm=0.03),
    }
    if value_first:
        bounds[0] = ("value", 0.01, 2.0)
        hooks["a"] = GradientClippingHookConfig(max_value=0.01)
    model = make_model()
    make_trainer(PipelineHooks.from_hooks(hooks), model=model, max_epoch=1)()
    assert equal(weights(model), plain_weights(bounds))


def test_norm_of_sparse_gradients() -> None:
    """The norm of a sparse gradient equals the norm of its dense form."""

    def norm(sparse: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Embedding(5, 3, sparse=sparse)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        norms = Norms()
        HookBasedTrainer(
            Accelerator(cpu=True),
            model,
            [torch.tensor([1, 1, 2])],
            SimpleBatchProcessor.from_callable(lambda model, batch: (None, model(batch).sum())),
            optimizer,
            hooks=norms,
            max_epoch=1,
        )()
        return norms.found[0]

    assert torch.equal(norm(sparse=True), norm(sparse=False))


class Partial(torch.nn.Module):
    """Model with a layer that the optimizer lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = make_model()
        self.other = torch.nn.Linear(2, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.other(self.trained(inputs))
        return outputs


@pytest.mark.parametrize("clip", [{"max_norm": 0.05}, {"max_value": 0.01}])
def test_only_gradients_of_the_update_count(clip: dict[str, float]) -> None:
    """Norm and clipping are of the optimizer's parameters, in the model or not; others' drop."""
    torch.manual_seed(0)
    model, reference = Partial(), Partial()
    reference.load_state_dict(model.state_dict())
    scales = [torch.nn.Parameter(torch.full((2,), 3.0)) for _ in range(2)]
    norms, seen = Norms(), PipelineHooks("seen")
    others: list[Any] = []

    def scaled_loss(model: Any, batch: Any, scale: torch.Tensor) -> Any:
        inputs, targets = batch
        outputs = model(inputs) * scale
        return outputs, torch.nn.functional.mse_loss(outputs, targets)

    @seen.on_optimizer_step.after
    def keep(args: PipelineHookArgs) -> None:
        gradient = model.other.weight.grad
        assert gradient is not None
        others.append(gradient.clone())

    HookBasedTrainer(
        Accelerator(cpu=True),
        model,
        make_loader(3),
        SimpleBatchProcessor.from_callable(lambda m, batch: scaled_loss(m, batch, scales[0])),
        torch.optim.SGD([*model.trained.parameters(), scales[0]], lr=0.1),
        hooks=[norms, seen, GradientClippingHookConfig(**clip)],  # type: ignore[arg-type]  # floats
        max_epoch=1,
    )()
    updated = [*reference.trained.parameters(), scales[1]]
    optimizer = torch.optim.SGD(updated, lr=0.1)
    for batch, norm, other in zip(make_loader(3), norms.found, others, strict=True):
        scaled_loss(reference, batch, scales[1])[1].backward()
        assert torch.equal(norm, torch.nn.utils.get_total_norm([p.grad for p in updated]))  # type: ignore[misc]  # all have one
        assert torch.equal(other, reference.other.weight.grad)  # type: ignore[arg-type]  # as above
        if "max_norm" in clip:
            torch.nn.utils.clip_grad_norm_(updated, clip["max_norm"])
        else:
            torch.nn.utils.clip_grad_value_(updated, clip["max_value"])
        optimizer.step()
        optimizer.zero_grad()
        reference.other.zero_grad()
    assert equal(weights(model), weights(reference))
    assert torch.equal(*scales)
    assert model.other.weight.grad is None


def fp16_trainer(hooks: Any, model: torch.nn.Module, scale: float = 1024.0) -> HookBasedTrainer:
    """Build a trainer with a real gradient scaler, which Accelerate creates only for a GPU."""
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    processor = SimpleBatchProcessor.from_callable(loss_of)
    loader = make_loader()
    return HookBasedTrainer(
        accelerator, model, loader, processor, optimizer, hooks=hooks, max_epoch=1
    )


def skip_one(args: PipelineHookArgs) -> None:
    if args.global_step_id == 3:
        args.skip_reason = "a test"


@pytest.mark.parametrize(
    "clip", [{"max_norm": 0.05}, {"max_value": 0.01}, {"max_norm": 0.05, "norm_type": 1.0}]
)
def test_gradients_are_unscaled_once(clip: dict[str, float]) -> None:
    """Norms are of unscaled gradients with any number of hooks, also when skipping."""
    skipping = PipelineHooks()
    skipping.register_hook("on_optimizer_step", HookContext.from_callable(before=skip_one))
    model, norms, later = make_model(), Norms(), Norms(3.0)
    config = GradientClippingHookConfig(**clip)  # type: ignore[arg-type]  # floats
    later.name = "later"
    trainer = fp16_trainer([norms, config, later, skipping], model)
    trainer()
    assert trainer.progress.skipped_optimizer_steps == 1
    assert trainer.progress.optimizer_step_id == 6
    loss_of(reference := make_model(), next(iter(make_loader())))[1].backward()
    gradients = [p.grad for p in reference.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    torch.testing.assert_close(norms.found[0], norm, rtol=1e-3, atol=0)  # the forward is in fp16


def test_other_unscaling_errors_propagate() -> None:
    """Only a second unscaling in one update is ignored."""
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu")
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared = accelerator.prepare(model, optimizer)[0]
    accelerator.scaler.scale(prepared(torch.ones(1, 4)).sum()).backward()
    accelerator.scaler.unscale_(optimizer)
    accelerator.scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) is being called after step"):
        gradient_norm(
            PipelineHookArgs(PipelineRun.standalone(accelerator=accelerator, model=model))
        )


def test_accelerate_clips_sharded_gradients() -> None:
    """Accelerate clips sharded gradients: once for the norm, once to clip."""

    class Sharding(Accelerator):  # type: ignore[misc]  # which has no types
        calls: list[tuple[float, float]]

        @property
        def distributed_type(self) -> DistributedType:
            return DistributedType.FSDP

        def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
            self.calls.append((max_norm, norm_type))
            return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)

    accelerator = Sharding(cpu=True)
    accelerator.calls = []
    model = make_model()
    loss_of(model, next(iter(make_loader())))[1].backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    args = PipelineHookArgs(PipelineRun.standalone(accelerator=accelerator, model=model))
    norm = gradient_norm(args)
    assert equal(before, [p.grad for p in model.parameters() if p.grad is not None])
    assert norm is not None
    assert norm == torch.nn.utils.get_total_norm(before)
    GradientClippingHookConfig(max_norm=0.05)().begin("on_optimizer_step", args).__enter__()
    assert accelerator.calls == [(float("inf"), 2.0), (0.05, 2.0)]
    assert args.grad_norm is norm
    assert gradient_norm(args) is norm
