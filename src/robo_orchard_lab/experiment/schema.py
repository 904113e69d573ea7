"""JSON Schema of experiment files, by which editors complete and check them.

All of it is made of the config classes, those of torch's and others' classes included, so that it
says what the loader would. Rules across fields are the loader's alone.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol, TypeAlias, get_args

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import CoreSchema

from robo_orchard_core.utils.config import FieldsOf, Function, Part, config_class_of
from robo_orchard_core.utils.config.build import DerivedConfig, returned_class
from robo_orchard_core.utils.config.errors import ConfigReferenceError
from robo_orchard_core.utils.config.parts import (
    PART_KEYS,
    OpenDerivedConfig,
    function_config_class,
)
from robo_orchard_core.utils.config.references import (
    Code,
    admitted_classes,
    find_in_module,
    is_assignable,
    reference_to,
    split_reference,
)
from robo_orchard_lab.experiment.catalogue import CATALOGUE
from robo_orchard_lab.experiment.config import ExperimentConfig
from robo_orchard_lab.experiment.parts import OptimizerConfig, ParameterGroup

# --- schema fields ---------------------------------------------------------------------------
# The JSON Schema of one config class's fields, as pydantic makes it, but for parts.


Json: TypeAlias = dict[str, Any]

_FUNCTION = get_args(Function)[1]
_PLACE = "is defined as"


class Defines(Protocol):
    """What has definitions of its own, and gives references to them."""

    def config(self, cls: type[BaseModel]) -> Json: ...
    def part(self, part: Part) -> Json: ...
    def function(self) -> Json: ...
    def subclass(self, kind: type) -> Json: ...


def fields_of(
    cls: type[BaseModel], others: Defines, code: Code | None = None, given: tuple[str, ...] = ()
) -> Json:
    """The schema of a mapping with the fields of ``cls``.

    Args:
        cls: A config class.
        others: What is asked for the definitions of config classes and parts in it.
        code: The class or function that its configs are for.
        given: Fields that have no place in files, since whoever builds it gives them.
    """
    schema = _generated(cls.__pydantic_core_schema__, cls, others)
    del schema["title"]
    properties = {k: v for k, v in schema.get("properties", {}).items() if k not in given}
    without_default = getattr(cls, "required_parameters", ())
    required = [*schema.pop("required", ()), *without_default]
    for name in properties.keys() & {*without_default}:
        del properties[name]["default"]  # which is no value, but stands for none
    if issubclass(cls, OpenDerivedConfig):
        for name, declaration in cls.extra_parameters.items():
            properties[name] = _generated(TypeAdapter(declaration).core_schema, cls, others)
        schema["additionalProperties"] = cls.accepts_any
    schema["description"] = _first_paragraph(cls if code is None else code)
    if not issubclass(cls, DerivedConfig):
        properties |= {"config_type": {"type": "string"}} if code is not None else {}
    else:
        properties["class_type" if isinstance(code, type) else "func"] = {"type": "string"}
    schema["properties"] = properties
    if needed := [name for name in required if name in properties and name not in PART_KEYS]:
        schema["required"] = needed
    return schema


def _generated(core: CoreSchema, cls: type[BaseModel], others: Defines) -> Json:
    schema = _Generator(cls, others).generate(core)
    settled: Json = _settled(schema, schema.pop("$defs", {}))
    return settled


class _Generator(GenerateJsonSchema):
    ignored_warning_kinds: set[Any] = {"skipped-choice", "non-serializable-default"}  # noqa: RUF012 - as pydantic declares it

    def __init__(self, cls: type[BaseModel], others: Defines) -> None:
        super().__init__()
        self._cls = cls
        self._others = others

    def model_schema(self, schema: Any) -> Json:
        cls: type[BaseModel] = schema["cls"]
        if cls is self._cls:
            return super().model_schema(schema)
        field = cls.model_fields.get("class_type")
        if field is not None and field.is_required():
            return _placed(self._others.part(Part(admitted_classes(field.annotation))))
        return _placed(self._others.config(cls))

    def function_plain_schema(self, schema: Any) -> Json:
        validator = getattr(schema["function"]["function"], "__self__", None)
        if isinstance(validator, Part):
            return _placed(self._others.part(validator))
        if isinstance(validator, FieldsOf):
            return _placed(self._others.config(validator.config_class))
        if validator is _FUNCTION:
            return _placed_within(self._others.function())
        return super().function_plain_schema(schema)

    def is_subclass_schema(self, schema: Any) -> Json:
        return self._others.subclass(schema["cls"])

    def callable_schema(self, schema: Any) -> Json:
        return _placed_within(self._others.function())

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> Json:
        return {}  # the loader alone can tell

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def sort(self, value: Json, parent_key: str | None = None) -> Json:
        return value  # fields stay in the order of their declaration


def _placed(reference: Json) -> Json:
    # Not as "$ref" yet, which pydantic would look for among its own definitions.
    return {_PLACE: reference["$ref"]}


def _placed_within(choice: Json) -> Json:
    return {"anyOf": [_placed(c) if "$ref" in c else c for c in choice["anyOf"]]}


def _settled(schema: Any, local: Json) -> Any:
    """With references to our definitions, and what pydantic has defined here written out."""
    if isinstance(schema, list):
        return [_settled(item, local) for item in schema]
    if not isinstance(schema, dict):
        return schema
    rest = {key: value for key, value in schema.items() if key not in (_PLACE, "$ref")}
    if isinstance(name := schema.get("$ref"), str):
        return _settled({**local[name.removeprefix("#/$defs/")], **rest}, local)
    settled = {key: _settled(value, local) for key, value in rest.items() if _is_json(value)}
    return {"$ref": schema[_PLACE], **settled} if _PLACE in schema else settled


def _is_json(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _first_paragraph(code: Code) -> str:
    text = inspect.cleandoc(code.__doc__ or reference_to(code)).split("\n\n")[0]
    return " ".join(text.split())[:300]


# --- schema definitions ----------------------------------------------------------------------
# The definitions that the JSON Schema of experiment files consists of, one for each config class.
#
# A part is a mapping that says by its class which fields it has: for each class that may stand in a
# place there is an ``if`` and a ``then``, so that what is wrong is told of the field that is wrong.


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
            if isinstance(code, type) and is_assignable(code, kind)
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
        return result is not None and any(is_assignable(result, kind) for kind in part.classes)

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
    name, qualname = split_reference(reference)
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None
    return find_in_module(module, qualname, reference)


def _is_of(cls: type, part: Part) -> bool:
    if issubclass(cls, BaseModel) or inspect.isabstract(cls):
        return False
    if part.functions == "are called" and part.classes == (object,):
        return any("__call__" in vars(base) for base in cls.__mro__)  # its instances are
    return any(is_assignable(cls, kind) for kind in part.classes)


def _one_of(names: list[str]) -> Json:
    return {"enum": sorted(set(names), key=lambda name: (":" in name, name))}


DIALECT = "https://json-schema.org/draft/2020-12/schema"

_DEFS = "#/$defs/"
_VARIANT = "variant."
_OF_FILES: Json = {
    "$schema": {"type": "string", "description": "Where editors find this schema."},
    "base": {
        "type": "string",
        "pattern": r"^[^/\\]+$",
        "description": "The file beside this one that this is a variant of, and says only how it "
        "differs; null removes a hook, an evaluation set or a parameter group.",
    },
}


def experiment_schema(
    names: Mapping[str, str] = CATALOGUE, trust: Iterable[str] = ()
) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of experiment files; imports what they may name.

    >>> name = "robo_orchard_lab.pipeline.hooks.stats_monitor:StatsMonitor"
    >>> schema = experiment_schema({"StatsMonitor": name})
    >>> schema["$defs"]["StatsMonitor"]["properties"]["grad_norm"]["type"]
    'boolean'

    Args:
        names: What files may name without more trust, and where that is defined.
        trust: What of the user's own they may name: packages, of whose classes and functions
            nothing is known but their names, and single ones (``my_team.hooks:Mine``), which are
            imported, and have their fields in the schema. Without any, those of all packages that
            have nothing in ``names``.

    Raises:
        ConfigReferenceError: A class or function of ``trust`` isn't there.
    """
    definitions = Definitions(names, tuple(trust))
    root = definitions.config(ExperimentConfig)["$ref"]
    found = definitions.complete()
    _say_what_groups_take(found)
    experiment = found[root.removeprefix(_DEFS)]
    experiment["properties"] = _OF_FILES | experiment["properties"]
    return {
        "$schema": DIALECT,
        "title": "An experiment of robo-orchard-lab",
        "type": "object",
        "if": {"required": ["base"]},
        "then": {"$ref": _DEFS + _VARIANT + root.removeprefix(_DEFS)},
        "else": {"$ref": root},
        "$defs": found | _variants(found),
    }


