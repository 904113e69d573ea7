"""JSON Schema of experiment files, for completion and checks in editors.

The schema derives from the config classes of this project and from the signatures of catalogued
classes, so it accepts what the loader accepts. Rules across fields are checked by the loader only.

A part names its class, which decides its fields: for each class that a part accepts there is an
``if``/``then`` pair, so that an editor reports the field that is wrong.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias, get_args, get_origin

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import DefsRef, GenerateJsonSchema, JsonRef
from pydantic_core import PydanticSerializationError

from robo_orchard_core.utils.config import FieldsOf, Function, Part, config_class_of
from robo_orchard_core.utils.config.build import CallableConfig, DerivedConfig
from robo_orchard_core.utils.config.errors import ConfigReferenceError
from robo_orchard_core.utils.config.parts import (
    PART_KEYS,
    OpenDerivedConfig,
    StandIns,
)
from robo_orchard_core.utils.config.references import (
    Code,
    Trust,
    admitted_classes,
    is_assignable,
    reference_to,
    resolve,
    union_members,
)
from robo_orchard_lab.experiment.catalogue import CATALOGUE
from robo_orchard_lab.experiment.config import ExperimentConfig
from robo_orchard_lab.experiment.from_data import FROM_DATA
from robo_orchard_lab.experiment.parts import (
    AUTO,
    LRSchedulerFields,
    OptimizerConfig,
    OptimizerFields,
    ParameterGroup,
)

DIALECT = "https://json-schema.org/draft/2020-12/schema"

Json: TypeAlias = dict[str, Any]

_DEFS = "#/$defs/"
_VARIANT = "variant."
_FILE_FIELDS: Json = {
    "$schema": {"type": "string", "description": "Path of this schema, for editors."},
    "base": {
        "type": "string",
        "pattern": r"^[^/\\]+$",
        "description": "File in the same folder on which this variant is based; null removes a "
        "hook, an evaluation set, a named optimizer or a parameter group.",
    },
}
_KEYS = {
    "class_type": "The class; the other keys are its arguments.",
    "func": "The function; the other keys are its arguments.",
    "config_type": "The config class, as configs write themselves.",
}
_FUNCTION = get_args(Function)[1]
_FROM_DATA: Json = {
    "type": "object",
    "properties": {FROM_DATA: {"type": "string"}, "dataset": {"type": "string"}},
    "additionalProperties": False,
    "description": "Value of a dataset, such as classes.len; the training data by default.",
}


def experiment_schema(
    names: Mapping[str, str] = CATALOGUE, trust: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of experiment files; imports catalogued code.

    >>> name = "robo_orchard_lab.pipeline.hooks.stats_monitor:StatsMonitor"
    >>> schema = experiment_schema({"StatsMonitor": name})
    >>> schema["$defs"]["StatsMonitor"]["properties"]["grad_norm"]["type"]
    'boolean'

    Args:
        names: Definition of each name that files may use without further trust; names that the
            installed packages don't define are skipped.
        trust: Trusted packages, whose code is accepted by name with any fields, and single
            classes or functions (``my_team.hooks:Mine``), which are imported and have their fields
            in the schema. By default, all packages without an entry in ``names``.

    Raises:
        ConfigReferenceError: A class or function of ``trust`` doesn't exist.
    """
    generator = _ExperimentSchema(names, tuple(trust))
    root = generator.reference_to_config(ExperimentConfig)["$ref"]
    found = generator.complete()
    _add_options_of_groups(found)
    experiment = found[root.removeprefix(_DEFS)]
    experiment["properties"] = _FILE_FIELDS | experiment["properties"]
    return {
        "$schema": DIALECT,
        "title": "An experiment of robo-orchard-lab",
        "type": "object",
        "if": {"required": ["base"]},
        "then": {"$ref": _DEFS + _VARIANT + root.removeprefix(_DEFS)},
        "else": {"$ref": root},
        "$defs": found | _variants(found),
    }


