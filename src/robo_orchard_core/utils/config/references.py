"""From ``module:QualName`` in a file to the code that it names, and back.

The order of the checks is the point: how it is written, whether it is trusted, and only then
the import; then whether what came out is defined where the reference says.
"""

from __future__ import annotations

import collections.abc
import difflib
import importlib
import inspect
import sys
import types
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Annotated, Any, TypeAlias, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from robo_orchard_core.utils.config.errors import ConfigReferenceError, Path, TrustError

# --- trust -----------------------------------------------------------------------------------
# Which code a configuration file may name.


TrustLike: TypeAlias = "Trust | str | type | Iterable[str | type]"


def is_dotted_name(name: str) -> bool:
    """Whether it is written like the name of a module or a qualified name."""
    return all(part.isidentifier() for part in name.split("."))


@dataclass(frozen=True)
class Trust:
    """The code that references in a file may reach.

    Attributes:
        packages: Dotted names; each covers itself and everything beneath it, so ``torch``
            covers ``torch.optim`` and not ``torchevil``.
        classes: Single classes, written ``module:QualName``; nothing else of their module.

    >>> trust = Trust().widened("my_team.models", "torch.optim.sgd:SGD")
    >>> trust.covers("my_team.models.resnet", "ResNet"), trust.covers("my_team", "Other")
    (True, False)
    >>> trust.covers("torch.optim.sgd", "SGD"), trust.covers("torch.optim.adam", "Adam")
    (True, False)
    """

    packages: frozenset[str] = frozenset({"robo_orchard_core", "robo_orchard_lab"})
    classes: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name in (*self.packages, *self.classes):
            parts = name.split(":") if name in self.classes else [name]
            if len(parts) != 1 + (name in self.classes) or not all(map(is_dotted_name, parts)):
                raise ValueError(
                    "expected the name of a package to trust, like 'my_team.models', or of a "
                    f"class, like 'my_team.models:Net'; found {name!r}"
                )

    def widened(self, *names: str | type) -> Trust:
        """This trust and the named packages and classes as well.

        Raises:
            ValueError: A name that is neither a dotted name nor ``module:QualName``.
        """
        texts = [n if isinstance(n, str) else f"{n.__module__}:{n.__qualname__}" for n in names]
        return Trust(
            packages=self.packages.union(n for n in texts if ":" not in n),
            classes=self.classes.union(n for n in texts if ":" in n),
        )

    @classmethod
    def of(cls, more: TrustLike) -> Trust:
        """The default trust widened by ``more``; a `Trust` stands for itself."""
        if isinstance(more, Trust):
            return more
        return cls().widened(*([more] if isinstance(more, str | type) else more))

    def covers(self, module: str, qualname: str) -> bool:
        """Whether a file may name ``module:qualname``."""
        parts = module.split(".")
        prefixes = {".".join(parts[: n + 1]) for n in range(len(parts))}
        return not prefixes.isdisjoint(self.packages) or f"{module}:{qualname}" in self.classes


# --- references ------------------------------------------------------------------------------


Code = type | FunctionType | BuiltinFunctionType
"""What a reference can lead to."""


def reference_to(code: Code) -> str:
    """The reference that names a class or function.

    >>> reference_to(Trust)
    'robo_orchard_core.utils.config.references:Trust'
    """
    return f"{code.__module__}:{code.__qualname__}"


def split_reference(reference: str) -> tuple[str, str]:
    """Module and qualified name.

    Raises:
        ConfigReferenceError: The reference isn't written as one.
    """
    module, _, qualname = reference.partition(":")
    if not is_dotted_name(module) or not is_dotted_name(qualname):
        raise ConfigReferenceError(
            f"expected a reference like 'package.module:ClassName', found {reference!r}"
        )
    return module, qualname


def resolve(reference: str, trust: Trust) -> Code:
    """The class or function that a reference names, imported only if it is trusted.

    Raises:
        TrustError: It lies outside the trust; nothing was imported.
        ConfigReferenceError: It is written wrongly, its module can't be imported, or what it
            leads to is no class or function defined there.
    """
    module_name, qualname = split_reference(reference)
    if not trust.covers(module_name, qualname):
        package = module_name.partition(".")[0]
        packages = f" ({', '.join(sorted(trust.packages))})" if trust.packages else ""
        raise TrustError(
            f"the reference {reference!r} lies outside the trusted packages{packages}; "
            f"if you trust its code, name it: trust=({package!r},) in code, --trust {package} "
            "on the command line"
        )
    if module_name.endswith(".__main__"):
        # Importing one runs the package's command.
        raise ConfigReferenceError(f"{reference!r} names a command, not a module of classes")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        problem = f"the module of {reference!r} can't be imported: {error}"
        if isinstance(error, ModuleNotFoundError) and error.name == module_name.partition(".")[0]:
            problem += "; install it, or start where Python finds it"
        raise ConfigReferenceError(problem) from error
    return find_in_module(module, qualname, reference)


