"""Evaluation and prediction by a trainer, before or after its run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import Accelerator

from robo_orchard_lab.pipeline.batch_processor import BatchProcessor
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.data.evaluation_loader import MaxBatches
from robo_orchard_lab.pipeline.distributed.failure_watch import fail_together
from robo_orchard_lab.pipeline.distributed.stall_clock import StallClock
from robo_orchard_lab.pipeline.errors import PipelineStateError
from robo_orchard_lab.pipeline.evaluator import Evaluator
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.metrics.torchmetrics import MetricInputs, MetricsLike
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from robo_orchard_lab.pipeline.predictions import Predictions


class EvaluationMethods:
    """Methods of a trainer that evaluate its model; the trainer sets the attributes."""

    accelerator: Accelerator
    model: torch.nn.Module
    batch_processor: BatchProcessor
    _hooks: PipelineHooks
    _run: PipelineRun
    _stall_clock: StallClock | None
    _is_open: bool

    def evaluate(
        self,
        dataloaders: Mapping[str, Iterable[Any]],
        *,
        metrics: MetricsLike | None = None,
        metric_inputs: MetricInputs | None = None,
        weights: str | Mapping[str, str | None] | None = None,
        max_batches: MaxBatches = None,
        seed: int = 0,
    ) -> dict[str, float]:
        """Return losses and metrics on named loaders, before or after a run, on all ranks.

        Nothing is published; during a run, a ``ValidationHook`` evaluates.

        Args:
            dataloaders: by name; also ``metrics``, ``metric_inputs``, ``max_batches`` and ``seed``
                are those of :class:`Evaluator`.
            metrics: of torchmetrics, by name.
            metric_inputs: returns the arguments of ``metric.update``.
            weights: name of the hook whose weights to use, such as ``"EMA"``, or several by names
                of your choice: ``{"raw": None, "ema": "EMA"}``; None for the model's own.
            max_batches: limit of batches of each loader, or by its name.
            seed: seed of all random numbers.

        Returns:
            Values by name: ``<loader>/loss``, or ``<loader>/<weights>/loss`` for several weights.

        Raises:
            PipelineConfigError: unknown weights, or nothing to measure; see :class:`Evaluator`.
            PipelineStateError: the trainer is in the middle of a step.
        """
        named = weights if isinstance(weights, Mapping) else {"": weights}
        with self._outside_of_run(named.values()):
            evaluator = Evaluator(
                self.model,
                self.batch_processor,
                dataloaders,
                metrics=metrics,
                metric_inputs=metric_inputs,
                accelerator=self.accelerator,
                max_batches=max_batches,
                seed=seed,
                who="evaluate",
            )
            values: dict[str, float] = {}
            for label, name in named.items():
                with self._run.applied(name):
                    values |= evaluator.evaluate(label)
            if not values:
                evaluator.find_value_names()  # raises, with the remedy
        return values

    def predict(
        self,
        dataloader: Iterable[Any],
        *,
        weights: str | None = None,
        max_batches: int | None = None,
        seed: int = 0,
    ) -> Predictions:
        """Return the outputs for each sample, before or after a run, on all ranks.

        Each sample occurs once at any world size, in the order of the loader. The outputs are those
        of ``evaluation_forward`` where defined, else of ``forward``. ``predictions.save(path)``
        writes a file; the main process should.

        Args:
            dataloader: not prepared; see :class:`EvaluationLoader`.
            weights: name of the hook whose weights to use; None for the model's own.
            max_batches: use only the first batches of the loader.
            seed: seed of all random numbers.

        Raises:
            BatchProcessorError: the outputs have no row for each sample.
            PipelineConfigError, PipelineStateError: as of :meth:`evaluate`.
        """
        with self._outside_of_run([weights]), self._run.applied(weights):
            evaluator = Evaluator(
                self.model,
                self.batch_processor,
                {"data": dataloader},
                accelerator=self.accelerator,
                max_batches=max_batches,
                seed=seed,
                who="predict",
            )
            return evaluator.predict()["data"]

    @contextmanager
    def _outside_of_run(self, weights: Iterable[str | None]) -> Iterator[None]:
        """Let hooks that keep weights add them to the run, if ``weights`` names some."""
        if self._is_open:
            raise PipelineStateError(
                "the trainer is in the middle of a step, where it failed or was called from; in a "
                "hook, use args.evaluating() or a ValidationHook"
            )
        hooks = self._hooks.all_hooks() if any(weights) else ()
        with fail_together(self._stall_clock), ExitStack() as stack:
            for hook in hooks:
                if hasattr(hook, "applied"):
                    stack.enter_context(hook.begin("on_loop", PipelineHookArgs(self._run)))
            yield
