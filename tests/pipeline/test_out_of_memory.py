"""Notes on out-of-memory errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from robo_orchard_lab.pipeline import SimpleBatchProcessor
from robo_orchard_lab.pipeline.evaluator import Evaluator
from robo_orchard_lab.pipeline.hooks import LossTrackerConfig, MetricsLoggerConfig
from robo_orchard_lab.pipeline.out_of_memory import is_out_of_memory
from tiny import make_trainer

TOO_LARGE = 1 << 52  # elements that no machine has memory for


class Sums(SimpleBatchProcessor):
    """Processor that allocates as much as the batch asks for."""

    def forward(self, model: Any, batch: dict[str, torch.Tensor]) -> Any:
        scratch = torch.empty(int(batch["scratch"][0]))
        return scratch, model(batch["x"]).mean()


class Nested(SimpleBatchProcessor):
    """Processor without samples to count, which runs out of memory in the second step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def count_samples(self, batch: Any) -> int:
        if self.steps > 1:
            raise ValueError("no samples")
        return 1

    def forward(self, model: Any, batch: Any) -> Any:
        self.steps += 1
        if self.steps > 1:
            raise MemoryError("scratch")
        return None, model(torch.ones(1, 4)).mean()


def batch(samples: int, scratch: int = 1) -> dict[str, torch.Tensor]:
    return {"x": torch.ones(samples, 4), "scratch": torch.full((samples,), scratch)}


def note(error: BaseException) -> str:
    (found,) = [text for text in error.__notes__ if text.startswith("out of memory")]
    return found


def test_note_names_sizes_and_remedies() -> None:
    """The CPU allocator's error keeps its type; its note has shapes, earlier sizes and remedies."""
    loader = [batch(2), batch(8), batch(16, TOO_LARGE)]
    hooks = [LossTrackerConfig(), MetricsLoggerConfig(every="1 steps")]
    trainer = make_trainer(hooks, loader=loader, batch_processor=Sums(), max_epoch=1)
    with pytest.raises(RuntimeError, match="memory") as caught:
        trainer()
    assert note(caught.value) == (
        "out of memory with a batch of 16 samples: dict(x: float32[16, 4], scratch: int64[16]). "
        "2 steps fitted before, with up to 8 samples; the largest batch of those seen at commit "
        "points was dict(x: float32[8, 4], scratch: int64[8]) at step 2. Try batch_size=8 of the "
        "data loader with Accelerator(gradient_accumulation_steps=2), which trains the same "
        "updates, or a limit for the size of a batch, since smaller ones fitted, or "
        "Accelerator(mixed_precision='bf16'), or torch.utils.checkpoint in the model"
    )


def test_first_batch_is_known_without_hooks() -> None:
    """The sizes of the first batch are recorded in a run without commit points of hooks."""
    trainer = make_trainer(
        [], loader=[batch(4), batch(4, TOO_LARGE)], batch_processor=Sums(), max_epoch=1
    )
    with pytest.raises(RuntimeError) as caught:
        trainer()
    assert "was dict(x: float32[4, 4], scratch: int64[4]) at step 1" in note(caught.value)


def test_memory_error_of_a_single_sample_is_noted() -> None:
    """With nothing to halve, the note suggests smaller samples, and that no step fitted."""

    def forward(model: Any, batch: Any) -> Any:
        return bytearray(1 << 60), model(batch["x"]).mean()

    processor = SimpleBatchProcessor.from_callable(forward)
    trainer = make_trainer([], loader=[batch(1)], batch_processor=processor, max_epoch=1)
    with pytest.raises(MemoryError) as caught:
        trainer()
    found = note(caught.value)
    assert "no step fitted before. Try smaller samples" in found
    assert "batch_size" not in found


def test_evaluation_is_noted() -> None:
    """The note names the loader and its batch."""
    model = torch.nn.Linear(4, 1)
    loaders = {"val": [batch(2), batch(3, TOO_LARGE)]}
    with pytest.raises(RuntimeError) as caught:
        Evaluator(model, Sums(), loaders).evaluate()
    assert note(caught.value).startswith(
        "out of memory in the evaluation of dataloaders['val'] with the batch dict(x: float32[3, "
        "4], scratch: int64[3]). 1 batches fitted before. Try a smaller batch_size"
    )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_batch_of_unknown_parts_changes_no_error() -> None:
    """A batch that can't be described, or counted, ends no run and hides no error."""
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])  # has no shape
    trainer = make_trainer([], loader=[[nested]] * 2, batch_processor=Nested(), max_epoch=1)
    with pytest.raises(MemoryError, match="scratch"):
        trainer()
    assert trainer.progress.global_step_id == 1


def test_other_errors_get_no_note() -> None:
    """Only errors of memory are explained."""
    trainer = make_trainer([], loader=[{"x": torch.ones(2, 5)}], max_epoch=1)
    with pytest.raises((KeyError, ValueError, TypeError, RuntimeError)) as caught:
        trainer()
    assert not any("out of memory" in text for text in caught.value.__notes__)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_errors_of_memory_are_recognised(error: Exception, expected: bool) -> None:
    """Errors of CUDA, cuBLAS, MPS and the CPU are errors of memory; others are not."""
    assert is_out_of_memory(error) is expected
