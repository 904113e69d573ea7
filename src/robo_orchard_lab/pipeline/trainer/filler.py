"""Taking part in a step with a batch that leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from robo_orchard_lab.pipeline.isolation import untouched_random_state
from robo_orchard_lab.pipeline.model import BufferKeeper


@contextmanager
def as_if_not_passed(model: torch.nn.Module) -> Iterator[None]:
    """A ``with`` whose body passes a filler through a model, forward and backward.

    It adds zeros to the gradients, also where the batch gives NaN. Afterwards the buffers, such as
    running statistics, and the random state are what they were. That takes a copy of the buffers,
    and milliseconds. Statistics that ranks join within the forward pass (``SyncBatchNorm``) do
    count the filler; parameters that are sharded take their gradients from it as they are, which
    are zeros unless the batch gives NaN.
    """
    buffers = BufferKeeper()
    buffers.attach(model)
    buffers.keep()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [parameter.register_hook(torch.zeros_like) for parameter in trained]
    try:
        with untouched_random_state({}):
            yield
    finally:
        for handle in handles:
            handle.remove()
        buffers.restore()
