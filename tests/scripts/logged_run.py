"""A run that publishes metrics of every kind, for tests of logging.

Subprocesses and ranks run this file as a script.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.hooks.metrics_logger import MetricsLogger, MetricsLoggerConfig
from robo_orchard_lab.pipeline.metrics.exchange import StateReduction
from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig
from robo_orchard_lab.pipeline.trigger import EveryEpochs, EverySteps
from tiny import make_trainer

EVERY = EverySteps(4) | EveryEpochs(1)


class WeightSum:
    """Deferred evaluation of a device tensor."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._sum = torch.stack([p.detach().double().sum() for p in model.parameters()])

    def names(self) -> Sequence[str]:
        return ["eval/weights/sum"]

    def states(self) -> Sequence[tuple[torch.Tensor, StateReduction]]:
        return [(self._sum, "mean")]

    def values(self, reduced: Sequence[torch.Tensor]) -> Mapping[str, float]:
        return {"eval/weights/sum": reduced[0].sum().item()}


class Publisher(PipelineHooks):
    """Hook that publishes numbers and tensors in steps, updates and epochs."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.gathered = torch.zeros((), dtype=torch.float64)
        self.on_loop.before(self.open)
        self.on_step.after(self.publish)
        self.on_optimizer_step.after(
            lambda args: args.metrics.publish("updates", args.optimizer_step_id, "max")
        )
        self.on_epoch.after(self.end_epoch)
        self.register_at_commit(lambda args: args.requests.evaluate("it is time"), "3 steps")

    def open(self, args: PipelineHookArgs) -> None:
        board = args.metrics

        def publish() -> None:
            board.publish("loss/gathered", self.gathered)
            self.gathered = torch.zeros((), dtype=torch.float64)

        board.before_logging(publish, owner=self)
        args.run.evaluations[self.name] = lambda args: board.defer(WeightSum(args.model))

    def publish(self, args: PipelineHookArgs) -> None:
        if args.exception is not None:
            return
        assert args.loss is not None
        self.losses.append(args.loss.item())
        self.gathered += args.loss
        args.metrics.publish("loss/total", args.loss, weight=4)
        args.metrics.publish("step", args.global_step_id + 1, "last")
        args.metrics.publish("loss/smallest", args.loss, "min")

    def end_epoch(self, args: PipelineHookArgs) -> None:
        if args.epoch_completed:
            args.metrics.publish("epochs", args.epoch_id + 1, "last")

    def state_dict(self) -> dict[str, Any]:
        return {"gathered": self.gathered.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.gathered = state["gathered"].clone()


class StopAfter(PipelineHooks):
    """Hook that calls a function at the end of a step."""

    def __init__(self, step: int, call: Any) -> None:
        super().__init__()
        self.on_step.after(lambda args: call(args) if args.global_step_id + 1 == step else None)


def logged_trainer(
    path: Path, *hooks: PipelineHooks, accumulate: int = 2, **options: Any
) -> HookBasedTrainer:
    """Build a trainer with 7 batches of 4 per epoch that logs to a file."""
    sinks = {"file": JsonLinesSinkConfig(path=str(path))}
    logger = MetricsLogger(MetricsLoggerConfig(every=EVERY, sinks=sinks))
    return make_trainer([logger, Publisher(), *hooks], accumulate=accumulate, **options)


def main(kind: str, folder: Path) -> None:
    path = folder / "metrics.jsonl"
    logging.basicConfig()
    if kind == "killed":
        kill = StopAfter(18, lambda args: os.kill(os.getpid(), signal.SIGKILL))
        logged_trainer(path, kill, max_epoch=4, resume_from=folder / "saved")()
    elif kind == "full":
        trainer = logged_trainer(path, max_epoch=4, resume_from=folder / "saved")
        # From here on: with its first optimizer, torch 2.8 writes a larger file elsewhere.
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        trainer()
        resource.setrlimit(resource.RLIMIT_FSIZE, before)  # the exit writes other files
    elif kind == "ranks":
        stop = StopAfter(6, lambda args: args.requests.stop("enough"))
        trainer = logged_trainer(path, stop, max_epoch=4)
        logged: list[bool] = []
        trainer.hooks.on_step.before(lambda args: logged.append(args.metrics.is_logged))
        trainer()
        publisher = next(hook for hook in trainer.hooks.all_hooks() if isinstance(hook, Publisher))
        rank = trainer.accelerator.process_index
        result = {"losses": publisher.losses, "logged": logged}
        (folder / f"rank{rank}.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
