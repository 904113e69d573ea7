"""Types to declare fields with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from robo_orchard_core.utils.config.errors import ConfigReferenceError
from robo_orchard_core.utils.config.kinds import is_kind
from robo_orchard_core.utils.config.loading import CONFIG_TYPE, current
from robo_orchard_core.utils.config.model import ConfigModel

T = TypeVar("T")

ClassType: TypeAlias = type[T]
"""A class: ``ClassType[Hook]`` admits Hook and its subclasses, and is ``module:QualName`` in files.

A plain ``type[Hook]`` means the same.
"""

if TYPE_CHECKING:
    ConfigInstanceOf = Annotated[T, ...]
else:

    class ConfigInstanceOf:
        """A config of the class or of any subclass: ``hook: ConfigInstanceOf[HookConfig]``.

        In files, ``config_type`` names the class wherever it isn't the declared one. The class
        may also be one that is no config, such as an abstract base that some configs share.
        """

        def __class_getitem__(cls, kind: Any) -> Any:
            return Annotated[kind, _IsConfig()]


class _IsConfig:
    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        if isinstance(source, type) and not issubclass(source, ConfigModel):
            return core_schema.no_info_plain_validator_function(lambda data: _config(source, data))
        return handler(source)


def _config(kind: type, data: Any) -> ConfigModel:
    state = current()
    if state is not None and isinstance(data, dict):
        if CONFIG_TYPE not in data:
            raise ConfigReferenceError(f"expected {CONFIG_TYPE!r} to name the class of the config")
        target = state.config_class_at(data[CONFIG_TYPE], kind, (CONFIG_TYPE,))
        data = target.model_validate({k: v for k, v in data.items() if k != CONFIG_TYPE})
    if isinstance(data, ConfigModel) and is_kind(type(data), kind):
        return data
    raise ValueError(f"expected a config that is a {kind.__qualname__}")
