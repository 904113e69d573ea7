"""Script of ``test_strays.py``: a user's script with an action on one rank only.

The hook makes a request without rank_local=True, or a batch processor returns weights.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks, SimpleBatchProcessor
from robo_orchard_lab.pipeline.hooks import SaveCheckpointConfig, ValidationHookConfig
from tiny import loss_of, make_loader, make_trainer


def main(folder: Path, kind: str, rank: int) -> None:
    hooks = PipelineHooks("mistaken")

    @hooks.on_step.after(when="at steps 3")
    def ask(args: PipelineHookArgs) -> None:
        if kind != "weight" and args.accelerator.process_index == rank:
            asks: Any = getattr(args.requests, kind)
            asks("it seemed right here")

    def loss(model: Any, batch: Any) -> Any:
        weighs = kind == "weight" and int(os.environ["RANK"]) == rank
        return (*loss_of(model, batch), *([4] if weighs else []))

    trainer = make_trainer(
        [
            hooks,
            SaveCheckpointConfig(every="2 steps"),
            ValidationHookConfig(every="2 steps")(dataloaders={"val": make_loader(2)}),
        ],
        batch_processor=SimpleBatchProcessor.from_callable(loss),
        max_epoch=30,
        run_folder=folder / "run",
    )
    trainer()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
