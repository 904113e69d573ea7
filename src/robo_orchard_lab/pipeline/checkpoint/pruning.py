"""Removing what no rule keeps."""

from __future__ import annotations

from collections.abc import Sequence

from robo_orchard_lab.pipeline.checkpoint.checkpoint_info import CheckpointInfo, PruneDecision
from robo_orchard_lab.pipeline.checkpoint.limits import ReadLimits
from robo_orchard_lab.pipeline.checkpoint.listing import Listing
from robo_orchard_lab.pipeline.checkpoint.removal import remove_checkpoint
from robo_orchard_lab.pipeline.checkpoint.retention import Retention
from robo_orchard_lab.pipeline.checkpoint.single_checkpoint import verify_checkpoint


def prune(
    listing: Listing,
    retention: Retention,
    limits: ReadLimits,
    *,
    good: CheckpointInfo | None,
    dry_run: bool,
) -> list[PruneDecision]:
    """Carry out a retention, and say of each checkpoint what became of it and why.

    Args:
        good: the newest that is known to be as it was written; None: to be found by reading.
        dry_run: only say what would be.
    """
    kept = retention.reasons(listing.infos)
    leaving = [info for info in listing.infos if info.serial not in kept]
    if leaving and good is None:
        good = _newest_good(listing.infos, limits)
    if good is not None:
        kept.setdefault(good.serial, "the newest one that verifies")
    decisions = [
        PruneDecision(path, False, f"it can't be told for a checkpoint: {why}")
        for path, why in listing.broken
    ]
    for info in listing.infos:
        why = kept.get(info.serial)
        if why is None and good is None:
            why = "no checkpoint verifies"
        if why is None and not dry_run:
            why = remove_checkpoint(info.path, limits)
        decisions.append(PruneDecision(info.path, why is None, why or "no rule keeps it"))
    return decisions


def _newest_good(infos: Sequence[CheckpointInfo], limits: ReadLimits) -> CheckpointInfo | None:
    for info in reversed(infos):
        if verify_checkpoint(info.path, limits).problem is None:
            return info
    return None
