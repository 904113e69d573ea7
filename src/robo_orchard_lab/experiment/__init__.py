"""Training runs as values and files: described, checked, built and repeated."""

from robo_orchard_lab.experiment.config import ExperimentConfig

__all__ = ["ExperimentConfig"]
