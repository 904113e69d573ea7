"""Every field of every built-in hook can be set in an experiment file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from tests.experiment.hook_entries import ENTRIES, NAMED, TRUST, experiment

from robo_orchard_core.utils.config import Format
from robo_orchard_core.utils.config.formats import write
from robo_orchard_core.utils.config.references import field_default
from robo_orchard_lab.experiment import ExperimentConfig
from robo_orchard_lab.pipeline import PipelineHooks, PipelineHooksConfig, hooks

FORMATS: tuple[Format, ...] = ("yaml", "toml", "json")
NOT_IN_FILES = {"OptimizerHook"}
"""Built from the experiment's optimizer, LR scheduler and accelerator."""


def classes(kind: type) -> list[type]:
    exported = [getattr(hooks, name) for name in hooks.__all__]
    return [found for found in exported if isinstance(found, type) and issubclass(found, kind)]


def config_of(name: str) -> type[PipelineHooksConfig[Any]]:
    found: type[PipelineHooksConfig[Any]] = getattr(hooks, f"{name}Config")
    return found


def test_every_hook_has_an_entry() -> None:
    """The table has an entry for each exported hook with a config."""
    assert {cls.__name__ for cls in classes(PipelineHooks)} - NOT_IN_FILES == ENTRIES.keys()
    assert {cls.__name__ for cls in classes(PipelineHooksConfig)} == {f"{n}Config" for n in ENTRIES}


@pytest.mark.parametrize("name", ENTRIES)
def test_every_field_is_set(name: str) -> None:
    """The entries of a hook set each field to a value other than the default."""
    fields = config_of(name).model_fields
    loaded = [loaded_entry(name, entry) for entry in ENTRIES[name]]
    for field, declared in fields.items():
        if field == "class_type" or has_one_value(declared.annotation):
            continue
        values = [getattr(config, field) for config in loaded if field in config.model_fields_set]
        assert any(value != field_default(declared) for value in values), f"{name}.{field}"


def has_one_value(annotation: Any) -> bool:
    return get_origin(annotation) is Literal and len(get_args(annotation)) == 1


def loaded_entry(name: str, entry: dict[str, Any]) -> PipelineHooksConfig[Any]:
    document = experiment(it={"class_type": name, **entry})
    config = ExperimentConfig.from_dict(document, trust=TRUST).hooks["it"]
    assert type(config) is config_of(name)
    return config


@pytest.mark.parametrize("format_", FORMATS)
def test_hooks_are_read_from_files(format_: Format, tmp_path: Path) -> None:
    """A file with all hooks and fields loads equally in each format, and round-trips."""
    document = experiment(
        **{f"{name} {n}": {"class_type": name, **entry} for n, (name, entry) in enumerate(NAMED)}
    )
    complete = ExperimentConfig.from_dict(document, trust=TRUST)
    assert [*complete.hooks] == [*document["hooks"]]
    path = tmp_path / f"experiment.{format_}"
    path.write_text(write(document, format_), encoding="utf-8")
    loaded = ExperimentConfig.load(path, trust=TRUST)
    assert loaded == complete
    assert ExperimentConfig.from_str(loaded.to_str(format_), format_, trust=TRUST) == complete


@pytest.mark.parametrize(("name", "entry"), NAMED, ids=[name for name, _ in NAMED])
def test_fields_are_overridden_by_path(name: str, entry: dict[str, Any], tmp_path: Path) -> None:
    """An override sets each field of a hook by the hook's and the field's name."""
    path = tmp_path / "experiment.json"
    required = {
        field: value
        for field, value in entry.items()
        if config_of(name).model_fields[field].is_required()
    }
    path.write_text(write(experiment(it={"class_type": name, **required}), "json"), "utf-8")
    overrides = {f"hooks.it.{field}": value for field, value in entry.items()}
    loaded = ExperimentConfig.load(path, trust=TRUST, overrides=overrides)
    assert loaded.hooks["it"] == loaded_entry(name, entry)
