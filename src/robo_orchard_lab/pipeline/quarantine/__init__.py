"""Windows of batches that gave non-finite values: written, read, and run again."""

from robo_orchard_lab.pipeline.quarantine.replay import Replay, replay
from robo_orchard_lab.pipeline.quarantine.window import (
    QuarantinedStep,
    QuarantinedWindow,
    capture_generators,
    named_weights,
    rank_folder,
    read_window,
    sample_ids,
    write_window,
)

__all__ = [
    "QuarantinedStep",
    "QuarantinedWindow",
    "Replay",
    "capture_generators",
    "named_weights",
    "rank_folder",
    "read_window",
    "replay",
    "sample_ids",
    "write_window",
]
