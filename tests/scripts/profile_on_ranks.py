"""Script of ``test_hook_profiler.py`` on each rank: profiled runs, one of which fails."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState

from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.hooks import HookProfilerConfig, MetricsLoggerConfig
from robo_orchard_lab.testing import count_collectives
from tiny import make_loader, make_trainer


def main(folder: Path, fails: bool) -> None:
    rank = PartialState(cpu=True).process_index
    slow = PipelineHooks("slow")

    @slow.on_step.before
    def nap(args: PipelineHookArgs) -> None:
        time.sleep(0.004 * rank)
        if fails and rank == 1 and args.global_step_id == 7:
            raise RuntimeError("rank 1 fails")

    profiler = HookProfilerConfig(trace_start_step=2, trace_steps=3)
    hooks: list[Any] = [slow, MetricsLoggerConfig(every="5 steps", sinks=[])]
    runs: dict[str, list[Any]] = {"on": [profiler]} if fails else {"off": [], "on": [profiler]}
    for name, more in runs.items():
        trainer = make_trainer(
            [*hooks, *more], loader=make_loader(24), max_step=10, run_folder=folder / name
        )
        with count_collectives() as calls:
            trainer()
        (folder / f"collectives.{name}.{rank}").write_text(str(len(calls)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), fails=sys.argv[2] == "fails")
