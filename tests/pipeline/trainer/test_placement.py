"""Placement of batches on a device; tests on a GPU are in test_gpu.py."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from robo_orchard_lab.pipeline.trainer.setup import batch_placement, movable_in, tensors_in


class MovesByItself(dict[str, Any]):
    """A mapping with its own `to` method, as returned by tokenizers."""

    def to(self, device: Any) -> MovesByItself:
        return self


def test_nothing_is_moved_on_the_cpu() -> None:
    """Batches need no placement on a CPU."""
    assert batch_placement(Accelerator(cpu=True), []) is None


def test_tensors_are_found_in_nested_batches() -> None:
    """Lists, tuples and mappings are searched; objects with a `to` method are moved as one."""
    first, second, third = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    own = MovesByItself(x=third)
    batch = {"a": first, "b": [(second, None), "text", 3, own]}
    assert [*map(id, movable_in(batch))] == [id(first), id(second), id(own)]
    assert [*map(id, tensors_in(batch))] == [id(first), id(second)]
