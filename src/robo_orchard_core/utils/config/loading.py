"""What is known while a document is being turned into a config.

Pydantic's own context can't carry this: it is lost inside a class that defines ``__init__``, and
settings classes do. So it travels in a context variable, which is unset outside of loading: a
config that is built in code takes no references and no ``config_type``.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from itertools import chain
from types import BuiltinFunctionType, FunctionType
from typing import Any, get_args

from pydantic import BaseModel

from robo_orchard_core.utils.config.errors import ConfigReferenceError, Path
from robo_orchard_core.utils.config.kinds import (
    declared_code,
    is_kind,
)
from robo_orchard_core.utils.config.references import Code, reference_to, resolve
from robo_orchard_core.utils.config.trust import Trust

CONFIG_TYPE = "config_type"
"""The key of a document that names the class of a config, where its field admits several."""


class Loading:
    """One document on its way into ``model``.

    Args:
        model: The class that the document is for; the code that it declares needs no trust.
        trust: What the document may name beyond that.
        known: More code that needs no trust, where the declared code isn't it.
        proving: The config exists already and is only compared with its document, so
            ``__post_init__``, which may touch the world, stays out of it.
    """

    def __init__(
        self,
        model: type[BaseModel],
        trust: Trust,
        *,
        known: Iterable[Code] = (),
        proving: bool = False,
    ) -> None:
        self.trust = trust
        self.proving = proving
        self._models = [model]
        self._known = tuple(known)

    @cached_property
    def _declared(self) -> dict[str, list[Code]]:
        # Only made when a reference isn't what its own field declares: it calls the factories
        # of defaults.
        by_reference: defaultdict[str, list[Code]] = defaultdict(list)
        declared = chain.from_iterable(map(declared_code, self._models))
        for code in chain(declared, self._known):
            by_reference[reference_to(code)].append(code)
        return by_reference

    def _candidates(self, reference: str) -> Iterable[Code]:
        """What a reference may mean: the declared code of that name, else what it leads to."""
        if reference in self._declared:
            return self._declared[reference]
        module, _, qualname = reference.partition(":")
        if module == "__main__" and not self.trust.covers(module, qualname):
            # A script's own classes have another module's name once the script is imported.
            declared = chain.from_iterable(self._declared.values())
            if same := [code for code in declared if code.__qualname__ == qualname]:
                return same
        return [resolve(reference, self.trust)]

    def class_at(self, reference: str, kinds: tuple[type, ...], path: Path) -> type:
        """The class that a reference names, where one of ``kinds`` is declared.

        Raises:
            ConfigReferenceError: Nothing of that kind is found, or it isn't trusted.
        """
        for kind in kinds:
            if reference == reference_to(kind):
                return kind
        try:
            found = self._first(reference, kinds)
        except ConfigReferenceError as error:
            raise error.under(path) from error.__cause__
        if found is None:
            expected = " or ".join(map(reference_to, kinds))
            raise ConfigReferenceError(
                f"expected a subclass of {expected}, found {reference!r}", path
            )
        return found

    def _first(self, reference: str, kinds: tuple[type, ...]) -> type | None:
        for code in self._candidates(reference):
            if isinstance(code, type) and any(is_kind(code, kind) for kind in kinds):
                return code
        return None

    def config_class_at(self, reference: object, kind: type, path: Path) -> type[BaseModel]:
        """The config class that ``config_type`` names, where ``kind`` is declared; its own
        declarations count from here on.
        """
        if not isinstance(reference, str):
            raise ConfigReferenceError(f"expected the name of a class, found {reference!r}", path)
        found = self.class_at(reference, (kind,), path)
        if not issubclass(found, BaseModel):
            raise ConfigReferenceError(f"expected a config class, found {reference!r}", path)
        if found not in self._models:
            self._models.append(found)
            self.__dict__.pop("_declared", None)
        return found

    def code_at(self, reference: str) -> Code:
        """The function or class that a reference names.

        Raises:
            ConfigReferenceError: It leads to nothing, or isn't trusted.
        """
        return next(iter(self._candidates(reference)))

    def function_at(self, reference: str, annotation: Any, path: Path) -> Code:
        """The function that a reference names, where ``Callable[...]`` is declared."""
        try:
            found = next(iter(self._candidates(reference)))
        except ConfigReferenceError as error:
            raise error.under(path) from error.__cause__
        if not isinstance(found, FunctionType | BuiltinFunctionType):
            raise ConfigReferenceError(f"expected a function, found the class {reference!r}", path)
        args = get_args(annotation)
        if args and isinstance(args[0], list):
            try:
                inspect.signature(found).bind(*args[0])
            except TypeError as error:
                problem = f"{reference!r} can't be called with {len(args[0])} arguments: {error}"
                raise ConfigReferenceError(problem, path) from error
            except ValueError:  # some builtins don't say what they take
                return found
        return found


_current: ContextVar[Loading | None] = ContextVar("_current", default=None)


def current() -> Loading | None:
    """The document that is being loaded here, if any is."""
    return _current.get()


@contextmanager
def loading(state: Loading) -> Iterator[None]:
    """Everything that is validated inside belongs to this document."""
    token = _current.set(state)
    try:
        yield
    finally:
        _current.reset(token)
