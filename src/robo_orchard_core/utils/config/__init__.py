"""Configuration that validates, builds what it describes, and survives files exactly."""

from robo_orchard_core.utils.config.base import Config
from robo_orchard_core.utils.config.callable_config import CallableConfig
from robo_orchard_core.utils.config.class_config import ClassConfig
from robo_orchard_core.utils.config.derived import config_class_of, config_of, function_of
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
from robo_orchard_core.utils.config.parts import Anything, FieldsOf, Function, Part
from robo_orchard_core.utils.config.trust import Trust, TrustLike

__all__ = [
    "Anything",
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
    "FieldsOf",
    "Format",
    "Function",
    "Part",
    "Trust",
    "TrustError",
    "TrustLike",
    "config_class_of",
    "config_of",
    "function_of",
]
