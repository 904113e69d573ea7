"""Evaluate a policy with noise by rollouts on several ranks; each rank writes its metrics."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from reaching import reach
from reaching_policy import ReachPolicy, make_policy_trainer
from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks
from robo_orchard_lab.policy import RolloutEvaluationConfig


def main(folder: Path) -> None:
    found: dict[str, float] = {}
    records = PipelineHooks("records")

    @records.on_loop.before
    def listen(args: PipelineHookArgs) -> None:
        args.metrics.listen(note)

    def note(record: Any) -> None:
        found.update({v.name: v.value for v in record.values if v.name.startswith("eval/")})

    policy = ReachPolicy(noise=0.5)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    hook = RolloutEvaluationConfig(
        environment=reach(trace=str(folder / "trace"), limit=5),
        every=None,
        episodes=4,
        environments=2,
    )
    trainer = make_policy_trainer([hook, records], policy, optimizer=optimizer, max_step=1)
    trainer()
    rank = trainer.accelerator.process_index
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
