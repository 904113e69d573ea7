"""Script of ``test_trigger_processes.py`` on each rank: hooks by different clocks."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks
from robo_orchard_lab.testing import count_collectives
from tiny import make_loader, make_trainer, without_checks

STEPS = 400


def main(folder: Path, kind: str) -> None:
    clock = 0.0
    fired: dict[str, list[int]] = {"alone": [], "joined": [], "pair": []}
    hooks = PipelineHooks("by the clock")

    @hooks.on_step.after(when="60 s")
    def alone(args: PipelineHookArgs) -> None:
        fired["alone"].append(args.global_step_id + 1)

    @hooks.on_step.after(when="60 s | at steps 150")
    def joined(args: PipelineHookArgs) -> None:
        fired["joined"].append(args.global_step_id + 1)

    @hooks.on_batch.before(when="90 s")
    def pair(args: PipelineHookArgs) -> None:
        fired["pair"].append(args.global_step_id + 1)

    if kind == "fails":  # a trigger that needs an exchange in every step
        hooks.on_step.after(when="1 s")(lambda args: None)

    @hooks.on_batch.before
    def work(args: PipelineHookArgs) -> None:
        nonlocal clock
        # Half a second a step on rank 0, more on other ranks; one step is slow.
        clock += 0.5 * (1 + 3 * rank) + (10 if args.global_step_id == 250 else 0)
        if kind == "fails" and rank == 1 and args.global_step_id == 30:
            raise ValueError("planted on one rank")

    loader = make_loader(2 * STEPS, batch_size=1)
    trainer = make_trainer(hooks, loader=loader, max_step=STEPS, run_folder=folder)
    rank = trainer.accelerator.process_index
    time.monotonic = lambda: 7000.0 * rank + clock
    with count_collectives() as calls:
        trainer()
    exchanges = sum(call.places[-1].function == "Agreement.settle" for call in calls)
    others = (
        len(without_checks(calls)) - exchanges - 1
    )  # one collective at the start compares the hooks
    found = {"fired": fired, "collectives": exchanges, "others": others}
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
