"""How much of a stranger's checkpoint is looked at before it is refused."""

from __future__ import annotations

from dataclasses import dataclass, fields

from robo_orchard_lab.pipeline.errors import PipelineConfigError

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadLimits:
    """The most that a checkpoint may have of anything; what has more is refused, not read.

    They hold for writing, too, so that what was saved can be loaded with the same limits.

    Raises:
        PipelineConfigError: a limit is below 1.

    >>> ReadLimits(max_json_depth=10).max_json_depth
    10
    """

    max_files: int = 65_536
    """Of all ranks together, without the manifest."""
    max_manifest_bytes: int = 16 * MIB
    max_json_bytes: int = 64 * MIB
    """Of one part's JSON. Reading it takes up to some 25 times as much memory."""
    max_json_depth: int = 100
    """How deep lists and mappings may lie in one another."""
    max_header_bytes: int = 100_000_000
    """Of one file's list of tensors; the limit of safetensors itself."""
    max_tensors: int = 1_000_000
    """In one file."""
    max_total_bytes: int | None = None
    """Of all that one rank reads, the job's and ranks' together; None: as much as the machine has
    memory available."""
    any_owner: bool = False
    """Whether to read what belongs neither to the own user nor to root."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is int and value < 1:
                raise PipelineConfigError(f"ReadLimits.{field.name} must be >= 1, got {value}")
