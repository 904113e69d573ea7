"""Construction of one part: its errors with its path, and arguments that the builder supplies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from robo_orchard_core.utils.config import ConfigBuildError, ConfigError
from robo_orchard_core.utils.config.build import DerivedConfig, code_of, parameters_of
from robo_orchard_core.utils.config.errors import at_path, dotted
from robo_orchard_lab.pipeline.errors import PipelineConfigError


@contextmanager
def building(*path: str | int) -> Iterator[None]:
    """Add the path of a part to errors raised while the part is built.

    TypeError, ValueError, OSError and errors of arithmetic, such as a division by zero, become the
    cause of a ``ConfigBuildError``; other errors get a note.
    """
    try:
        with at_path(*path):
            yield
    except ConfigError:
        raise
    except (TypeError, ValueError, OSError, ArithmeticError) as error:
        if isinstance(error, PipelineConfigError):
            raise ConfigBuildError(str(error), (*path, *error.setting)) from error
        raise ConfigBuildError(f"{type(error).__name__}: {error}", path) from error
    except Exception as error:
        error.add_note(f"while building {dotted(path)}")
        raise


def made_with(config: Any, given: Mapping[str, Any], *, is_inner: bool = False) -> Any:
    """Build a config with those arguments that it and its inner parts accept.

    Code with ``**kwargs`` accepts all. An inner part that accepts none is returned as given.
    """
    if isinstance(config, list | tuple):
        made = [made_with(part, given, is_inner=True) for part in config]
        is_same = all(part is before for part, before in zip(made, config, strict=True))
        return config if is_same else type(config)(made)
    if is_inner and not isinstance(config, DerivedConfig):
        return config
    parameters = parameters_of(code_of(config))
    names = {parameter.name for parameter in parameters}
    takes_any = not is_inner and any(p.kind is p.VAR_KEYWORD for p in parameters)
    arguments = {name: value for name, value in given.items() if takes_any or name in names}
    if isinstance(config, DerivedConfig):
        for name, value in config.arguments().items():
            inner = made_with(value, given, is_inner=True)
            if inner is not value:
                arguments[name] = inner
    return config(**arguments) if arguments or not is_inner else config
