"""Saved states: a folder of safetensors and JSON, without pickle."""

from robo_orchard_lab.pipeline.checkpoint.files import (
    read_checkpoint,
    write_checkpoint,
    write_weights,
)
from robo_orchard_lab.pipeline.checkpoint.optimizer_state import (
    load_named_optimizer_state,
    named_optimizer_state,
)
from robo_orchard_lab.pipeline.checkpoint.random_state import (
    capture_random_state,
    check_random_state,
    generators_of,
    restore_random_state,
)

__all__ = [
    "capture_random_state",
    "check_random_state",
    "generators_of",
    "load_named_optimizer_state",
    "named_optimizer_state",
    "read_checkpoint",
    "restore_random_state",
    "write_checkpoint",
    "write_weights",
]