def _is_of(module: ModuleType, code: object) -> bool:
    return isinstance(code, Code) and code.__module__ == module.__name__


def find_in_module(module: ModuleType, qualname: str, reference: str) -> Code:
    """What the module defines under a qualified name, without calling anything on the way.

    Raises:
        ConfigReferenceError: There is nothing, or something that is defined elsewhere.
    """
    found: object = module
    for part in qualname.split("."):
        # Looked up in the namespace, so that no __getattr__, property or descriptor runs; only
        # a class is looked into, so that no path leads through a module that was imported here.
        space = vars(found) if found is module or isinstance(found, type) else {}
        if part not in space:
            problem = f"{reference!r} names nothing: no {part!r} is defined there"
            here = [name for name, code in space.items() if _is_of(module, code)]
            near = difflib.get_close_matches(part, here, n=1)
            problem += f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigReferenceError(problem)
        found = space[part]
        if isinstance(found, staticmethod):
            found = found.__func__
    if not isinstance(found, Code):
        kind = type(found).__qualname__
        problem = f"{reference!r} leads to a {kind}, expected a class or function defined there"
        raise ConfigReferenceError(problem)
    if reference_to(found) != reference:
        raise ConfigReferenceError(
            f"{reference!r} leads to something that is defined elsewhere; "
            f"name it where it is defined, {reference_to(found)!r}"
        )
    return found


# --- kinds -----------------------------------------------------------------------------------
# Questions about declared types: what may stand where, and which code a declaration names.


def strip_annotated(annotation: Any) -> Any:
    """The annotation without ``Annotated``; a type variable stands for its bound.

    >>> strip_annotated(Annotated[int, "metadata"])
    <class 'int'>
    """
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif isinstance(annotation, TypeVar):
            annotation = annotation.__bound__ or Any
        elif hasattr(annotation, "__value__"):  # an alias made by a `type` statement
            annotation = annotation.__value__
        else:
            return annotation


def union_members(annotation: Any) -> tuple[Any, ...]:
    """What a union consists of; any other annotation is its own only member.

    >>> union_members(int | None)
    (<class 'int'>, <class 'NoneType'>)
    """
    annotation = strip_annotated(annotation)
    if get_origin(annotation) not in (Union, types.UnionType):
        return (annotation,)
    return tuple(inner for arg in get_args(annotation) for inner in union_members(arg))


def item_type(annotation: Any, index: int) -> Any:
    """How the item of a list, tuple or set is declared; Any where nothing says it."""
    for member in union_members(annotation):
        args, origin = get_args(member), get_origin(member)
        if origin is tuple and args and args[-1] is not Ellipsis:
            return args[index] if index < len(args) else Any
        if args and is_collection(origin):
            return args[0]
    return Any


def mapping_value_type(annotation: Any) -> Any:
    """How the value of a mapping is declared; Any where nothing says it."""
    for member in union_members(annotation):
        if is_mapping(origin := get_origin(member)) and len(args := get_args(member)) == 2:
            return args[1] if origin is not collections.Counter else int
    return Any


def is_mapping(origin: Any) -> bool:
    """Whether it is a mapping type."""
    return isinstance(origin, type) and issubclass(origin, Mapping)


def is_collection(origin: Any) -> bool:
    """Whether it is a type of lists, tuples or sets."""
    return (
        isinstance(origin, type)
        and issubclass(origin, collections.abc.Iterable)
        and not issubclass(origin, Mapping | str | bytes | type)
        and origin is not collections.abc.Callable
    )


def admitted_classes(annotation: Any) -> tuple[type, ...]:
    """The classes that ``type[...]`` admits, each with its subclasses.

    >>> admitted_classes(type[int | str])
    (<class 'int'>, <class 'str'>)
    """
    args = get_args(annotation)
    kinds = union_members(args[0]) if args else (object,)
    return tuple(k if isinstance(k, type) and k is not Any else object for k in kinds)


def is_assignable(cls: type, kind: type) -> bool:
    """Whether instances of ``cls`` may stand where ``kind`` is declared.

    Beyond ``issubclass``, a generic config counts as covariant: ``ClassConfig[MyHook]`` may stand
    for ``ClassConfig[Hook]``, which pydantic's classes don't know of each other.
    """
    if issubclass(cls, kind):
        return True
    origin, wanted = _parametrization(kind)
    if origin is None or not issubclass(cls, origin):
        return False
    arguments: dict[Any, Any] = {}
    for base in cls.__mro__:
        base_origin, args = _parametrization(base)
        if base_origin is not None:
            for parameter, arg in zip(_parameters(base_origin), args, strict=True):
                arguments.setdefault(parameter, arguments.get(arg, arg))
    given = [arguments.get(parameter) for parameter in _parameters(origin)]
    return all(map(_is_argument, given, wanted))


