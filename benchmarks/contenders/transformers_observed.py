"""Transformers' Trainer with its default log and progress bar, every 50 steps."""

import contextlib
import tempfile
from pathlib import Path

from benchmarks.contenders.transformers_peer import make_trainer
from benchmarks.workload import Job


def train(job: Job, hook_count: int) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        open(Path(folder) / "progress.txt", "w", encoding="utf-8") as shown,
        contextlib.redirect_stdout(shown),
        contextlib.redirect_stderr(shown),
    ):
        make_trainer(job, folder, logging_steps=50, disable_tqdm=False).train()
