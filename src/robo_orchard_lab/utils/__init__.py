"""Utilities for training scripts."""

from robo_orchard_core.utils.logging import log_basic_config

__all__ = ["log_basic_config"]
