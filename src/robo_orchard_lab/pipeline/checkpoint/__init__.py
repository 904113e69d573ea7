"""Checkpoints: durable, verified directories of safetensors and JSON files, without pickle.

- ``store``: :class:`CheckpointStore`, its ``retention`` and ``listing``
- ``single_checkpoint``: save, load, verify or export one checkpoint at any path
- ``writer``, ``reader``: write and read a directory; ``ranks``: the processes of a save
- ``manifest``: names, limits and digests; ``tensor_files``: safetensors files in memory
- ``state``: state trees, optimizer state by parameter name, RNG state; ``shards``: sharded tensors
"""

from robo_orchard_lab.pipeline.checkpoint.manifest import (
    CheckpointInfo,
    DigestName,
    EachRank,
    PruneDecision,
    ReadLimits,
    SavedState,
    Verification,
)
from robo_orchard_lab.pipeline.checkpoint.ranks import Ranks
from robo_orchard_lab.pipeline.checkpoint.retention import Retention
from robo_orchard_lab.pipeline.checkpoint.shards import Region, ShareOf, TensorShare
from robo_orchard_lab.pipeline.checkpoint.single_checkpoint import (
    export_weights,
    load_checkpoint,
    pack_weights,
    save_checkpoint,
    write_weights,
)
from robo_orchard_lab.pipeline.checkpoint.state import (
    capture_random_state,
    check_random_state,
    keyed_random_state,
    load_named_optimizer_state,
    named_optimizer_state,
    parameters_beside,
    restore_random_state,
)
from robo_orchard_lab.pipeline.checkpoint.store import CheckpointStore
from robo_orchard_lab.pipeline.checkpoint.tensor_files import non_finite_names
from robo_orchard_lab.pipeline.checkpoint.writer import FiniteCheck, PendingSave

__all__ = [
    "CheckpointInfo",
    "CheckpointStore",
    "DigestName",
    "EachRank",
    "FiniteCheck",
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
    "non_finite_names",
    "pack_weights",
    "parameters_beside",
    "restore_random_state",
    "save_checkpoint",
    "write_weights",
]
