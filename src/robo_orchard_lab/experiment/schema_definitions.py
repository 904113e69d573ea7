"""The definitions that the JSON Schema of experiment files consists of, one for each config class.

A part is a mapping that says by its class which fields it has: for each class that may stand in a
place there is an ``if`` and a ``then``, so that what is wrong is told of the field that is wrong.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias

from pydantic import BaseModel

from robo_orchard_core.utils.config import Part, config_class_of
from robo_orchard_core.utils.config.class_config import returned_class
from robo_orchard_core.utils.config.errors import ConfigReferenceError
from robo_orchard_core.utils.config.parts import DerivedConfig, function_config_class
from robo_orchard_core.utils.config.references import Code, found_in, is_kind, reference_to, split
from robo_orchard_lab.experiment.schema_fields import Json, fields_of

_KEYS = {
    "class_type": "The class; the other keys are what it is made with.",
    "func": "The function; the other keys are its arguments.",
    "config_type": "The class of the configuration, as configurations write themselves.",
}
_CALLED = {"make": [], "are called": ["called"]}
_FIELDS = "fields_by_class"
_Candidate: TypeAlias = tuple[Code, type[BaseModel]]


class Definitions:
    """Definitions by name: those that are asked for, and all that these need.

    Args:
        names: What files may name, and where that is defined.
        trust: Packages, classes and functions of the user's.

    Raises:
        ConfigReferenceError: A class or function of ``trust`` isn't there.
    """

    def __init__(self, names: Mapping[str, str], trust: tuple[str, ...]) -> None:
        self.found: dict[str, Json] = {}
        self._waiting: list[tuple[str, Callable[[], Json]]] = []
        self._choices: dict[str, dict[str, Json]] = {}
        self._packages = [name for name in trust if ":" not in name]
        self._spellings: dict[str, list[str]] = {}
        self._single = {name: name for name in trust if ":" in name}
        for name, definition in {**names, **self._single}.items():
            self._spellings.setdefault(definition, [definition]).append(name)
        code = {reference: _imported(reference) for reference in self._spellings}
        for reference in self._single:
            if code[reference] is None:
                raise ConfigReferenceError(f"the module of {reference!r} can't be imported")
        self._code = {reference: item for reference, item in code.items() if item is not None}

    def complete(self) -> dict[str, Json]:
        """Every definition, by name."""
        while self._waiting:
            name, make = self._waiting.pop(0)
            self.found[name] = make()
        for name, choices in self._choices.items():
            self.found[name] = {"allOf": [*choices.values()]}
        return self.found

    def _defined(self, name: str, make: Callable[[], Json]) -> Json:
        if name not in self.found:
            self.found[name] = {}
            self._waiting.append((name, make))
        return {"$ref": f"#/$defs/{name}"}

    def config(self, cls: type[BaseModel]) -> Json:
        """The fields of a config class."""
        field = cls.model_fields.get("class_type")
        code = None if field is None or field.is_required() else field.default
        name = cls.__name__ if code is None else self._short(code)
        return self._defined(name, lambda: fields_of(cls, self, code))

    def part(self, part: Part) -> Json:
        """What may stand where a part is declared."""
        kinds = part.kinds if isinstance(part.kinds, tuple) else (part.kinds,)
        texts = [kind if isinstance(kind, str) else reference_to(kind) for kind in kinds]
        name = ".".join([*_CALLED[part.functions], *(text.rpartition(":")[2] for text in texts)])
        return self._defined(f"part.{name}", lambda: self._part(part, name))

    def function(self) -> Json:
        """A function by its name, or a part that is or makes one."""
        return {
            "anyOf": [
                {"type": "string", "description": "A function or class, by its name."},
                self.part(Part(object, functions="are called")),
            ]
        }

    def subclass(self, kind: type) -> Json:
        """The name of a class of this kind."""
        known = [
            name
            for reference, code in self._code.items()
            if isinstance(code, type) and is_kind(code, kind)
            for name in self._spellings[reference]
        ]
        return self._choice([reference_to(kind), *known])

    def _choice(self, names: list[str]) -> Json:
        """One of these names, or one of the user's."""
        return {"anyOf": [*([_one_of(names)] if names else []), self._users()]}

    def _short(self, code: Code) -> str:
        names = self._spellings.get(reference_to(code), [reference_to(code)])
        return min(names, key=len)

    def _part(self, part: Part, name: str) -> Json:
        known: dict[str, list[str]] = {key: [] for key in _KEYS}
        place = "-without-".join([_FIELDS, *part.given])
        for code, cls in self._candidates(part):
            named = {"class_type" if isinstance(code, type) else "func": reference_to(code)}
            if not issubclass(cls, DerivedConfig):
                named["config_type"] = reference_to(cls)
            choices = self._choices.setdefault(place, {})
            fields = None if {*named.values()} <= {*choices} else self._of_code(code, cls, part)
            for key, reference in named.items():
                names = self._spellings.get(reference, [reference])
                known[key] += names
                if fields is not None:
                    says = {"properties": {key: _one_of(names)}, "required": [key]}
                    choices[reference] = {"if": says, "then": fields}
        schema: Json = {
            "type": "object",
            "properties": {
                key: self._defined(f"{key}.{name}", partial(self._choice, known[key]))
                | {"description": text}
                for key, text in _KEYS.items()
            },
            "anyOf": [{"required": [key]} for key in _KEYS],
        }
        return schema | ({"allOf": [{"$ref": f"#/$defs/{place}"}]} if any(known.values()) else {})

    def _of_code(self, code: Code, cls: type[BaseModel], part: Part) -> Json:
        """The fields, and beside them which of these are required in this place."""
        without = [name for name in part.given if name in cls.model_fields]
        name = "-without-".join([self._short(code), *without])
        fields = fields_of(cls, self, code, part.given)
        required = fields.pop("required", [])
        if part.functions == "are called" and not isinstance(code, type):
            required = []  # whoever calls it gives them
        reference = self._defined(name, lambda: fields)
        return reference | ({"required": required} if required else {})

    def _candidates(self, part: Part) -> Iterator[_Candidate]:
        """The code that may stand for a part, with its config class."""
        for code in self._code.values():
            try:
                if isinstance(code, type) and _is_of(code, part):
                    yield code, config_class_of(code)
                elif not isinstance(code, type) and self._stands_for(code, part):
                    yield code, function_config_class(code)
            except (ConfigReferenceError, ImportError):
                continue  # it doesn't say its parameters; or the kind's package isn't there

    def _stands_for(self, function: Code, part: Part) -> bool:
        """Whether a function stands for such a part, as far as that can be told."""
        if part.functions == "are called":
            # Those of the catalogue make models: they are no batch processors.
            return part.classes == (object,) or reference_to(function) in self._single
        result = returned_class(function)
        return result is not None and any(is_kind(result, kind) for kind in part.classes)

    def _users(self) -> Json:
        """How code of the user's own packages is named."""
        if self._packages:
            start = rf"(?:{'|'.join(map(re.escape, self._packages))})(?:\.[^\s:]+)?"
        else:
            ours = sorted({re.split(r"[.:]", reference)[0] for reference in self._code})
            start = rf"(?!(?:{'|'.join(ours)})[.:])[^\s:]+" if ours else r"[^\s:]+"
        return {
            "type": "string",
            "pattern": rf"^{start}:[^\s:]+$",
            "description": "package.module:Name, of a package that you trust.",
        }


def _imported(reference: str) -> Any:
    """What a reference leads to; None where its package isn't installed."""
    name, qualname = split(reference)
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None
    return found_in(module, qualname, reference)


def _is_of(cls: type, part: Part) -> bool:
    if issubclass(cls, BaseModel) or inspect.isabstract(cls):
        return False
    if part.functions == "are called" and part.classes == (object,):
        return any("__call__" in vars(base) for base in cls.__mro__)  # its instances are
    return any(is_kind(cls, kind) for kind in part.classes)


def _one_of(names: list[str]) -> Json:
    return {"enum": sorted(set(names), key=lambda name: (":" in name, name))}