class _ExperimentSchema(GenerateJsonSchema):
    """Generator with one definition for each config class and each kind of part."""

    ignored_warning_kinds: set[Any] = {"skipped-choice", "non-serializable-default"}  # noqa: RUF012 - as pydantic declares it

    def __init__(self, names: Mapping[str, str], trust: tuple[str, ...]) -> None:
        super().__init__()
        self._choices: dict[str, dict[str, Json]] = {}
        self._shared: dict[str, Any] = {}  # core schemas that pydantic references by name
        self._expanded: type[BaseModel] | None = None
        self._admits_auto = self._admits_data = False  # in the class that is expanded
        self._packages = [name for name in trust if ":" not in name]
        self._single = {name: name for name in trust if ":" in name}
        self._spellings: dict[str, list[str]] = {}
        for name, definition in {**names, **self._single}.items():
            self._spellings.setdefault(definition, [definition]).append(name)
        self._code: dict[str, Code] = {}
        admitted = Trust(classes=frozenset(self._spellings))
        for reference in self._spellings:
            try:
                self._code[reference] = resolve(reference, admitted)
            except ConfigReferenceError:
                if reference in self._single:
                    raise
                # The package isn't installed, or its installed release lacks the code.

    def complete(self) -> dict[str, Json]:
        """Return all definitions by name."""
        choices = {name: {"allOf": [*found.values()]} for name, found in self._choices.items()}
        return {str(name): schema for name, schema in self.definitions.items()} | choices

    # Pydantic's hooks: parts and nested configs become references to definitions.

    def generate_inner(self, schema: Any) -> Json:
        wrapped = schema
        while wrapped["type"].startswith("function-") and "schema" in wrapped:
            wrapped = wrapped["schema"]
        # Without these keys, pydantic would define models itself and expand references to them.
        dropped = {"ref", "metadata"} if wrapped["type"] == "model" else {"ref"}
        schema = {key: value for key, value in schema.items() if key not in dropped}
        if schema["type"] != "model":
            return super().generate_inner(schema)
        if schema["cls"] is self._expanded:
            self._expanded = None
            return super().generate_inner(schema)
        field = schema["cls"].model_fields.get("class_type")
        if field is not None and field.is_required():
            return self._reference_to_part(Part(admitted_classes(field.annotation)))
        return self.reference_to_config(schema["cls"])

    def definitions_schema(self, schema: Any) -> Json:
        self._shared |= {definition["ref"]: definition for definition in schema["definitions"]}
        return self.generate_inner(schema["schema"])

    def definition_ref_schema(self, schema: Any) -> Json:
        return self.generate_inner(self._shared[schema["schema_ref"]])

    def function_plain_schema(self, schema: Any) -> Json:
        validator = getattr(schema["function"]["function"], "__self__", None)
        if isinstance(validator, Part):
            return self._reference_to_part(validator)
        if isinstance(validator, FieldsOf):
            return self.reference_to_config(validator.config_class)
        if validator is _FUNCTION:
            return self.callable_schema(schema)
        return super().function_plain_schema(schema)

    def function_wrap_schema(self, schema: Any) -> Json:
        validator: Any = schema["function"]["function"]
        inner = self.generate_inner(schema["schema"])
        marker = getattr(getattr(validator, "func", None), "__self__", None)
        if not isinstance(marker, StandIns):
            return inner
        kinds = union_members(validator.args[0])
        choices = [inner]
        if self._admits_auto and int in kinds:
            choices.append({"const": AUTO})
        # Mostly sizes and statistics; with all types, the schema would have 1.4 MB.
        if self._admits_data and (int in kinds or any(get_origin(k) is list for k in kinds)):
            choices.append(self._define(FROM_DATA, lambda: _FROM_DATA))
        return {"anyOf": choices} if inner and len(choices) > 1 else inner

    def callable_schema(self, schema: Any) -> Json:
        return {
            "anyOf": [
                {"type": "string", "description": "A function or class, by its name."},
                self._reference_to_part(Part(object, functions="call")),
            ]
        }

    def tagged_union_schema(self, schema: Any) -> Json:
        # One optimizer, or mappings without the keys of a part by name.
        one, named = map(self.generate_inner, schema["choices"].values())
        are_named = {
            "type": "object",
            "minProperties": 1,
            "additionalProperties": {"type": ["object", "null"]},
            "not": {"anyOf": [{"required": [key]} for key in _KEYS]},
        }
        return {"if": are_named, "then": named, "else": one}

    def is_subclass_schema(self, schema: Any) -> Json:
        names = [reference_to(schema["cls"])]
        for reference, code in self._code.items():
            if isinstance(code, type) and is_assignable(code, schema["cls"]):
                names += self._spellings[reference]
        return self._one_of_or_users(names)

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> Json:
        return {}  # only the loader can check such a value

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def encode_default(self, dft: Any) -> Any:
        encoded = super().encode_default(dft)
        try:
            json.dumps(encoded, allow_nan=False)
        except ValueError as error:
            raise PydanticSerializationError(str(error)) from error
        return encoded

    # Definitions.

    def _define(self, name: str, make: Callable[[], Json]) -> Json:
        ref = DefsRef(name)
        if ref not in self.definitions:
            self.json_to_defs_refs[JsonRef(_DEFS + name)] = ref
            self.definitions[ref] = {}  # a class may contain itself
            self.definitions[ref] = make()
        return {"$ref": _DEFS + name}

    def reference_to_config(self, cls: type[BaseModel]) -> Json:
        """Return a reference to the fields of a config class."""
        field = cls.model_fields.get("class_type")
        code = None if field is None or field.is_required() else field.default
        name = cls.__name__ if code is None else self._shortest_name(code)
        return self._define(name, lambda: self._fields(cls, code))

    def _fields(
        self, cls: type[BaseModel], code: Code | None = None, given: tuple[str, ...] = ()
    ) -> Json:
        """Return the schema of a mapping with the fields of a config class.

        Args:
            cls: Config class.
            code: Class or function that the config builds.
            given: Fields that files can't set, since the builder passes them.
        """
        self._expanded = cls
        around = self._admits_auto, self._admits_data
        self._admits_auto = issubclass(cls, LRSchedulerFields | CallableConfig)
        self._admits_data = not issubclass(cls, LRSchedulerFields | OptimizerFields)
        schema = self.generate_inner(TypeAdapter(cls).core_schema)
        schema.pop("title", None)
        properties = {k: v for k, v in schema.get("properties", {}).items() if k not in given}
        without_default = getattr(cls, "required_parameters", ())
        required = [*schema.pop("required", ()), *without_default]
        for name in properties.keys() & {*without_default}:
            del properties[name]["default"]  # a placeholder
        if issubclass(cls, OpenDerivedConfig):
            for name, declaration in cls.extra_parameters.items():
                properties[name] = self.generate_inner(TypeAdapter(declaration).core_schema)
            schema["additionalProperties"] = cls.accepts_any
        self._admits_auto, self._admits_data = around
        described = cls if code is None else code
        text = inspect.cleandoc(described.__doc__ or reference_to(described)).split("\n\n")[0]
        schema["description"] = " ".join(text.split())[:300]
        if issubclass(cls, DerivedConfig):
            properties["class_type" if isinstance(code, type) else "func"] = {"type": "string"}
        elif code is not None:
            properties["config_type"] = {"type": "string"}
        schema["properties"] = properties
        if needed := [name for name in required if name in properties and name not in PART_KEYS]:
            schema["required"] = needed
        return schema

    def _reference_to_part(self, part: Part) -> Json:
        name = ".".join([*(["called"] if part.functions == "call" else []), *part.names])
        return self._define(f"part.{name}", lambda: self._part(part, name))

    def _part(self, part: Part, name: str) -> Json:
        known: dict[str, list[str]] = {key: [] for key in _KEYS}
        fields_by_class = "-without-".join(["fields_by_class", *part.given])
        choices = self._choices.setdefault(fields_by_class, {})
        for code, cls in self._candidates(part):
            references = {"class_type" if isinstance(code, type) else "func": reference_to(code)}
            if not issubclass(cls, DerivedConfig):
                references["config_type"] = reference_to(cls)
            is_new = not {*references.values()} <= {*choices}
            fields = self._fields_in_place(code, cls, part) if is_new else {}
            for key, reference in references.items():
                names = self._spellings.get(reference, [reference])
                known[key] += names
                if is_new:
                    condition = {"properties": {key: _one_of(names)}, "required": [key]}
                    choices[reference] = {"if": condition, "then": fields}
        schema: Json = {
            "type": "object",
            "properties": {
                key: self._define(f"{key}.{name}", partial(self._one_of_or_users, names))
                | {"description": _KEYS[key]}
                for key, names in known.items()
            },
            "anyOf": [{"required": [key]} for key in _KEYS],
        }
        if any(known.values()):
            schema["allOf"] = [{"$ref": _DEFS + fields_by_class}]
        return schema

    def _fields_in_place(self, code: Code, cls: type[BaseModel], part: Part) -> Json:
        """Return a reference to the fields of code, with the fields required by the part."""
        without = [name for name in part.given if name in cls.model_fields]
        name = "-without-".join([self._shortest_name(code), *without])
        fields = self._fields(cls, code, part.given)
        required = fields.pop("required", [])
        is_called = part.functions == "call" or reference_to(code) in self._single
        if is_called and not isinstance(code, type):
            required = []  # the caller passes them; parts share this choice
        reference = self._define(name, lambda: fields)
        return reference | ({"required": required} if required else {})

    def _candidates(self, part: Part) -> Iterator[tuple[Code, type[BaseModel]]]:
        """Yield the accepted code of a part, with its config class."""
        for code in self._code.values():
            try:
                if self._accepts(part, code):
                    is_class = isinstance(code, type)
                    yield code, config_class_of(code) if is_class else part.function_config(code)  # type: ignore[arg-type]  # see is_class
            except (ConfigReferenceError, ImportError):
                continue  # without a signature, or of a package that isn't installed

    def _accepts(self, part: Part, code: Code) -> bool:
        is_called, is_any = part.functions == "call", part.classes == (object,)
        if isinstance(code, type):
            if issubclass(code, BaseModel) or inspect.isabstract(code):
                return False
            if is_called and is_any:  # instances of the class are callable
                return any("__call__" in vars(base) for base in code.__mro__)
            made: type | None = code
        elif is_called:
            # Catalogued functions build models; they are not batch processors.
            return is_any or reference_to(code) in self._single
        else:
            return part.accepts_function(code)
        return made is not None and any(is_assignable(made, kind) for kind in part.classes)

    def _shortest_name(self, code: Code) -> str:
        return min(self._spellings.get(reference_to(code), [reference_to(code)]), key=len)

    def _one_of_or_users(self, names: list[str]) -> Json:
        """Return the schema of some names, and of names in the user's packages."""
        if self._packages:
            start = rf"(?:{'|'.join(map(re.escape, self._packages))})(?:\.[^\s:]+)?"
        else:
            own = sorted({re.split(r"[.:]", reference)[0] for reference in self._code})
            start = rf"(?!(?:{'|'.join(own)})[.:])[^\s:]+" if own else r"[^\s:]+"
        users = {
            "type": "string",
            "pattern": rf"^{start}:[^\s:]+$",
            "description": "package.module:Name, of a trusted package.",
        }
        return {"anyOf": [*([_one_of(names)] if names else []), users]}


