"""The JSON Schema of one config class's fields, as pydantic makes it, but for parts."""

from __future__ import annotations

import inspect
import math
from typing import Any, Protocol, TypeAlias, get_args

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import CoreSchema

from robo_orchard_core.utils.config import FieldsOf, Function, Part
from robo_orchard_core.utils.config.parts import PART_KEYS, DerivedConfig, OpenDerivedConfig
from robo_orchard_core.utils.config.references import Code, class_kinds, reference_to

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
    without_default = getattr(cls, "required", ())
    required = [*schema.pop("required", ()), *without_default]
    for name in properties.keys() & {*without_default}:
        del properties[name]["default"]  # which is no value, but stands for none
    if issubclass(cls, OpenDerivedConfig):
        for name, declaration in cls.beside_fields.items():
            properties[name] = _generated(TypeAdapter(declaration).core_schema, cls, others)
        schema["additionalProperties"] = cls.takes_any
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
            return _placed(self._others.part(Part(class_kinds(field.annotation))))
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
