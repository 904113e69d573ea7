"""Overhead of a trainer on the step of a tiny model in two processes with gradient exchange.

Two processes over gloo train the same job by each contender in turns: DDP in a loop, Accelerate's
loop, and this trainer. All batches are equal, so all contenders end with the same weights. The
figures are the first process's: step time, mostly waiting for the other process, and processor time
of all threads.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from time import process_time_ns, sleep
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from benchmarks.contenders import accelerate_loop, ours
from benchmarks.environment import describe
from benchmarks.pythons import HERE, variables
from benchmarks.report import Report, Row, Table
from benchmarks.workload import (
    BATCH_SIZE,
    WARM_UP_STEPS,
    BatchesInMemory,
    Job,
    Settings,
    TinyModel,
    identity_collate,
)

PROCESSES = 2
PLAIN = "DDP, plain loop"
ACCELERATE = "Accelerate, plain loop"
NOTE = (
    "All end with the plain loop's weights, except for Accelerate's loop, whose schedule moves "
    "once for each process."
)
STEPS, ROUNDS = 600, 11
QUICK_STEPS, QUICK_ROUNDS = 200, 1
LONGEST_S = 300


class ClockedModel(TinyModel):
    """Model that also records the processor time at the start of each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.cpu_ns: list[int] = []

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # the base class's name
        self.cpu_ns.append(process_time_ns())
        return super().forward(input)


class RankJob(Job):
    """Job with `settings.steps` steps in each process."""

    model: ClockedModel

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.dataset = BatchesInMemory(settings.steps * PROCESSES, pool=1)
        self.loader = DataLoader(
            self.dataset,
            batch_size=BATCH_SIZE,
            collate_fn=identity_collate,  # type: ignore[arg-type]  # __getitems__ gives no list
        )

    def make_model(self) -> ClockedModel:
        return ClockedModel()

    def cpu_ns_per_step(self) -> float:
        """Return the processor time of all threads per step, averaged after the warm-up."""
        marks = self.model.cpu_ns[WARM_UP_STEPS:]
        return (marks[-1] - marks[0]) / (len(marks) - 1)


def _plain_loop(job: RankJob) -> None:
    loader = DataLoader(
        job.dataset,
        batch_size=BATCH_SIZE,
        sampler=DistributedSampler(job.dataset, shuffle=False),
        collate_fn=identity_collate,  # type: ignore[arg-type]  # as above
    )
    model, optimizer, scheduler = (
        DistributedDataParallel(job.model),
        job.optimizer,
        job.scheduler,
    )
    model.train()
    for inputs, labels in loader:
        optimizer.zero_grad()
        loss = job.loss(model(inputs), labels)
        loss.backward()
        optimizer.step()
        scheduler.step()


CONTENDERS: dict[str, Callable[[RankJob], None]] = {
    PLAIN: _plain_loop,
    ACCELERATE: partial(accelerate_loop.train, hook_count=0),
    "this trainer, 0 hooks": partial(ours.train, hook_count=0),
    "this trainer, 10 hooks": partial(ours.train, hook_count=10),
}


def run(*, quick: bool) -> Report:
    steps, rounds = (QUICK_STEPS, QUICK_ROUNDS) if quick else (STEPS, ROUNDS)
    found, faults = _measure(steps, rounds)
    tables = [
        _table("What the first process takes of the processors", found["cpu"]),
        _table("A step, in the time of the clock", found["clock"]),
    ]
    return Report("two_processes", tables, faults, describe(["torch", "accelerate"]))


def _table(title: str, samples: Mapping[str, Mapping[str, list[float]]]) -> Table:
    rows = [
        Row.of(name, sample["own"], reference=sample["reference"] or None, scale=1e-3)
        for name, sample in samples.items()
    ]
    return Table(title, "us per step", rows, [NOTE])


def _measure(steps: int, rounds: int) -> tuple[dict[str, Any], list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        ranks = []
        for rank in range(PROCESSES):
            of_rank = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(PROCESSES),
                "LOCAL_WORLD_SIZE": str(PROCESSES),
                "MASTER_ADDR": "localhost",  # required by Accelerate, and unused
                "MASTER_PORT": "0",
            }
            command = [sys.executable, "-m", "benchmarks.two_processes"]
            ranks.append(
                subprocess.Popen(
                    [*command, f"{folder}/store", str(result), str(steps), str(rounds)],
                    cwd=HERE.parent,
                    env={**variables("own"), **of_rank},
                    stdout=sys.stderr,
                )
            )
        try:
            codes = [process.wait(LONGEST_S) for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        if any(codes):
            raise RuntimeError(f"the processes ended with {codes}; their errors stand above")
        found = json.loads(result.read_text(encoding="utf-8"))
        return found["samples"], found["faults"]


def _rank(store: str, result: str, steps: int, rounds: int) -> None:
    """Run one rank; the first rank writes the result."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    settings = Settings(steps)
    weights: dict[str, torch.Tensor] = {}

    def timed(name: str) -> tuple[float, float]:
        job = RankJob(settings)
        dist.barrier()
        CONTENDERS[name](job)
        weights[name] = job.weights()
        return job.cpu_ns_per_step(), job.ns_per_step()

    kinds = ("cpu", "clock")
    samples: dict[str, dict[str, dict[str, list[float]]]] = {
        kind: {name: {"own": [], "reference": []} for name in CONTENDERS} for kind in kinds
    }
    for round_id in range(rounds + 1):  # the first is discarded
        for name in list(CONTENDERS)[1:]:
            before, own = timed(PLAIN), timed(name)
            for kind, reference, sample in zip(kinds, before, own, strict=True):
                if round_id > 0:
                    samples[kind][PLAIN]["own"].append(reference)
                    samples[kind][name]["reference"].append(reference)
                    samples[kind][name]["own"].append(sample)
    faults = [
        f"{name} ends with other weights than the plain loop"
        for name, trained in weights.items()
        if name != ACCELERATE and float((trained - weights[PLAIN]).abs().max()) > 1e-5
    ]
    if rank == 0:
        document = {"samples": samples, "faults": faults}
        Path(result).write_text(json.dumps(document), encoding="utf-8")
    dist.barrier()
    sleep(1.0)  # a process that exits during the other's exchange aborts the other
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