def _one_of(names: list[str]) -> Json:
    return {"enum": sorted(set(names), key=lambda name: (":" in name, name))}


def _add_options_of_groups(definitions: Mapping[str, Json]) -> None:
    """Add the options of each optimizer to its parameter groups."""
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
    """Return the differing definitions for files with a base."""
    differing: set[str] = set()
    while True:
        variants = {name: _variant(schema, differing) for name, schema in definitions.items()}
        found = {name for name, schema in definitions.items() if variants[name] != schema}
        if found == differing:
            return {_VARIANT + name: variants[name] for name in definitions if name in found}
        differing = found


def _variant(schema: Any, differing: set[str]) -> Any:
    """Return a schema for a file with a base.

    Only items of lists have required fields, since a list replaces that of the base. Named
    entries may be null.
    """
    if isinstance(schema, list):
        return [_variant(item, differing) for item in schema]
    if not isinstance(schema, dict):
        return schema
    variant: Json = {}
    for key, value in schema.items():
        if key == "required" and isinstance(value, list):  # a field may have this name
            continue
        if key == "anyOf" and all([*choice] == ["required"] for choice in value):
            continue
        if key == "$ref" and (name := value.removeprefix(_DEFS)) in differing:
            variant[key] = _DEFS + _VARIANT + name
        elif key in ("items", "prefixItems", "if", "default", "enum"):
            variant[key] = value
        else:
            variant[key] = _variant(value, differing)
            if (
                key == "additionalProperties"
                and isinstance(value, dict)
                and {"$ref", "type"} & {*value}
            ):
                variant[key] = {"anyOf": [variant[key], {"type": "null"}]}
    return variant
