"""References ``module:QualName`` in files: trust, resolution and declared types.

A reference is checked in this order: syntax, trust, and only then the import; finally, the code has
to be defined in that module under that name.
"""

from __future__ import annotations

import collections.abc
import importlib.metadata
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

from robo_orchard_core.utils.config.errors import (
    ConfigReferenceError,
    Path,
    TrustError,
    at_path,
    did_you_mean,
)

TrustLike: TypeAlias = "Trust | str | type | Iterable[str | type]"


def is_dotted_name(name: str) -> bool:
    """Return True for dotted Python identifiers."""
    return all(part.isidentifier() for part in name.split("."))


@dataclass(frozen=True)
class Trust:
    """Packages and classes that references in a file may reach.

    Attributes:
        packages: Dotted names, each with its submodules: ``torch`` covers ``torch.optim``, but
            not ``torchevil``.
        classes: Single classes as ``module:QualName``.

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
        """Return this trust extended by packages and classes."""
        texts = [n if isinstance(n, str) else f"{n.__module__}:{n.__qualname__}" for n in names]
        return Trust(
            packages=self.packages.union(n for n in texts if ":" not in n),
            classes=self.classes.union(n for n in texts if ":" in n),
        )

    @classmethod
    def of(cls, more: TrustLike) -> Trust:
        """Return the default trust extended by ``more``; a `Trust` is returned as given."""
        if isinstance(more, Trust):
            return more
        return cls().widened(*([more] if isinstance(more, str | type) else more))

    def covers(self, module: str, qualname: str) -> bool:
        """Return True if a file may name ``module:qualname``."""
        parts = module.split(".")
        prefixes = {".".join(parts[: n + 1]) for n in range(len(parts))}
        return not prefixes.isdisjoint(self.packages) or f"{module}:{qualname}" in self.classes


Code = type | FunctionType | BuiltinFunctionType
"""Code that a reference can name."""


def reference_to(code: Code) -> str:
    """Return the reference of a class or function.

    >>> reference_to(Trust)
    'robo_orchard_core.utils.config.references:Trust'
    """
    return f"{code.__module__}:{code.__qualname__}"


def split_reference(reference: str) -> tuple[str, str]:
    """Return module and qualified name."""
    module, _, qualname = reference.partition(":")
    if not is_dotted_name(module) or not is_dotted_name(qualname):
        raise ConfigReferenceError(
            f"expected a reference like 'package.module:ClassName', found {reference!r}"
        )
    return module, qualname


def resolve(reference: str, trust: Trust) -> Code:
    """Import a trusted class or function.

    Raises:
        TrustError: The code is not trusted; nothing was imported.
        ConfigReferenceError: The reference is malformed, the module can't be imported, or no class
            or function is defined there.
    """
    module_name, qualname = split_reference(reference)
    package = module_name.partition(".")[0]
    if not trust.covers(module_name, qualname):
        packages = f" ({', '.join(sorted(trust.packages))})" if trust.packages else ""
        raise TrustError(
            f"the reference {reference!r} lies outside the trusted packages{packages}; "
            f"if you trust its code, name it: trust=({package!r},) in code, --trust {package} "
            "on the command line"
        )
    if module_name.endswith(".__main__"):
        # The import would run the package's command.
        raise ConfigReferenceError(f"{reference!r} names a command, not a module of classes")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        problem = f"the module of {reference!r} can't be imported: {error}"
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing == package:
            problem += "; install it, or start where Python finds it"
        elif missing is not None and missing.startswith(f"{package}."):
            problem += _installed_release(package)
        raise ConfigReferenceError(problem) from error
    exported = _lazy_export(module, qualname, reference)
    if exported is not None and trust.covers(exported.__module__, exported.__qualname__):
        module, qualname = sys.modules[exported.__module__], exported.__qualname__
        reference = reference_to(exported)
    return find_in_module(module, qualname, reference)


def _lazy_export(module: ModuleType, name: str, reference: str) -> Code | None:
    """Return code that a module with ``__getattr__`` exports from another module, else None.

    Such modules import on demand, and keep what they have imported.

    Raises:
        ConfigReferenceError: The import fails.
    """
    is_lazy = "__getattr__" in vars(module) or hasattr(type(module), "__getattr__")
    if not is_lazy or "." in name or name.startswith("_"):
        return None
    try:
        found = getattr(module, name)
    except ImportError as error:
        raise ConfigReferenceError(f"{reference!r} can't be imported: {error}") from error
    except Exception:  # mostly an AttributeError: the module has no such name
        return None
    if not isinstance(found, Code) or found.__module__ == module.__name__:
        return None
    vars(module).setdefault(name, found)  # as after an import, for the error if it is not trusted
    return found


def _installed_release(package: str) -> str:
    """Describe the installed release of a package; empty if it has none."""
    try:
        return f" in {package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return ""


def find_in_module(module: ModuleType, qualname: str, reference: str) -> Code:
    """Look up a qualified name in a module, without running code.

    Raises:
        ConfigReferenceError: The name is absent, or defined elsewhere.
    """
    found: object = module
    for part in qualname.split("."):
        # The lookup in namespaces runs no __getattr__, property or descriptor. Only classes are
        # searched, so that no name leads through an imported module.
        space = vars(found) if found is module or isinstance(found, type) else {}
        if part not in space:
            release = _installed_release(module.__name__.partition(".")[0])
            own = (isinstance(c, Code) and c.__module__ == module.__name__ for c in space.values())
            here = [name for name, is_own in zip(space, own, strict=True) if is_own]
            advice = did_you_mean(part, here) or (release and "install a release that has it")
            problem = f"{reference!r} names nothing: no {part!r} is defined there{release}"
            raise ConfigReferenceError(f"{problem}; {advice}" if advice else problem)
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


def strip_annotated(annotation: Any) -> Any:
    """Return the type without ``Annotated`` and aliases; for a type variable, its bound.

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
    """Return the members of a union; for any other type, the type alone.

    >>> union_members(int | None)
    (<class 'int'>, <class 'NoneType'>)
    """
    annotation = strip_annotated(annotation)
    if get_origin(annotation) not in (Union, types.UnionType):
        return (annotation,)
    return tuple(inner for arg in get_args(annotation) for inner in union_members(arg))


