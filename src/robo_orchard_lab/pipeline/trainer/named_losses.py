"""Steps of several optimizers: named losses, each for the parameters of its own optimizer."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import torch

from robo_orchard_core.utils.config.errors import suggest_name
from robo_orchard_lab.pipeline.context import SKIP_TOO_LATE, NamedUpdates, PipelineHookArgs
from robo_orchard_lab.pipeline.distributed.collectives import broadcast_tensors
from robo_orchard_lab.pipeline.errors import (
    BatchProcessorError,
    PipelineConfigError,
    PipelineStateError,
)
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.hooks.optimizer import (
    NamedOptimizersHook,
    trainable_parameters,
)
from robo_orchard_lab.pipeline.model import autocast_context
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun

_SHARED_GRAPH = (
    "two yielded losses share a part of their graph: compute it again after the first yield, or "
    "return (outputs, {name: loss, ...}), whose backward passes keep the graph"
)


class NamedLosses:
    """Forward and backward passes of a batch with several optimizers.

    The batch processor has two forms::

        def forward(self, model, batch):      # named steps
            ...
            yield "d", loss_d                 # backward pass, and update at a boundary
            ...                               # computes with the new weights
            yield "g", loss_g
            return outputs

        def forward(self, model, batch):      # one forward pass
            return outputs, {"d": loss_d, "g": loss_g}

    A named step runs as::

        with on_model_forward: the code of the processor up to the next yield or return
        with on_model_backward: (loss / divisor).backward(inputs=parameters of its optimizer)
        with on_optimizer_step: ...           # at a boundary, see OptimizerHook

    The code after the last yield runs in ``on_model_forward`` as well. In the second form,
    backward passes follow in the order of the mapping, each in ``on_model_backward``; the updates
    follow at the end of ``on_step``. A loss adds to the gradients of its own optimizer only.

    A processor with ``forward_with_updates(model, batch, updates)`` instead makes its updates
    itself, within ``on_model_forward``: it calls ``updates.backward(loss)`` and
    ``updates.make_update(name)``, and returns the outputs. Accumulation is its own as well.

    Raises:
        PipelineConfigError: such a processor with accumulation by the accelerator or with fp16.
    """

    def __init__(
        self, run: PipelineRun, hooks: PipelineHooks, updates: NamedOptimizersHook
    ) -> None:
        self._run = run
        self._updates = updates
        self._autocast = autocast_context(run.accelerator)
        self._on_model_forward = hooks.get_channel("on_model_forward").run
        self._on_model_backward = hooks.get_channel("on_model_backward").run
        self._steps: Generator[Any, Any, Any] | None = None
        self._losses: Mapping[str, torch.Tensor] = {}
        self._keeps_graph = False
        self._committed: bool | None = None  # the result of a yield
        self._is_replicated = run.accelerator.num_processes > 1
        self._accumulates = run.accelerator.gradient_accumulation_steps > 1
        self._own_forward = getattr(run.batch_processor, "forward_with_updates", None)
        if self._own_forward is not None and (self._accumulates or run.scalers):
            raise PipelineConfigError(
                f"{type(run.batch_processor).__name__} makes its updates itself: expected "
                "gradient_accumulation_steps=1 and no fp16, since it accumulates and scales "
                "itself; pass Accelerator() or mixed_precision='bf16'"
            )
        self._args = PipelineHookArgs(run)  # of the step, for the processor's own updates

    def run_batch(self, args: PipelineHookArgs) -> None:
        """Run all forward and backward passes of a batch, and the updates of named steps."""
        args._named = NamedUpdates()
        if self._is_replicated:
            broadcast_tensors(list(self._run.model.buffers()))  # a collective, as in DDP
        self._steps, self._losses, self._keeps_graph, self._committed = None, {}, False, None
        self._on_model_forward(args, self._forward)
        try:
            self._run_steps(args)
        finally:
            self._close_steps()
        losses, self._losses = self._losses, {}
        for count, (name, loss) in enumerate(losses.items(), start=1):
            args.begin_entry(name, loss)
            self._keeps_graph = count < len(losses)
            self._on_model_backward(args, self._backward)
        args.begin_entry(None)

    def _run_steps(self, args: PipelineHookArgs) -> None:
        """Run the named steps after the first forward pass, if the processor yielded one."""
        while args.optimizer_name is not None:
            self._on_model_backward(args, self._backward)
            if args._at_accumulation_boundary:
                self._updates.update(args)
            self._committed = args.update_committed
            args.begin_entry(None)
            self._on_model_forward(args, self._resume)

    def _close_steps(self) -> None:
        """End the processor's code where an error has left it."""
        if self._steps is not None:
            self._steps.close()

    def _forward(self, args: PipelineHookArgs) -> None:
        if args._batch_skip_reason is not None:
            raise PipelineStateError(SKIP_TOO_LATE)
        if self._own_forward is not None:
            self._args = args
            with self._autocast():
                args.model_outputs = self._own_forward(self._run.model, args.batch, self)
            return
        with self._autocast():
            result: Any = self._run.batch_processor.forward(self._run.model, args.batch)
        if isinstance(result, Generator):
            self._steps = result
            self._resume(args)
            return
        if not isinstance(result, (tuple, list)) or not isinstance((*result, None)[1], Mapping):
            found = type(result).__name__
            if isinstance(result, (tuple, list)) and len(result) > 1:
                found += f" with a loss of type {type(result[1]).__name__}, which has no name"
            raise self._wrong(found)
        if len(result) != 2:
            raise self._wrong("a weight, which several optimizers don't support")
        args.model_outputs, losses = result
        self._losses = {name: self._checked(name, loss) for name, loss in losses.items()}
        assert args._named is not None
        args._named.losses.update({name: loss.detach() for name, loss in self._losses.items()})

    def backward(self, loss: torch.Tensor, **options: Any) -> None:
        """Run a backward pass into all parameters, with options of ``Tensor.backward``."""

        def backward(args: PipelineHookArgs) -> None:
            assert args.attached_loss is not None
            divisor = args._loss_divisor  # of ranks with batches of different sizes
            scaled = args.attached_loss if divisor == 1.0 else args.attached_loss / divisor
            scaled.backward(**options)

        self._args.attached_loss = loss
        self._on_model_backward(self._args, backward)

    def make_update(self, name: str) -> bool:
        """Step an optimizer with the gradients of its parameters, which are None afterwards.

        Return True if the update was committed, False if a hook skipped the update.
        """
        args, loss = self._args, self._args.attached_loss
        args.begin_entry(name, loss)
        if args._named is not None and loss is not None:
            args._named.losses[name] = loss.detach()
        self._updates.add_loss(name)
        self._updates.update(args)
        committed = bool(args.update_committed)
        torch.clear_autocast_cache()  # of the weights before the update
        args.begin_entry(None)
        return committed

    def _resume(self, args: PipelineHookArgs) -> None:
        """Run the processor up to its next yield or return; autocast ends with each of them."""
        assert self._steps is not None
        try:
            with self._autocast():
                step = self._steps.send(self._committed)
        except StopIteration as end:
            args.model_outputs = end.value
            return
        if not isinstance(step, tuple) or len(step) != 2:
            raise self._wrong(f"a yield of {step!r:.60}")
        name, loss = step
        loss = self._checked(name, loss)
        assert args._named is not None
        if self._accumulates and name in args._named.losses:
            # Its update would have the gradients of the last batch of the window only.
            raise BatchProcessorError(
                f"{self._place()}: expected one loss for {name!r} in a step with gradient "
                "accumulation, found a second one; add the losses, or leave out "
                "gradient_accumulation_steps"
            )
        args.begin_entry(name, loss)
        args._named.losses[name] = loss.detach()

    def _checked(self, name: Any, loss: Any) -> torch.Tensor:
        known = self._run.optimizers
        if name not in known:
            hint = suggest_name(str(name), list(known), "optimizers:")
            raise BatchProcessorError(
                f"{self._run.locate('optimizer')}: {self._place()} has a loss for {name!r:.60}, "
                f"which is no optimizer; {hint}"
            )
        # A loss without a graph is right if a hook has frozen all parameters of its optimizer.
        if (
            not isinstance(loss, torch.Tensor)
            or loss.numel() != 1
            or (not loss.requires_grad and trainable_parameters(known[name]))
        ):
            found = type(loss).__name__
            if isinstance(loss, torch.Tensor):
                graph = "" if loss.requires_grad else ", without a gradient"
                found = f"a tensor of shape {tuple(loss.shape)}{graph}"
            raise BatchProcessorError(
                f"{self._place()}: expected a scalar loss with its graph for {name!r}, found "
                f"{found}; reduce it, such as by loss.mean(), and leave out a loss that no "
                "parameter has part in"
            )
        return loss

    def _place(self) -> str:
        return f"{type(self._run.batch_processor).__name__}.forward"

    def _wrong(self, found: str) -> BatchProcessorError:
        names = ", ".join(f"{name!r}: loss" for name in self._run.optimizers)
        return BatchProcessorError(
            f"{self._place()} must yield (name, loss) for its optimizers, or return (outputs, "
            f"{{{names}}}); got {found}"
        )

    def _backward(self, args: PipelineHookArgs) -> None:
        loss, optimizer, name = args.attached_loss, args.optimizer, args.optimizer_name
        assert loss is not None
        assert optimizer is not None
        assert name is not None
        self._updates.add_loss(name)
        scaled = loss if args._loss_divisor == 1.0 else loss / args._loss_divisor
        if args.scaler is not None:
            scaled = args.scaler.scale(scaled)
        if parameters := trainable_parameters(optimizer):  # else all are frozen
            try:
                scaled.backward(inputs=parameters, retain_graph=self._keeps_graph)
            except RuntimeError as error:
                if "through the graph a second time" in str(error):
                    error.add_note(_SHARED_GRAPH)
                raise
