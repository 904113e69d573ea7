"""This project's trainer with keyed random numbers, which seed each batch."""

from benchmarks.contenders.ours import make_trainer
from benchmarks.workload import Job


def train(job: Job, hook_count: int) -> None:
    make_trainer(job, hook_count, keyed_by="batch")()
