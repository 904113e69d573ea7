"""Configuration that validates, builds what it describes, and survives files exactly."""

from robo_orchard_core.utils.config.build import (
    CallableConfig,
    ClassType,
    ConfigInstanceOf,
    FieldsOf,
)
from robo_orchard_core.utils.config.config import Config
from robo_orchard_core.utils.config.errors import (
    ConfigBuildError,
    ConfigError,
    ConfigFieldError,
    ConfigReferenceError,
    ConfigSaveError,
    ConfigSyntaxError,
    TrustError,
)
from robo_orchard_core.utils.config.formats import Format
from robo_orchard_core.utils.config.parts import (
    Anything,
    ClassConfig,
    Function,
    Part,
    config_class_of,
    config_of,
    function_of,
)
from robo_orchard_core.utils.config.references import Trust, TrustLike

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
