"""Script of ``test_agreement_processes.py`` on each rank: a sequence of trainings."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState

from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.checkpoint import CheckpointStore
from robo_orchard_lab.pipeline.distributed.agreement import Agreement
from robo_orchard_lab.pipeline.distributed.collectives import gather_objects
from robo_orchard_lab.pipeline.errors import PipelineStateError, RunPreempted
from robo_orchard_lab.pipeline.hooks import (
    MetricsLoggerConfig,
    PreemptionConfig,
    SaveCheckpointConfig,
    TimeLimitConfig,
    ValidationHookConfig,
)
from robo_orchard_lab.testing import count_collectives, count_host_reads
from tiny import make_loader, make_trainer, without_checks

STEPS = 48


class AsksAlone(PipelineHooks):
    """Makes every kind of request on one rank, each at a step of its own."""

    def __init__(self, rank: int, folder: Path) -> None:
        super().__init__()
        self.rank, self.folder = rank, folder
        self.done: list[str] = []
        self.on_loop.before(self.declare)
        self.on_step.after(self.ask)
        self.on_evaluation.before(lambda args: self.done.append(f"evaluation {args.evaluation}"))

    def declare(self, args: PipelineHookArgs) -> None:
        args.requests.allow_rank_local()
        args.requests.listen(
            lambda asked: self.done.append(
                f"{args.global_step_id}: {asked.reason}, {re.sub(':[0-9]+', '', asked.by)}"
            )
        )

    def ask(self, args: PipelineHookArgs) -> None:
        asks, done = args.requests, args.global_step_id + 1
        if (self.rank, done) == (1, 2):
            asks.save("saved alone", rank_local=True)
            asks.log("logged alone", rank_local=True)
            asks.save_weights(self.folder / "w.safetensors", "weights alone", "Me", rank_local=True)
        if (self.rank, done) == (0, 4):
            asks.evaluate("evaluated alone", "First", name="ValidationHook", rank_local=True)
        time.sleep(0.01)
        # Meanwhile the background save ends.
        if self.rank == 1 and done > 11 and any("save ended" in what for what in self.done):
            asks.stop("stopped alone", "Second", rank_local=True)


def alone(folder: Path, rank: int) -> dict[str, Any]:
    asks = AsksAlone(rank, folder)
    hooks: list[Any] = [
        asks,
        SaveCheckpointConfig(every=None, in_background=True),
        ValidationHookConfig(every="at steps 1000")(dataloaders={"val": make_loader(2)}),
    ]
    trainer = make_trainer(hooks, max_epoch=900, run_folder=folder / "alone", agree_every=5)
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    requests_log = logging.getLogger("robo_orchard_lab.pipeline.requests")
    requests_log.setLevel(logging.INFO)
    requests_log.addHandler(handler)
    trainer()
    requests_log.removeHandler(handler)
    saved = CheckpointStore(folder / "alone" / "checkpoints").list()
    return {
        "done": asks.done,
        "logged": [line for of_rank in gather_objects(logged) for line in of_rank],
        "stopped": trainer.progress.global_step_id,
        "checkpoints": [info.step for info in saved],
        "weights": (folder / "w.safetensors").exists(),
    }


def everything(folder: Path, rank: int, agree_every: int | None) -> dict[str, Any]:
    """Train with every topic that needs agreement, and with observers."""
    hooks = PipelineHooks("by the clock")
    fired: list[int] = []
    hooks.on_step.after(when="1 h")(lambda args: fired.append(args.global_step_id))
    hooks.on_epoch.before(when="2 h")(lambda args: fired.append(args.global_step_id))
    hooks.on_loop.before(lambda args: args.requests.allow_rank_local())

    @hooks.on_step.after(when="at steps 33")
    def send(args: PipelineHookArgs) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    configured = [
        PreemptionConfig(save_checkpoint=False),
        TimeLimitConfig(limit="1 d", save_checkpoint=False),
        MetricsLoggerConfig(every="20 steps"),
    ]
    loader = make_loader(2 * STEPS)
    trainer = make_trainer(
        [*configured, hooks], loader=loader, max_step=STEPS, agree_every=agree_every
    )
    code = None

    @hooks.on_loop.before
    def forget(args: PipelineHookArgs) -> None:  # exclude the comparison of ranks at the start
        calls.clear()
        reads.clear()

    with count_collectives() as calls, count_host_reads() as reads:
        try:
            trainer()
        except RunPreempted as stopped:
            code = stopped.code
    return {
        "code": code,
        "stopped": trainer.progress.global_step_id,
        "fired": fired,
        "collectives": [str(call) for call in without_checks(calls)],
        "reads": [str(read) for read in without_checks(reads)],
    }


def agree(rank: int, processes: int) -> list[int]:
    """Return the numbers agreed on if each rank has a different one."""
    agreement = Agreement(rank, processes)
    agreed: list[int] = []
    for whose in ("first", "any", "all"):
        agreement.topic("number", find=lambda: (rank + 1) % 2 + 1, tell=agreed.append, whose=whose)
    agreement.topic("nothing", find=lambda: rank, tell=agreed.append, whose="all")
    agreement.settle(1)
    return agreed


def diverged(rank: int, processes: int, kind: str) -> str:
    """Return the error of an exchange at different steps, or about different topics."""
    agreement = Agreement(rank, processes)
    agreement.topic("a clock", find=lambda: 0, tell=print)
    if kind == "topics" and rank == 1:
        agreement.topic("a signal", find=lambda: 0, tell=print)
    try:
        agreement.settle(7 + (kind == "steps" and rank == 1))
    except PipelineStateError as error:
        return str(error)
    return "agreed"


def main(folder: Path) -> None:
    state = PartialState(cpu=True)
    rank = state.process_index
    found: dict[str, Any] = {
        kind: diverged(rank, state.num_processes, kind) for kind in ("nothing", "steps", "topics")
    }
    found |= {
        "agreed": agree(rank, state.num_processes),
        "alone": alone(folder, rank),
        "declared": everything(folder, rank, 8),
        "automatic": everything(folder, rank, None),
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
