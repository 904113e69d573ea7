"""Every field of every built-in hook can be set in an experiment file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]  # TensorBoard has no types
    EventAccumulator,
)
from tests.experiment.hook_entries import ENTRIES, NAMED, TRUST, experiment

from robo_orchard_core.utils.config import Format
from robo_orchard_core.utils.config.formats import write
from robo_orchard_core.utils.config.references import field_default
from robo_orchard_lab.experiment import ExperimentConfig
from robo_orchard_lab.experiment.samples import MLP
from robo_orchard_lab.pipeline import PipelineHooks, PipelineHooksConfig, hooks

FORMATS: tuple[Format, ...] = ("yaml", "toml", "json")
NOT_IN_FILES = {"OptimizerHook"}
"""Built from the experiment's optimizer, LR scheduler and accelerator."""


WEIGHTS = {"raw": None, "ema": "ema"}


class Grey(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Images of one value."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((3, 2, 2), 0.2 * (index + 1)), index % 3


class FlatMLP(MLP):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs.flatten(1))


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


def test_images_and_two_weight_sets_of_a_file_are_in_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard's reader finds the batch's pixels, and values of raw and averaged weights."""
    monkeypatch.chdir(tmp_path)
    document = experiment(
        ema={"class_type": "EMA", "decay": 0.5},
        val={"class_type": "ValidationHook", "weights": WEIGHTS},
        log={
            "class_type": "MetricsLogger",
            "sinks": [{"class_type": "TrackerSink", "trackers": ["tensorboard"], "folder": "log"}],
        },
        images={"class_type": "LogImages", "every": "1 epoch", "max_images": 1},
    )
    grey = {"class_type": f"{__name__}:Grey"}
    document["data"] = {
        "train": {"dataset": grey, "batch_size": 4},
        "evaluation": {"val": {"dataset": grey, "batch_size": 4}},
    }
    document["model"] = document["model"] | {"class_type": f"{__name__}:FlatMLP", "inputs": 12}
    built = ExperimentConfig.from_dict(document, trust=__name__).build()
    built.trainer()
    (file,) = built.run_folder.glob("log/*/events.*")
    events = EventAccumulator(str(file.parent)).Reload()
    (image,) = events.Images("batch/images")
    assert np.unique(np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))) == [51]
    (raw,), (ema,) = (events.Scalars(f"eval/val/{name}/loss") for name in ("raw", "ema"))
    evaluated = built.trainer.evaluate({"val": built.trainer.dataloader}, weights=WEIGHTS)
    assert [raw.value, ema.value] == pytest.approx([*evaluated.values()])
    assert raw.value != ema.value
