"""One training in its own process:

`python -m benchmarks.trainings.sample WORKLOAD CONTENDER RESULT_FILE BEGAN_NS [--quick]`. CONTENDER
is `module:function`, and BEGAN_NS the machine's clock at the start of the process. Files of the
training are written to the folder of RESULT_FILE.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import resource
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter_ns, process_time
from typing import Any

import torch

from benchmarks.trainings.workloads import WORKLOADS, Job


@dataclass(frozen=True, slots=True)
class Sample:
    """Figures of one training.

    The training lasts from its first forward pass to the return of the framework's call.
    """

    seconds: float
    cpu_seconds: float
    """Of all threads and child processes."""
    start_seconds: float
    """From the start of the process to the first forward pass of the training."""
    peak_mb: float
    """Largest resident memory of the process."""
    weights: str
    """Digest of the final weights."""
    evaluation_loss: float
    training_loss: float
    """Of the final weights on the first training batches."""
    faults: list[str]
    """Parts of the work that are missing."""


class Start:
    """Clocks at the first forward pass of a training."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.ns, self.cpu_seconds = 0, 0.0
        self._handle = model.register_forward_pre_hook(self._mark)

    def _mark(self, model: torch.nn.Module, inputs: Any) -> None:
        if model.training:  # a framework may evaluate before
            self._handle.remove()
            self.ns, self.cpu_seconds = perf_counter_ns(), cpu_seconds()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("contender")
    parser.add_argument("result_file", type=Path)
    parser.add_argument("began_ns", type=int)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    module, _, function = arguments.contender.partition(":")
    train = getattr(importlib.import_module(f"benchmarks.trainings.{module}"), function or "train")
    folder = arguments.result_file.parent
    job = Job(WORKLOADS[arguments.workload], folder, quick=arguments.quick)
    start = Start(job.model)
    evaluations = train(job)
    end_ns, end_cpu_seconds, peak_mb = perf_counter_ns(), cpu_seconds(), peak_memory_mb()
    losses = [mean_loss(job, samples) for samples in (job.evaluation_set, job.training_set)]
    sample = Sample(
        seconds=(end_ns - start.ns) / 1e9,
        cpu_seconds=end_cpu_seconds - start.cpu_seconds,
        start_seconds=(start.ns - arguments.began_ns) / 1e9,
        peak_mb=peak_mb,
        weights=digest(job.model),
        evaluation_loss=losses[0],
        training_loss=losses[1],
        faults=missing_work(job, evaluations, losses[0]),
    )
    arguments.result_file.write_text(json.dumps(asdict(sample)), encoding="utf-8")


def missing_work(job: Job, evaluations: list[float], loss: float) -> list[str]:
    """Return the parts of the work that a contender did not do."""
    faults = []
    if len(evaluations) != job.size.epochs or abs(evaluations[-1] - loss) > 0.02 * loss:
        faults.append(f"its evaluations found {evaluations}, its final weights have {loss:.4f}")
    state: list[torch.Tensor] = [*job.model.parameters()]
    for values in job.optimizer.state.values():
        state += [value for value in values.values() if isinstance(value, torch.Tensor)]
    expected = job.size.epochs * sum(tensor.nbytes for tensor in state)
    written = sum(file.stat().st_size for file in job.folder.rglob("*") if file.is_file())
    if written < expected:
        faults.append(f"it wrote {written:,} bytes, checkpoints have {expected:,}")
    return faults


@torch.no_grad()
def mean_loss(job: Job, samples: Any) -> float:
    """Return the mean loss over the samples, of training samples over the first batches."""
    job.model.eval()
    losses = []
    for batch, _ in zip(job.make_loader(samples), range(job.size.evaluation), strict=False):
        with job.autocast():
            losses.append(float(job.loss(job.model, batch)))
    return sum(losses) / len(losses)


def digest(model: torch.nn.Module) -> str:
    """Return a digest of all parameters."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().numpy().tobytes())
    return found.hexdigest()[:16]


def cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return process_time() + children.ru_utime + children.ru_stime


def peak_memory_mb() -> float:
    """Return the process's peak; that of `resource` includes the parent's at the start."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("expected VmHWM in /proc/self/status; this benchmark requires Linux")


if __name__ == "__main__":
    main()
