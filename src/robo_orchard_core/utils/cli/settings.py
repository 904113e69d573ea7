"""`SettingConfig`: a config that is also pydantic-settings."""

from __future__ import annotations

from typing import ClassVar

from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from robo_orchard_core.utils.config import Config


# Config comes last because pydantic lets the last base decide on options that both set.
class SettingConfig(BaseSettings, Config):
    """A config that can also be filled from the command line and the environment.

    Building one in code, or loading it from a file, never looks at the environment: only
    `pydantic_from_argparse` does. There, the variable of the field ``dataset.data_root`` is
    ``DATASET__DATA_ROOT``, behind ``model_config["env_prefix"]`` where the class sets one. To
    have pydantic-settings read its sources whenever one is built, override
    ``settings_customise_sources``.
    """

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(env_nested_delimiter="__")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The constructor's arguments and nothing else."""
        return (init_settings,)
