"""Schemas of saved states, to check a decoded state before any live object changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import NoneType
from typing import Annotated, Any, TypeAlias

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import ErrorDetails

from robo_orchard_lab.pipeline.errors import StateError, check_state_version
from robo_orchard_lab.pipeline.progress import MAX_COUNT


def _scalar(value: torch.Tensor) -> torch.Tensor:
    if value.dim() or not value.is_floating_point():
        raise ValueError("expected a tensor of one real number")
    return value


Count: TypeAlias = Annotated[int, Field(strict=True, ge=0, le=MAX_COUNT)]
Real: TypeAlias = Annotated[float, Field(strict=True)]
"""A number, also NaN or infinite."""
Flag: TypeAlias = Annotated[bool, Field(strict=True)]
Text: TypeAlias = Annotated[str, Field(strict=True)]
Scalar: TypeAlias = Annotated[torch.Tensor, AfterValidator(_scalar)]
Tensors: TypeAlias = dict[str, torch.Tensor]


class StateSchema:
    """Names and types of a state's entries; further entries are errors.

    >>> schema = StateSchema(version=1, best=Real | None, since=Count)
    >>> schema.check({"version": 1, "best": None, "since": -1}, "EarlyStopping")
    Traceback (most recent call last):
    robo_orchard_lab.pipeline.errors.StateError: EarlyStopping.since: expected greater than or \
equal to 0, found -1

    Args:
        version: version of the state, its entry ``version``; None for a state without one.
        optional: names that may be missing.
        then: further check of a state that fits; raises ValueError.
        fields: types by name.
    """

    def __init__(
        self,
        version: int | None = None,
        optional: Sequence[str] = (),
        then: Callable[[Mapping[str, Any]], None] | None = None,
        **fields: Any,
    ) -> None:
        self._version = version
        if version is not None:
            fields["version"] = Count
        self.names = tuple(fields)
        """Names of all entries."""
        self._fields, self._optional, self._then = fields, optional, then

    @cached_property
    def type(self) -> Any:
        """Type of a nested state, for the fields of another schema; made on first use."""
        # Aliases, since names such as `copy` are methods of a model.
        given: dict[str, Any] = {
            f"field_{name}": (kind, Field(None if name in self._optional else ..., alias=name))
            for name, kind in self._fields.items()
        }
        config = ConfigDict(
            extra="forbid", strict=True, arbitrary_types_allowed=True, defer_build=True
        )
        model: Any = create_model("State", __config__=config, **given)
        found: Any = Annotated[model, Field(strict=False)]  # accepts a mapping
        if (then := self._then) is not None:

            def check(state: BaseModel) -> BaseModel:
                then({name: getattr(state, f"field_{name}") for name in self._fields})
                return state

            found = Annotated[found, AfterValidator(check)]
        return found

    @cached_property
    def _whole(self) -> Any:
        return create_model("Whole", state=(self.type, ...))

    def check(self, state: Any, owner: str) -> None:
        """Raise a ``StateError`` with the path of the first entry that does not fit."""
        if not isinstance(state, Mapping):
            raise StateError(f"{owner}: expected a mapping, found {_found(state)}")
        if self._version is not None:
            check_state_version(state, self._version, owner)
        try:
            self._whole.model_validate({"state": dict(state)})
        except OverflowError as error:
            raise StateError(f"{owner}: a number is too large: {error}") from None
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            path = ".".join([owner, *(f"{key:.80}" for key in map(str, first["loc"][1:9]))])
            raise StateError(f"{path}: {_problem(first)}") from None


def _problem(error: ErrorDetails) -> str:
    match error["type"]:
        case "missing":
            return "expected a value, found none"
        case "extra_forbidden":
            expected = "expected no such entry"
        case _:
            expected = error["msg"].removeprefix("Value error, ")
            expected = expected.replace("Input should be", "expected")
    return f"{expected}, found {_found(error['input'])}"


def mapping_of(schema: StateSchema) -> Any:
    """Return the type of a mapping of names to nested states."""
    return dict.__class_getitem__((str, schema.type))


def list_of(schema: StateSchema) -> Any:
    """Return the type of a list of nested states."""
    return list.__class_getitem__(schema.type)


def _found(value: Any) -> str:
    if value is None or isinstance(value, (bool, int, float, str)):
        return f"{value!r:.60}"
    if isinstance(value, torch.Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"a {type(value).__name__}"


_KINDS: tuple[Any, ...] = (bool, (int, float), str, Mapping, (list, tuple), torch.Tensor)


def check_similar(live: Any, saved: Any, path: str, *, strict: bool = False) -> None:
    """Raise a ``StateError`` unless a saved value has the structure of a live one.

    For objects of other libraries, whose states have no schema. Mappings are compared by their
    common keys, and sequences of equal length item by item; None in the live state fits any value.
    With ``strict``, for classes of torch, tuples and lists of mappings have equal lengths, and
    numbers that are not negative stay so.
    """
    if isinstance(live, (bool, NoneType)) and isinstance(saved, (bool, NoneType)):
        return  # such as torch's foreach
    kind = next((kind for kind in _KINDS if isinstance(live, kind)), None)
    if kind is None:
        return
    fits = isinstance(saved, kind) and isinstance(saved, bool) == isinstance(live, bool)
    if fits and isinstance(live, torch.Tensor):
        fits = saved.shape == live.shape and saved.dtype == live.dtype
    elif fits and isinstance(saved, (int, float)):
        fits = abs(saved) <= MAX_COUNT if isinstance(saved, int) else saved == saved or live != live
    if not fits:
        raise StateError(f"{path}: expected a value like {_found(live)}, found {_found(saved)}")
    if isinstance(live, Mapping):
        for key in live.keys() & saved.keys():
            check_similar(live[key], saved[key], f"{path}.{key}", strict=strict)
    elif isinstance(live, (list, tuple)) and len(live) == len(saved):
        for index, (own, other) in enumerate(zip(live, saved, strict=True)):
            check_similar(own, other, f"{path}.{index}", strict=strict)
    elif isinstance(live, tuple) or (isinstance(live, list) and isinstance((*live, 0)[0], Mapping)):
        if strict:
            raise StateError(f"{path}: expected {len(live)} values, found {len(saved)}")
    elif strict and isinstance(live, (int, float)) and saved < 0 <= live:
        raise StateError(f"{path}: expected a number >= 0, found {_found(saved)}")


@contextmanager
def errors_of(owner: str) -> Iterator[None]:
    """Turn any error of a library's own checks into a ``StateError`` that names the component."""
    try:
        yield
    except StateError:
        raise
    except Exception as error:
        raise StateError(
            f"{owner}: its saved state is refused: {type(error).__name__}: {error}"
        ) from error