def _parametrization(cls: type) -> tuple[type | None, tuple[Any, ...]]:
    metadata = getattr(cls, "__pydantic_generic_metadata__", None)
    return (metadata["origin"], metadata["args"]) if metadata else (None, ())


def _parameters(origin: type) -> tuple[Any, ...]:
    parameters: tuple[Any, ...] = origin.__pydantic_generic_metadata__["parameters"]  # type: ignore[attr-defined]  # of pydantic's generic models
    return parameters


def _is_argument(given: Any, wanted: Any) -> bool:
    given, wanted = strip_annotated(given), strip_annotated(wanted)
    if wanted is Any:  # which is a class since Python 3.11
        return True
    if isinstance(given, type) and isinstance(wanted, type):
        return is_assignable(given, wanted)
    return bool(given == wanted)


def find_config_class(cls: type, base: type[BaseModel] = BaseModel) -> type[BaseModel] | None:
    """The config class whose ``class_type`` is this class by default, from the class's own module;
    of several, the one that is named like it."""
    origin, _ = _parametrization(base)
    found = [
        config
        for config in vars(sys.modules.get(cls.__module__, object)).values()
        if isinstance(config, type)
        and issubclass(config, BaseModel)
        and issubclass(config, origin or base)
        and config.__module__ == cls.__module__
        and "class_type" in config.model_fields
        and config.model_fields["class_type"].default is cls
    ]
    return min(found, key=lambda c: c.__name__ != f"{cls.__name__}Config", default=None)


def declared_code(model: type[BaseModel]) -> Iterator[Code]:
    """Every class and function that a config class declares, at whatever depth.

    These are the arguments of ``type[...]``, the config classes among the field types, and what
    the fields' defaults hold. All of it was imported when the config class was.
    """
    seen: set[Any] = set()
    waiting: list[Any] = [model]
    while waiting:
        found = waiting.pop()
        if isinstance(found, BaseModel):
            waiting += [type(found), *(getattr(found, name) for name in type(found).model_fields)]
        elif isinstance(found, Mapping):
            waiting += found.values()
        elif isinstance(found, list | tuple | set | frozenset):
            waiting += found
        elif get_origin(found) is not None or isinstance(found, TypeVar):
            waiting += [a for a in (strip_annotated(found), *get_args(found)) if a is not found]
        elif isinstance(found, Code) and found not in seen:
            seen.add(found)
            yield found
            if isinstance(found, type) and issubclass(found, BaseModel):
                for field in found.model_fields.values():
                    waiting += [field.annotation, field_default(field)]


def field_default(field: FieldInfo) -> Any:
    """A field's default, also one that a factory makes; PydanticUndefined where there is none."""
    if field.default_factory_takes_validated_data:
        return PydanticUndefined
    try:
        return field.get_default(call_default_factory=True)
    except Exception:  # of the user's factory; it comes up again where its value is needed
        return PydanticUndefined


# --- loading ---------------------------------------------------------------------------------
# What is known while a document is being turned into a config.
#
# Pydantic's own context can't carry this: it is lost inside a class that defines ``__init__``, and
# settings classes do. So it travels in a context variable, which is unset outside of loading: a
# config that is built in code takes no references and no ``config_type``.


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

    def resolve_class(self, reference: str, kinds: tuple[type, ...], path: Path) -> type:
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
            if isinstance(code, type) and any(is_assignable(code, kind) for kind in kinds):
                return code
        return None

    def resolve_config_class(self, reference: object, kind: type, path: Path) -> type[BaseModel]:
        """The config class that ``config_type`` names, where ``kind`` is declared; its own
        declarations count from here on.
        """
        if not isinstance(reference, str):
            raise ConfigReferenceError(f"expected the name of a class, found {reference!r}", path)
        found = self.resolve_class(reference, (kind,), path)
        if not issubclass(found, BaseModel):
            raise ConfigReferenceError(f"expected a config class, found {reference!r}", path)
        if found not in self._models:
            self._models.append(found)
            self.__dict__.pop("_declared", None)
        return found

    def resolve_code(self, reference: str) -> Code:
        """The function or class that a reference names.

        Raises:
            ConfigReferenceError: It leads to nothing, or isn't trusted.
        """
        return next(iter(self._candidates(reference)))

    def resolve_function(self, reference: str, annotation: Any, path: Path) -> Code:
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
