"""This project's trainer with its observing hooks at their defaults."""

import logging
import tempfile
from pathlib import Path

from benchmarks.contenders.ours import make_trainer
from benchmarks.workload import Job
from robo_orchard_lab.pipeline.hooks import (
    LossTrackerConfig,
    MetricsLoggerConfig,
    ProgressBarHookConfig,
    StatsMonitorConfig,
)
from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig


def train(job: Job, hook_count: int) -> None:
    log = logging.getLogger("robo_orchard_lab")
    with tempfile.TemporaryDirectory() as folder:
        handler = logging.FileHandler(Path(folder) / "run.log")
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        try:
            trainer = make_trainer(job, hook_count)
            trainer.hooks += ProgressBarHookConfig(plain=True)
            trainer.hooks += LossTrackerConfig()
            trainer.hooks += StatsMonitorConfig()
            trainer.hooks += MetricsLoggerConfig(
                every="50 steps",
                sinks={"jsonl": JsonLinesSinkConfig(path=str(Path(folder) / "metrics.jsonl"))},
            )
            trainer()
        finally:
            log.removeHandler(handler)
            handler.close()
