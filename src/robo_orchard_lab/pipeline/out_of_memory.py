"""Notes on out-of-memory errors: the batch, the sizes that fitted before, and what to try."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

import torch

from robo_orchard_lab.pipeline.batch_processor import count_elements, describe_batch
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun

# Several backends, and the CPU's allocator, raise plain RuntimeErrors.
_TEXTS = re.compile("out of memory|not enough memory|DefaultCPUAllocator|ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if a device or the host had too little memory.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    True
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _TEXTS.search(str(error)) is not None


class FittingBatch:
    """Largest batch of those seen at commit points, for the note of an out-of-memory error."""

    def __init__(self) -> None:
        self._elements = -1
        self._text = ""

    def record(self, batch: Any, step: int) -> None:
        """Record a batch that fitted, with the number of completed steps."""
        with suppress(Exception):  # a batch may hold objects of any class
            elements = count_elements(batch)
            if elements > self._elements:
                self._elements = elements
                self._text = f"{describe_batch(batch, shapes=True)} at step {step}"

    def explain(self, error: BaseException, batch: Any, run: PipelineRun) -> None:
        """Add a note to an out-of-memory error of a training step; never raises."""
        if is_out_of_memory(error):
            with suppress(Exception):  # as above, and some errors refuse notes
                error.add_note(self._note(batch, run))

    def _note(self, batch: Any, run: PipelineRun) -> str:
        samples, steps, data = run.count_samples(batch), run.progress.global_step_id, run.data
        before = f"{steps} steps fitted before" if steps else "no step fitted before"
        if data is not None and data.most_samples:
            before += f", with up to {data.most_samples} samples"
        if self._text:
            before += f"; the largest batch of those seen at commit points was {self._text}"
        window = run.accelerator.gradient_accumulation_steps
        remedies = [
            f"batch_size={samples // 2} of the data loader with Accelerator("
            f"gradient_accumulation_steps={2 * window}), which trains the same updates"
            if samples > 1
            else "smaller samples, such as shorter sequences or a lower resolution"
        ]
        if 0 <= self._elements < count_elements(batch):
            remedies.append("a limit for the size of a batch, since smaller ones fitted")
        if run.accelerator.mixed_precision == "no":
            remedies.append("Accelerator(mixed_precision='bf16')")
        remedies.append("torch.utils.checkpoint in the model")
        return (
            f"out of memory with a batch of {samples} samples: "
            f"{describe_batch(batch, shapes=True)}. {before}. Try {', or '.join(remedies)}"
        )


def explain_evaluation(error: BaseException, batch: Any, name: str, batches: int) -> None:
    """Add a note to an out-of-memory error of an evaluation; never raises.

    Args:
        error: any error; others are unchanged.
        batch: batch of the loader.
        name: name of the loader.
        batches: number of batches evaluated before.
    """
    if is_out_of_memory(error):
        with suppress(Exception):  # some errors refuse notes
            error.add_note(
                f"out of memory in the evaluation of dataloaders[{name!r}] with the batch "
                f"{describe_batch(batch, shapes=True)}. {batches} batches fitted before. Try a "
                "smaller batch_size of this loader, which does not change the results"
            )