def item_type(annotation: Any, index: int) -> Any:
    """Return the declared item type of a list, tuple or set, or Any."""
    for member in union_members(annotation):
        args, origin = get_args(member), get_origin(member)
        if origin is tuple and args and args[-1] is not Ellipsis:
            return args[index] if index < len(args) else Any
        if args and is_collection(origin):
            return args[0]
    return Any


def mapping_value_type(annotation: Any) -> Any:
    """Return the declared value type of a mapping, or Any."""
    for member in union_members(annotation):
        if is_mapping(origin := get_origin(member)) and len(args := get_args(member)) == 2:
            return args[1] if origin is not collections.Counter else int
    return Any


def is_mapping(origin: Any) -> bool:
    """Return True for mapping types."""
    return isinstance(origin, type) and issubclass(origin, Mapping)


def is_collection(origin: Any) -> bool:
    """Return True for types of lists, tuples or sets."""
    return (
        isinstance(origin, type)
        and issubclass(origin, collections.abc.Iterable)
        and not issubclass(origin, Mapping | str | bytes | type)
        and origin is not collections.abc.Callable
    )


def admitted_classes(annotation: Any) -> tuple[type, ...]:
    """Return the classes in ``type[...]``.

    >>> admitted_classes(type[int | str])
    (<class 'int'>, <class 'str'>)
    """
    args = get_args(annotation)
    kinds = union_members(args[0]) if args else (object,)
    return tuple(k if isinstance(k, type) and k is not Any else object for k in kinds)


def is_assignable(cls: type, kind: type) -> bool:
    """Return True if instances of ``cls`` are valid where ``kind`` is declared.

    In addition to ``issubclass``, generic configs are covariant: ``ClassConfig[MyHook]`` is valid
    for ``ClassConfig[Hook]``, although pydantic's classes are unrelated.
    """
    if issubclass(cls, kind):
        return True
    origin, wanted, _ = parametrization(kind)
    if origin is None or not issubclass(cls, origin):
        return False
    arguments: dict[Any, Any] = {}
    for base in cls.__mro__:
        base_origin, args, _ = parametrization(base)
        if base_origin is not None:
            for parameter, arg in zip(parametrization(base_origin)[2], args, strict=True):
                arguments.setdefault(parameter, arguments.get(arg, arg))
    given = [arguments.get(parameter) for parameter in parametrization(origin)[2]]
    return all(map(_is_argument, given, wanted))


def parametrization(cls: type) -> tuple[type | None, tuple[Any, ...], tuple[Any, ...]]:
    """Return the origin, arguments and type parameters of a generic config class."""
    names = ("origin", "args", "parameters")
    metadata = getattr(cls, "__pydantic_generic_metadata__", None)
    if metadata is None:  # pydantic may use the attributes of `typing` in a later release
        metadata = {name: getattr(cls, f"__{name}__", None) for name in names}
    origin, args, parameters = (metadata[name] for name in names)
    return origin, args or (), parameters or ()


def _is_argument(given: Any, wanted: Any) -> bool:
    given, wanted = strip_annotated(given), strip_annotated(wanted)
    if wanted is Any:  # which is a class since Python 3.11
        return True
    if isinstance(given, type) and isinstance(wanted, type):
        return is_assignable(given, wanted)
    return bool(given == wanted)


