"""This project's trainer, which seeds for every batch, since its dataset may draw."""

from benchmarks.contenders.ours import make_trainer
from benchmarks.workload import Job


def train(job: Job, hook_count: int) -> None:
    make_trainer(job, hook_count, keyed_by="batch")()
