"""The exported model."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file

from robo_orchard_core.utils.config import Config
from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.errors import PipelineConfigError, RunPreempted
from robo_orchard_lab.pipeline.hooks import EMAConfig, SaveModelConfig
from robo_orchard_lab.pipeline.run.durable import temporary_name
from robo_orchard_lab.testing import assert_no_device_sync, assert_weights_unchanged
from tiny import equal, make_loader, make_model, make_trainer, weights


def planted(when: str, do: Callable[[PipelineHookArgs], object]) -> PipelineHooks:
    hooks = PipelineHooks("planted")
    hooks.on_step.after(when=when)(do)
    return hooks


def loaded(folder: Path) -> list[torch.Tensor]:
    """Return the weights of a plain model loaded from the file."""
    model = make_model(seed=9)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return weights(model)


def test_model_is_written_at_the_end(tmp_path: Path) -> None:
    """The model is written once to the run folder and loads into a plain model."""
    model = make_model()
    make_trainer(SaveModelConfig(every="1 epoch"), model=model, max_epoch=2, run_folder=tmp_path)()
    assert equal(loaded(tmp_path / "pretrained_model"), weights(model))
    names = sorted(file.name for file in (tmp_path / "pretrained_model").iterdir())
    assert names == ["README.md", "model.safetensors"]


@pytest.mark.parametrize("after_epoch", [False, True])
def test_stopped_run_is_written(after_epoch: bool, tmp_path: Path) -> None:
    """A run that a hook stops writes its model, after a step and at the end of an epoch."""
    hooks = PipelineHooks("stops")
    if after_epoch:
        hooks.on_epoch.after(lambda args: args.requests.stop("good enough"))
    else:
        hooks.on_step.after(when="at steps 3")(lambda args: args.requests.stop("good enough"))
    model = make_model()
    make_trainer(
        [SaveModelConfig(), hooks],
        model=model,
        loader=make_loader(4),
        max_epoch=9,
        run_folder=tmp_path,
    )()
    assert equal(loaded(tmp_path / "pretrained_model"), weights(model))


def test_interrupted_run_writes_nothing(tmp_path: Path) -> None:
    """A run to be resumed has no trained model yet."""
    hook = planted("at steps 3", lambda args: args.requests.stop("SIGTERM", exit_code=143))
    with pytest.raises(RunPreempted):
        make_trainer([SaveModelConfig(), hook], max_epoch=9, run_folder=tmp_path)()
    assert not (tmp_path / "pretrained_model").exists()


def test_model_is_written_on_trigger(tmp_path: Path) -> None:
    """Each write replaces the previous one and keeps other files."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    (folder / temporary_name("model.safetensors")).touch()  # of a killed run
    kept: list[list[torch.Tensor]] = []
    found: list[list[torch.Tensor]] = []

    def look(args: PipelineHookArgs) -> None:
        kept.append(weights(args.model))
        found.append(loaded(folder) if (folder / "model.safetensors").exists() else [])

    hooks = PipelineHooks("looks")
    hooks.on_step.before(look)
    config = SaveModelConfig(every="2 steps", at_end=False, folder=folder)
    make_trainer([config, hooks], max_step=6)()
    assert found[:2] == [[], []]
    for step, at in ((2, 2), (3, 2), (4, 4), (5, 4)):
        assert equal(found[step], kept[at])
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "model.safetensors"]


def test_average_is_written(tmp_path: Path) -> None:
    """The weights of another hook are written by its name."""
    ema = EMAConfig(decay=0.5)()
    model = make_model()
    make_trainer(
        [ema, SaveModelConfig(weights="EMA")], model=model, max_step=4, run_folder=tmp_path
    )()
    found = loaded(tmp_path / "pretrained_model")
    assert not equal(found, weights(model))
    with ema.applied():
        assert equal(found, weights(model))


@dataclasses.dataclass
class Sizes:
    width: int = 8


class Fields(pydantic.BaseModel):
    width: int = 8


class Settings(Config):
    width: int = 8


class Written:
    def to_dict(self) -> dict[str, Any]:
        return {"width": 8}


@pytest.mark.parametrize(
    "config",
    [Sizes(), Fields(), Written(), {"width": 8}, Settings()],
    ids=lambda c: type(c).__name__,
)
def test_model_config_is_written(config: Any, tmp_path: Path) -> None:
    """The model's config of any supported type is written as JSON."""
    model = make_model()
    model.config = config
    make_trainer(SaveModelConfig(), model=model, max_step=1, run_folder=tmp_path)()
    document = json.loads((tmp_path / "pretrained_model" / "config.json").read_text())
    assert document.items() >= {"width": 8}.items()


class Hub(torch.nn.Module, PyTorchModelHubMixin):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.into = torch.nn.Linear(4, width)
        self.out = torch.nn.Linear(width, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.out(torch.tanh(self.into(inputs)))
        return outputs


def test_hub_model_round_trips(tmp_path: Path) -> None:
    """``from_pretrained`` rebuilds the model from its config, with the trained weights."""
    model = Hub(width=5)
    make_trainer(SaveModelConfig(), model=model, max_step=3, run_folder=tmp_path)()
    again = Hub.from_pretrained(tmp_path / "pretrained_model")
    assert again.into.out_features == 5
    assert equal(weights(again), weights(model))


def test_model_config_not_json_is_refused_at_the_start(tmp_path: Path) -> None:
    """The error comes before the first step."""
    model = make_model()
    model.config = {"made_by": object()}  # type: ignore[assignment]
    trainer = make_trainer(SaveModelConfig(), model=model, max_step=1, run_folder=tmp_path)
    with pytest.raises(PipelineConfigError, match="SaveModel: the model's config can't be written"):
        trainer()
    assert trainer.progress.global_step_id == 0


def test_unsupported_model_config_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning is logged, and the weights are written."""
    model = make_model()
    model.config = object()  # type: ignore[assignment]
    with caplog.at_level(logging.WARNING):
        make_trainer(SaveModelConfig(), model=model, max_step=1, run_folder=tmp_path)()
    assert caplog.text.count("found object; not writing") == 1
    assert (tmp_path / "pretrained_model" / "model.safetensors").exists()


def test_invalid_setups_are_refused(tmp_path: Path) -> None:
    """A missing folder, unknown weights, and a config that never writes are refused."""
    with pytest.raises(PipelineConfigError, match="set folder here, or run_folder of the trainer"):
        make_trainer(SaveModelConfig(), max_step=1)()
    with pytest.raises(PipelineConfigError, match="no hook named 'EMA' keeps weights"):
        make_trainer(SaveModelConfig(weights="EMA"), max_step=1, run_folder=tmp_path)()
    with pytest.raises(ValueError, match="the model would never be written"):
        SaveModelConfig(at_end=False)


def test_hook_does_not_affect_training(tmp_path: Path) -> None:
    """The hook changes no weights, and reads tensors only at the commit point."""
    hook = SaveModelConfig(every="2 steps", folder=tmp_path)
    assert_weights_unchanged(hook)
    assert_no_device_sync(hook)
