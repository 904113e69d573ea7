"""JSON Schema of experiment files, by which editors complete and check them.

All of it is made of the config classes, those of torch's and others' classes included, so that it
says what the loader would. Rules across fields are the loader's alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from robo_orchard_lab.experiment.catalogue import CATALOGUE
from robo_orchard_lab.experiment.config import ExperimentConfig
from robo_orchard_lab.experiment.parts import OptimizerConfig, ParameterGroup
from robo_orchard_lab.experiment.schema_definitions import Definitions
from robo_orchard_lab.experiment.schema_fields import Json

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