def _say_what_groups_take(definitions: Mapping[str, Json]) -> None:
    """Of each optimizer, that its groups have its own options."""
    name = ParameterGroup.__name__
    for schema in definitions.values():
        groups = schema.get("properties", {}).get("groups", {})
        is_closed = schema.get("additionalProperties") is False
        if is_closed and groups.get("additionalProperties") == {"$ref": _DEFS + name}:
            group = definitions[name]
            own = OptimizerConfig.model_fields
            options = {k: v for k, v in schema["properties"].items() if k not in own}
            groups["additionalProperties"] = {
                **group,
                "properties": group["properties"] | options,
                "additionalProperties": False,
            }


def _variants(definitions: Mapping[str, Json]) -> dict[str, Json]:
    """What files with a base are held to, as far as it is something else."""
    differing: set[str] = set()
    while True:
        variants = {name: _variant(schema, differing) for name, schema in definitions.items()}
        found = {name for name, schema in definitions.items() if variants[name] != schema}
        if found == differing:
            return {_VARIANT + name: variants[name] for name in definitions if name in found}
        differing = found


def _variant(schema: Any, differing: set[str]) -> Any:
    """The same for a file with a base: nothing is required, but in lists, which replace those of
    the base, and entries that have names may be null."""
    if isinstance(schema, list):
        return [_variant(item, differing) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made: Json = {}
    for key, value in schema.items():
        if key == "$ref" and (name := value.removeprefix(_DEFS)) in differing:
            made[key] = _DEFS + _VARIANT + name
        elif key in ("items", "prefixItems", "if", "default", "enum"):
            made[key] = value
        elif (
            key == "additionalProperties"
            and isinstance(value, dict)
            and {"$ref", "type"} & {*value}
        ):
            made[key] = {"anyOf": [_variant(value, differing), {"type": "null"}]}
        elif not _requires(key, value):
            made[key] = _variant(value, differing)
    return made


def _requires(key: str, value: Any) -> bool:
    """Whether a keyword says what has to be there, and is no field of that name."""
    if key == "anyOf":
        return isinstance(value, list) and all([*choice] == ["required"] for choice in value)
    return key == "required" and isinstance(value, list)