def find_config_class(cls: type, base: type[BaseModel] = BaseModel) -> type[BaseModel] | None:
    """Return the config class with this default ``class_type`` in the class's module, or None.

    Of several, the config named after the class is preferred.
    """
    origin = parametrization(base)[0]
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
    """Yield all classes and functions in the declaration of a config class, at any depth.

    These are arguments of ``type[...]``, nested config classes, and code in field defaults. The
    import of the config class already imported them.
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
    """Return a field's default or factory result; PydanticUndefined without a default."""
    if field.default_factory_takes_validated_data:
        return PydanticUndefined
    try:
        return field.get_default(call_default_factory=True)
    except Exception:  # raised by the user's factory, and raised again when a config is built
        return PydanticUndefined


# The state of loading travels in a context variable: pydantic loses its own context in classes that
# define __init__, as settings classes do. Outside of loading, configs accept no references.

CONFIG_TYPE = "config_type"
"""Key of a document that names the class of a config if the field admits several."""


class Loading:
    """State while a document is loaded.

    Args:
        model: Class of the config; code that the class declares needs no trust.
        trust: Further code that the document may name.
        known: Code that needs no trust in addition to declared code.
        verifying: Skip ``__post_init__``, which may have side effects: the config exists, and is
            only compared with its document.
        skips_parts: Leave parts and functions as they are, which imports nothing, and skip
            ``__post_init__``, whose rules may concern parts.
    """

    def __init__(
        self,
        model: type[BaseModel],
        trust: Trust,
        *,
        known: Iterable[Code] = (),
        verifying: bool = False,
        skips_parts: bool = False,
    ) -> None:
        self.trust = trust
        self.skips_parts = skips_parts
        self.skips_post_init = verifying or skips_parts
        self._models = [model]
        self._known = tuple(known)

    @cached_property
    def _declared(self) -> dict[str, list[Code]]:
        # Computed on demand, since it calls factories of defaults.
        by_reference: defaultdict[str, list[Code]] = defaultdict(list)
        declared = chain.from_iterable(map(declared_code, self._models))
        for code in chain(declared, self._known):
            by_reference[reference_to(code)].append(code)
        return by_reference

    def _candidates(self, reference: str, path: Path = ()) -> Iterable[Code]:
        """Return declared code of the name, else the resolved code."""
        if reference in self._declared:
            return self._declared[reference]
        module, _, qualname = reference.partition(":")
        if module == "__main__" and not self.trust.covers(module, qualname):
            # Classes saved by a script as __main__ have a module name once it is imported.
            declared = chain.from_iterable(self._declared.values())
            if same := [code for code in declared if code.__qualname__ == qualname]:
                return same
        with at_path(*path):
            return [resolve(reference, self.trust)]

    def resolve_class(self, reference: str, kinds: tuple[type, ...], path: Path) -> type:
        """Return the named class, a subclass of any of ``kinds``."""
        for kind in kinds:
            if reference == reference_to(kind):
                return kind
        for code in self._candidates(reference, path):
            if isinstance(code, type) and any(is_assignable(code, kind) for kind in kinds):
                return code
        expected = " or ".join(map(reference_to, kinds))
        raise ConfigReferenceError(f"expected a subclass of {expected}, found {reference!r}", path)

    def resolve_config_class(self, reference: object, kind: type, path: Path) -> type[BaseModel]:
        """Return the config class named by ``config_type``; code in its declaration is trusted."""
        if not isinstance(reference, str):
            raise ConfigReferenceError(f"expected the name of a class, found {reference!r}", path)
        found = self.resolve_class(reference, (kind,), path)
        if not issubclass(found, BaseModel):
            raise ConfigReferenceError(f"expected a config class, found {reference!r}", path)
        if found not in self._models:
            self._models.append(found)
            self.__dict__.pop("_declared", None)
        return found

    def resolve_code(self, reference: str, path: Path = ()) -> Code:
        """Return the named function or class."""
        return next(iter(self._candidates(reference, path)))

    def resolve_function(self, reference: str, annotation: Any, path: Path) -> Code:
        """Return the named function, checked against a declared ``Callable[...]``."""
        found = self.resolve_code(reference, path)
        if not isinstance(found, FunctionType | BuiltinFunctionType):
            raise ConfigReferenceError(f"expected a function, found the class {reference!r}", path)
        args = get_args(annotation)
        if args and isinstance(args[0], list):
            try:
                inspect.signature(found).bind(*args[0])
            except TypeError as error:
                problem = f"{reference!r} can't be called with {len(args[0])} arguments: {error}"
                raise ConfigReferenceError(problem, path) from error
            except ValueError:  # some builtins have no signature
                pass
        return found


_current: ContextVar[Loading | None] = ContextVar("_current", default=None)


def current() -> Loading | None:
    """Return the state of the current loading, or None."""
    return _current.get()


@contextmanager
def loading(state: Loading) -> Iterator[None]:
    """Load a document: validation inside the context uses this state."""
    token = _current.set(state)
    try:
        yield
    finally:
        _current.reset(token)
