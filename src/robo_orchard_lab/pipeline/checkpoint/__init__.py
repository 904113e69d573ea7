"""Checkpoints: durable, verified directories of safetensors and JSON files, without pickle.

- ``store``: :class:`CheckpointStore`, its ``retention`` and ``listing``
- ``single_checkpoint``: save, load, verify or export one checkpoint at any path
- ``writer``, ``reader``: write and read a directory; ``ranks``: the processes of a save
- ``directory``: files of a directory, opened without torch
- ``manifest``: names, limits and digests; ``tensor_files``: safetensors files in memory
- ``state_tree``: states as JSON and tensors; ``shards``: sharded tensors
- ``state``: optimizer state by parameter name, RNG state

Names are imported on first use: listing checkpoints needs no torch.
"""

from typing import TYPE_CHECKING

from robo_orchard_core.utils.lazy_exports import lazy_exports

_MODULE_OF = {
    "CheckpointInfo": "manifest",
    "CheckpointStore": "store",
    "DigestName": "manifest",
    "EachRank": "manifest",
    "FiniteCheck": "writer",
    "PendingSave": "writer",
    "PruneDecision": "manifest",
    "Ranks": "ranks",
    "ReadLimits": "manifest",
    "Region": "shards",
    "Retention": "retention",
    "SavedState": "manifest",
    "ShareOf": "shards",
    "TensorShare": "shards",
    "Verification": "manifest",
    "capture_random_state": "state",
    "check_random_state": "state",
    "export_weights": "single_checkpoint",
    "keyed_random_state": "state",
    "load_checkpoint": "single_checkpoint",
    "load_named_optimizer_state": "state",
    "named_optimizer_state": "state",
    "non_finite_names": "tensor_files",
    "pack_weights": "single_checkpoint",
    "parameters_beside": "state",
    "restore_random_state": "state",
    "save_checkpoint": "single_checkpoint",
    "write_weights": "single_checkpoint",
}

__all__ = sorted(_MODULE_OF)

if TYPE_CHECKING:
    from robo_orchard_lab.pipeline.checkpoint.manifest import CheckpointInfo as CheckpointInfo
    from robo_orchard_lab.pipeline.checkpoint.manifest import DigestName as DigestName
    from robo_orchard_lab.pipeline.checkpoint.manifest import EachRank as EachRank
    from robo_orchard_lab.pipeline.checkpoint.manifest import PruneDecision as PruneDecision
    from robo_orchard_lab.pipeline.checkpoint.manifest import ReadLimits as ReadLimits
    from robo_orchard_lab.pipeline.checkpoint.manifest import SavedState as SavedState
    from robo_orchard_lab.pipeline.checkpoint.manifest import Verification as Verification
    from robo_orchard_lab.pipeline.checkpoint.ranks import Ranks as Ranks
    from robo_orchard_lab.pipeline.checkpoint.retention import Retention as Retention
    from robo_orchard_lab.pipeline.checkpoint.shards import Region as Region
    from robo_orchard_lab.pipeline.checkpoint.shards import ShareOf as ShareOf
    from robo_orchard_lab.pipeline.checkpoint.shards import TensorShare as TensorShare
    from robo_orchard_lab.pipeline.checkpoint.single_checkpoint import (
        export_weights as export_weights,
    )
    from robo_orchard_lab.pipeline.checkpoint.single_checkpoint import (
        load_checkpoint as load_checkpoint,
    )
    from robo_orchard_lab.pipeline.checkpoint.single_checkpoint import pack_weights as pack_weights
    from robo_orchard_lab.pipeline.checkpoint.single_checkpoint import (
        save_checkpoint as save_checkpoint,
    )
    from robo_orchard_lab.pipeline.checkpoint.single_checkpoint import (
        write_weights as write_weights,
    )
    from robo_orchard_lab.pipeline.checkpoint.state import (
        capture_random_state as capture_random_state,
    )
    from robo_orchard_lab.pipeline.checkpoint.state import check_random_state as check_random_state
    from robo_orchard_lab.pipeline.checkpoint.state import keyed_random_state as keyed_random_state
    from robo_orchard_lab.pipeline.checkpoint.state import (
        load_named_optimizer_state as load_named_optimizer_state,
    )
    from robo_orchard_lab.pipeline.checkpoint.state import (
        named_optimizer_state as named_optimizer_state,
    )
    from robo_orchard_lab.pipeline.checkpoint.state import parameters_beside as parameters_beside
    from robo_orchard_lab.pipeline.checkpoint.state import (
        restore_random_state as restore_random_state,
    )
    from robo_orchard_lab.pipeline.checkpoint.store import CheckpointStore as CheckpointStore
    from robo_orchard_lab.pipeline.checkpoint.tensor_files import (
        non_finite_names as non_finite_names,
    )
    from robo_orchard_lab.pipeline.checkpoint.writer import FiniteCheck as FiniteCheck
    from robo_orchard_lab.pipeline.checkpoint.writer import PendingSave as PendingSave
else:
    __getattr__ = lazy_exports(__name__, _MODULE_OF)
