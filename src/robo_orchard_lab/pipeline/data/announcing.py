"""Telling the parts of a loader which epoch begins."""

from __future__ import annotations

from typing import Any

from robo_orchard_lab.pipeline.data.random_sources import samplers_of


def announce_epoch(loader: Any, epoch_id: int) -> None:
    """Call ``set_epoch`` of a loader, or of its samplers and its dataset where it has none."""
    told = [loader]
    if not hasattr(loader, "set_epoch"):  # one that has it tells its own parts
        samplers = [sampler for _, sampler in samplers_of(loader)]
        told += [*samplers, getattr(loader, "dataset", None)]
    for part in told:
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch_id)
