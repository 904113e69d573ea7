"""A script of a user's whose hook asks for something on one rank, and not alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.hooks import SaveCheckpointConfig, ValidationHookConfig
from tiny import make_loader, make_trainer


def main(folder: Path, kind: str, rank: int) -> None:
    hooks = PipelineHooks("mistaken")

    @hooks.on_step.after(when="at steps 3")
    def ask(args: PipelineHookArgs) -> None:
        if args.accelerator.process_index == rank:
            asks: Any = getattr(args.requests, kind)
            asks("it seemed right here")

    trainer = make_trainer(
        [
            hooks,
            SaveCheckpointConfig(every="2 steps"),
            ValidationHookConfig(every="2 steps")(dataloaders={"val": make_loader(2)}),
        ],
        max_epoch=30,
        run_folder=folder / "run",
    )
    trainer()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
