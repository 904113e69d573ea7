"""How a run's data is ordered, and what its randomness is keyed by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from robo_orchard_lab.pipeline.errors import PipelineConfigError

KeyedBy: TypeAlias = Literal["batch", "sample", "none"]


@dataclass(frozen=True, slots=True)
class DataOrder:
    """What the order of samples and the randomness of loading them follow from.

    Args:
        seed: from 0 to 2**64 - 1. None takes ``torch.initial_seed()`` of the first rank when the
            trainer is built, and the saved one when a run is resumed.
        keyed_by: what the randomness while loading belongs to. ``"batch"``: to (seed, epoch,
            batch). ``"sample"``: to (seed, epoch, sample), so that it does not depend on the batch
            size and the number of processes either; some 5 us a sample. ``"none"``: nothing is
            drawn, which saves the training process 10 to 25 us a batch; what is drawn all the same
            comes out of the model's stream, and is another after a resume.
        fast_forward: have a run that is resumed within an epoch of data without an index read all
            that was done, and drop it. Without it, the data must have saved its own state, and
            what that lacks is lost: Hugging Face's leaves out the buffer that a stream is shuffled
            in, torchdata's what workers draw at random.
        allow_other_batch_size: whether a run may be resumed within an epoch with another number
            of samples for each step of the whole job. The position in samples carries over.

    Raises:
        PipelineConfigError: a field has no such value.
    """

    seed: int | None = None
    keyed_by: KeyedBy = "batch"
    fast_forward: bool = False
    allow_other_batch_size: bool = False

    def __post_init__(self) -> None:
        seed = self.seed
        if seed is not None and (type(seed) is not int or not 0 <= seed < 2**64):
            raise PipelineConfigError(
                f"DataOrder: seed must be an int from 0 to 2**64 - 1, or None, got {seed!r}"
            )
        if self.keyed_by not in get_args(KeyedBy):
            raise PipelineConfigError(
                f"DataOrder: keyed_by must be 'batch', 'sample' or 'none', got {self.keyed_by!r}"
            )
        for name in ("fast_forward", "allow_other_batch_size"):
            if type(getattr(self, name)) is not bool:
                raise PipelineConfigError(
                    f"DataOrder: {name} must be True or False, got {getattr(self, name)!r}"
                )
