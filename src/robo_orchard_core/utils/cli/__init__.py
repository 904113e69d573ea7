"""Configs from the command line and the environment."""

from robo_orchard_core.utils.cli.arguments import pydantic_from_argparse
from robo_orchard_core.utils.cli.settings import SettingConfig

__all__ = ["SettingConfig", "pydantic_from_argparse"]
