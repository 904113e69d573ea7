"""Saved states: folders of safetensors and JSON, without pickle."""

from robo_orchard_lab.pipeline.checkpoint.checkpoint_info import (
    CheckpointInfo,
    EachRank,
    PruneDecision,
    SavedState,
    Verification,
)
from robo_orchard_lab.pipeline.checkpoint.digests import DigestName
from robo_orchard_lab.pipeline.checkpoint.export import export_weights
from robo_orchard_lab.pipeline.checkpoint.limits import ReadLimits
from robo_orchard_lab.pipeline.checkpoint.optimizer_state import (
    load_named_optimizer_state,
    named_optimizer_state,
    parameters_beside,
)
from robo_orchard_lab.pipeline.checkpoint.pending_save import PendingSave
from robo_orchard_lab.pipeline.checkpoint.random_state import (
    capture_random_state,
    check_random_state,
    keyed_random_state,
    restore_random_state,
)
from robo_orchard_lab.pipeline.checkpoint.ranks import Ranks
from robo_orchard_lab.pipeline.checkpoint.retention import Retention
from robo_orchard_lab.pipeline.checkpoint.shards import Region, ShareOf, TensorShare
from robo_orchard_lab.pipeline.checkpoint.single_checkpoint import (
    load_checkpoint,
    save_checkpoint,
)
from robo_orchard_lab.pipeline.checkpoint.store import CheckpointStore
from robo_orchard_lab.pipeline.checkpoint.weights_file import write_weights

__all__ = [
    "CheckpointInfo",
    "CheckpointStore",
    "DigestName",
    "EachRank",
    "PendingSave",
    "PruneDecision",
    "Ranks",
    "ReadLimits",
    "Region",
    "Retention",
    "SavedState",
    "ShareOf",
    "TensorShare",
    "Verification",
    "capture_random_state",
    "check_random_state",
    "export_weights",
    "keyed_random_state",
    "load_checkpoint",
    "load_named_optimizer_state",
    "named_optimizer_state",
    "parameters_beside",
    "restore_random_state",
    "save_checkpoint",
    "write_weights",
]
