"""Configs: validated fields that build instances and round-trip exactly through files.

- `config`: `Config`, saved and loaded as JSON, YAML and TOML
- `model`: validation and serialization
- `formats`: documents as text
- `references`: trusted code by name, and declared types
- `build`: calls of classes and functions with fields
- `parts`: `ClassConfig`, `Part`, and configs derived from signatures
- `errors`: errors with paths
"""

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
