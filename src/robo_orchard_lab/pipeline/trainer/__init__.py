"""Training engine."""

from robo_orchard_lab.pipeline.trainer.trainer import HookBasedTrainer

__all__ = ["HookBasedTrainer"]
