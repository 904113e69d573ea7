"""A config that names a function and calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from robo_orchard_core.utils.config.base import Config
from robo_orchard_core.utils.config.building import call
from robo_orchard_core.utils.config.model import field_values

R = TypeVar("R")


class CallableConfig(Config, Generic[R]):
    """A function and keyword arguments for it, like ``functools.partial`` with a document.

    >>> def scaled(value: float, factor: float = 1.0) -> float:
    ...     return value * factor
    >>> class ScaleConfig(CallableConfig[float]):
    ...     func: Callable[..., float] = scaled
    ...     factor: float = 3.0
    >>> ScaleConfig()(2.0)
    6.0

    Attributes:
        func: The function, ``module:name`` in files. Where it is declared with the types of its
            parameters, as in ``Callable[[float], float]``, a function from a file must take as
            many.
    """

    func: Callable[..., R]

    def __call__(self, *args: Any, **kwargs: Any) -> R:
        """What the function returns for these arguments and, where they are silent, the fields.

        Raises:
            ConfigBuildError: The function doesn't take what it would get.
        """
        fields = field_values(self)
        del fields["func"]
        return call(self.func, self, fields, args, kwargs)
