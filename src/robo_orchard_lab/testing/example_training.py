"""A tiny training, as :func:`prove_resume` takes one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from robo_orchard_lab.pipeline.trainer import HookBasedTrainer
from robo_orchard_lab.testing.fixtures import build_training, completed, seed_all


def build(run_folder: Path, resume_from: Any) -> HookBasedTrainer:
    """A trainer of a model with dropout on shuffled data, for two epochs of four steps."""
    seed_all(0)
    return HookBasedTrainer(
        *build_training(completed({})), max_epoch=2, run_folder=run_folder, resume_from=resume_from
    )
