"""This project's trainer with its HookProfiler."""

import logging
import tempfile

from benchmarks.contenders.ours import make_trainer
from benchmarks.workload import Job
from robo_orchard_lab.pipeline.hooks import HookProfilerConfig


def train(job: Job, hook_count: int) -> None:
    log = logging.getLogger("robo_orchard_lab")
    handler = logging.NullHandler()  # for the table
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(job, hook_count, run_folder=folder)
            trainer.hooks += HookProfilerConfig(max_share=None)
            trainer()
    finally:
        log.removeHandler(handler)
