"""A config that names a class and builds it."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from robo_orchard_core.utils.config.base import Config
from robo_orchard_core.utils.config.building import build
from robo_orchard_core.utils.config.kinds import class_kinds, declared_config_class, is_kind
from robo_orchard_core.utils.config.loading import CONFIG_TYPE, Loading
from robo_orchard_core.utils.config.model import ConfigModel, field_values

# Covariant: what builds a MyHook may stand where something that builds a Hook is declared.
T_co = TypeVar("T_co", covariant=True)


class ClassConfig(Config, Generic[T_co]):
    """What a class is built from: name it in ``class_type``, declare its parameters as fields.

    >>> class Timer:
    ...     def __init__(self, interval_s: float) -> None:
    ...         self.interval_s = interval_s
    >>> class TimerConfig(ClassConfig[Timer]):
    ...     class_type: type[Timer] = Timer
    ...     interval_s: float = 0.5
    >>> TimerConfig(interval_s=2)().interval_s
    2.0

    A class whose constructor takes a config (a first or required parameter that is declared as a
    config class which admits this one, or one without a declaration that is named ``cfg`` or
    ``config``) gets this config. Any other class gets the fields as keyword arguments, with
    nested `ClassConfig` built, unless the parameter is declared as a config.

    Attributes:
        class_type: The class, or a subclass of the declared one.
    """

    class_type: type[T_co]

    @classmethod
    def _class_named_in(cls, state: Loading, document: dict[str, Any]) -> type[BaseModel]:
        """Where no class is the default, the config class of the one that is named."""
        reference = document.get("class_type")
        if (
            CONFIG_TYPE in document
            or not isinstance(reference, str)
            or not cls.model_fields["class_type"].is_required()
            or cls.only_what_is_set
        ):
            return super()._class_named_in(state, document)
        from robo_orchard_core.utils.config.derived import config_class_of

        kinds = class_kinds(cls.model_fields["class_type"].annotation)
        named = state.class_at(reference, kinds, ("class_type",))
        if document.keys() <= cls.model_fields.keys():  # may be one of this very class
            return declared_config_class(named, cls) or cls
        return config_class_of(named, cls)

    @classmethod
    def _remade(cls, config: ConfigModel) -> ConfigModel | None:
        from robo_orchard_core.utils.config.derived import config_class_of

        field = cls.model_fields["class_type"]
        named: Any = getattr(config, "class_type", None)
        if named is None or not config.only_what_is_set or not field.is_required():
            return None
        if not any(is_kind(named, kind) for kind in class_kinds(field.annotation)):
            return None
        return config_class_of(named, cls)(**field_values(config))

    def __call__(self, *args: Any, **kwargs: Any) -> T_co:
        """A new instance.

        Args:
            *args: Handed to the class, after the config where it takes one.
            **kwargs: Handed to the class, in the place of fields with the same name; for a class
                that takes a config, those that name a field and no parameter change the field.

        Raises:
            ConfigBuildError: The class doesn't take what it would get; its name and the
                parameter's are in the message.
        """
        return build(self, self.class_type, args, kwargs)
