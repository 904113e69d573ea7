"""From how a constructor declares its parameters to how fields for them are declared.

What has a plain form stays as it is. A class that has none stands for a part: a mapping in the
document that says what to make. What isn't declared takes plain data, with parts anywhere in it.
"""

from __future__ import annotations

import collections.abc
import datetime
import inspect
from enum import Enum
from pathlib import PurePath
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter

from robo_orchard_core.utils.config.kinds import bare, is_collection, is_mapping, members
from robo_orchard_core.utils.config.parts import Anything, Function, Part
from robo_orchard_core.utils.config.references import reference_to

_PLAIN = (
    *(int, float, str, bool, PurePath, Enum),
    *(datetime.date, datetime.time, datetime.timedelta, BaseModel),
)

DECLARATIONS: dict[str, Any] = {
    "numbers:Number": int | float,
    "numbers:Real": int | float,
    "numbers:Integral": int,
}
"""How fields are declared for instances of a class, by its reference, where they are something
else than parts of this kind: texts for the data types of tensors, None for what no document holds,
such as tensors."""


UNDECLARED: dict[tuple[str, str], Any] = {}
"""How fields are declared for parameters that say nothing of their type, by the name of the package
that has them and their own."""


def field_annotation(hint: Any) -> Any:
    """The declaration of a field for a parameter that is declared as ``hint``.

    What stands in ``Annotated`` counts for the field as well.

    >>> field_annotation(float | None)
    typing.Optional[float]
    >>> field_annotation(Annotated[float, "in metres"])
    typing.Annotated[float, 'in metres']
    """
    if get_origin(hint) is Annotated:
        inner, *marks = get_args(hint)
        annotation: Any = Annotated[(field_annotation(inner), *marks)]
    else:
        annotation = _converted(hint)
    try:
        TypeAdapter(annotation)
    except (PydanticSchemaGenerationError, PydanticUserError, TypeError):
        return Anything if get_origin(hint) is not Annotated else field_annotation(bare(hint))
    return Anything if annotation is None else annotation


def _converted(hint: Any) -> Any:
    """The same; None for what no document holds."""
    hint = bare(hint)
    origin, args = get_origin(hint), get_args(hint)
    if hint is type(None) or origin is Literal or origin is type:
        return hint
    if len(options := members(hint)) > 1:
        admitted = [c for c in map(_converted, options) if c is not None]
        return Union[tuple(admitted)] if admitted else None  # noqa: UP007 - made at run time
    if hint is collections.abc.Callable or origin is collections.abc.Callable:
        return Function
    kind = origin or hint
    if not isinstance(kind, type) or kind in (Any, object, inspect.Parameter.empty):
        return Anything
    if (reference := reference_to(kind)) in DECLARATIONS:
        return DECLARATIONS[reference]
    if issubclass(kind, Enum) and not all(isinstance(m.value, int | str | float) for m in kind):
        return Anything  # what takes such a member takes its name, too
    if issubclass(kind, _PLAIN):
        return kind
    if kind is tuple and args and args[-1] is not Ellipsis:
        return tuple.__class_getitem__(tuple(_inner(arg) for arg in args))
    if is_mapping(kind):
        inner = _inner(args[1] if len(args) == 2 else Any)
        return dict[str, inner]  # type: ignore[valid-type]
    if kind is tuple:
        return tuple.__class_getitem__((_inner(args[0] if args else Any), ...))
    if is_collection(kind) and kind.__module__ in ("builtins", "collections.abc"):
        inner = _inner(args[0] if args else Any)
        return list[inner]  # type: ignore[valid-type]
    return Annotated[Any, Part(kind)]


def _inner(hint: Any) -> Any:
    inner = _converted(hint)
    return Anything if inner is None else inner
