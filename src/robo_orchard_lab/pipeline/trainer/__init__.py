"""Training engine."""

from robo_orchard_lab.pipeline.trainer.trainer import HookBasedTrainer

SimpleTrainer = HookBasedTrainer  # the name in scripts for RoboOrchardLab
__all__ = ["HookBasedTrainer", "SimpleTrainer"]
