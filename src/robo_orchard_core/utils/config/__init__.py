"""Configuration that validates, builds what it describes, and survives files exactly."""

from robo_orchard_core.utils.config.base import Config
from robo_orchard_core.utils.config.callable_config import CallableConfig
from robo_orchard_core.utils.config.class_config import ClassConfig
from robo_orchard_core.utils.config.errors import (
    ConfigBuildError,
    ConfigError,
    ConfigFieldError,
    ConfigReferenceError,
    ConfigSaveError,
    ConfigSyntaxError,
    TrustError,
)
from robo_orchard_core.utils.config.fields import ClassType, ConfigInstanceOf
from robo_orchard_core.utils.config.formats import Format
from robo_orchard_core.utils.config.trust import Trust, TrustLike

__all__ = [
    "CallableConfig",
    "ClassConfig",
    "ClassType",
    "Config",
    "ConfigBuildError",
    "ConfigError",
    "ConfigFieldError",
    "ConfigInstanceOf",
    "ConfigReferenceError",
    "ConfigSaveError",
    "ConfigSyntaxError",
    "Format",
    "Trust",
    "TrustError",
    "TrustLike",
]
