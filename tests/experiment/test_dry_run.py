"""Dry runs and fast runs of an experiment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

from robo_orchard_core.utils.config import ConfigBuildError
from robo_orchard_lab.experiment import (
    AcceleratorConfig,
    DataConfig,
    ExperimentConfig,
    LoaderConfig,
    TrainerConfig,
    config_of,
)
from robo_orchard_lab.experiment.dry_run import dry_run, fast_run
from robo_orchard_lab.experiment.samples import MLP, Spirals
from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks, SupervisedProcessor
from robo_orchard_lab.pipeline.hooks import (
    EMAConfig,
    KeepBestConfig,
    MetricsLoggerConfig,
    StatsMonitorConfig,
    ValidationHookConfig,
)
from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig
from robo_orchard_lab.pipeline.trigger import EveryEpochs


class Watching(PipelineHooks):
    """Records the steps and epochs of a run."""

    seen: list[str]  # of the last one that was made

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        seen: list[str] = []
        Watching.seen = seen
        self.fails = fails

        def asked(args: PipelineHookArgs) -> None:
            seen.append(f"epoch {args.epoch_id + 1}")

        self.register_at_commit(asked, EveryEpochs(1))
        self.on_step.before(self.count)

    def count(self, args: PipelineHookArgs) -> None:
        Watching.seen.append("step")
        if self.fails:
            raise RuntimeError("a hook that fails")


class Stream(IterableDataset[tuple[torch.Tensor, int]]):
    """Points without an index or a length."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        points = Spirals(size=30)
        return (points[number] for number in range(len(points)))


def spirals(size: int = 30, seed: int = 0) -> LoaderConfig:
    dataset = config_of(Spirals, size=size, seed=seed)
    return LoaderConfig(dataset=dataset, batch_size=4, shuffle=seed == 0)


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExperimentConfig:
    monkeypatch.chdir(tmp_path)
    return ExperimentConfig(
        model=config_of(MLP, inputs=2, hidden=[8], outputs=3),
        data=DataConfig(train=spirals(), evaluation={"val": spirals(20, 1)}),
        batch_processor=config_of(SupervisedProcessor, loss=config_of(torch.nn.CrossEntropyLoss)),
        optimizer=config_of(torch.optim.AdamW, lr=0.01),
        lr_scheduler=config_of(
            torch.optim.lr_scheduler.OneCycleLR, max_lr=0.01, total_steps="auto"
        ),
        hooks={
            "watching": config_of(Watching),
            "stats": StatsMonitorConfig(),
            "average": EMAConfig(),
            "validation": ValidationHookConfig(every="1 epoch"),
            "log": MetricsLoggerConfig(
                every="100 steps | 1 epoch", sinks=[JsonLinesSinkConfig(path="metrics.jsonl")]
            ),
            "best": KeepBestConfig(
                monitor="eval/val/loss", mode="min", path=Path("best.safetensors")
            ),
        },
        trainer=TrainerConfig(max_epoch=5),
        accelerator=AcceleratorConfig(gradient_accumulation_steps=3),
    )


def test_dry_run_describes_the_run(experiment: ExperimentConfig, tmp_path: Path) -> None:
    """The report has steps, updates, hooks, loss and memory, and no file is written."""
    found = dry_run(experiment)
    length = found.length
    assert length is not None
    assert (length.steps_per_epoch, length.steps, length.epochs, length.updates) == (8, 40, 5, 15)
    assert found.parameters == found.trained_parameters == 2 * 8 + 8 + 8 * 3 + 3
    assert found.loss is not None
    assert found.evaluated.keys() == {"val"}
    assert {(hook.hook, hook.times) for hook in found.hooks} == {
        *(("validation", 5), ("log", 5), ("checkpoint", 5)),
    }
    memory = found.memory
    assert (memory.parameters, memory.gradients) == (51 * 4, 51 * 4)
    assert memory.optimizer == 2 * 51 * 4 + 4 * 4  # two moments, and a count of each tensor's
    assert memory.peak > 2**20
    assert Watching.seen == []  # no hook of the run is called
    assert [*tmp_path.iterdir()] == []


def test_a_dry_run_counts_the_save_at_the_end(experiment: ExperimentConfig) -> None:
    """Two saves are due in five epochs, plus the save at the end."""
    found = dry_run(experiment.replace(checkpoint={"every": "2 epochs"}, hooks={}))
    assert [(hook.hook, hook.times) for hook in found.hooks] == [("checkpoint", 3)]


def test_a_dry_run_of_a_stream_has_no_length(experiment: ExperimentConfig) -> None:
    """Without a length, counts are unknown."""
    stream = LoaderConfig(dataset=config_of(Stream), batch_size=4)
    found = dry_run(experiment.replace(data=DataConfig(train=stream), hooks={}, lr_scheduler=None))
    assert found.length is None
    assert [hook.times for hook in found.hooks] == [None]
    assert found.loss is not None


def test_fast_run_makes_two_steps_and_resumes(
    experiment: ExperimentConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fast run trains an epoch of two steps, evaluates, saves, resumes and cleans up."""
    before = {*Path("/tmp").glob("debug-fast-*")}
    done = fast_run(experiment)
    assert done[0].startswith("trained to step 2 (epoch 1, 1 updates committed")
    assert any(line.startswith("found eval/val/loss = ") for line in done)
    files = "best.safetensors, checkpoints, events.jsonl, metrics.jsonl"
    assert any(files in line for line in done)
    assert done[-1] == "saved, and resumed from step 2 to 3"
    assert Watching.seen == ["step"]  # the third step, after a complete epoch
    assert [*tmp_path.iterdir()] == []
    assert {*Path("/tmp").glob("debug-fast-*")} == before


@pytest.mark.parametrize("part", ["stream", "sampler"])
def test_fast_run_accepts_any_data(experiment: ExperimentConfig, part: str) -> None:
    """Data without an index, or with its own sampler, is used unchanged."""
    from torch.utils.data import SequentialSampler

    loaders: dict[str, Any] = {
        "stream": LoaderConfig(dataset=config_of(Stream), batch_size=4),
        "sampler": spirals().replace(shuffle=False, sampler=config_of(SequentialSampler)),
    }
    changes = {"data": DataConfig(train=loaders[part]), "hooks": {}, "lr_scheduler": None}
    done = fast_run(experiment.replace(**changes))
    assert "step 2" in done[0]
    assert done[-1] == "saved, and resumed from step 2 to 3"


def test_errors_of_parts_propagate(experiment: ExperimentConfig, tmp_path: Path) -> None:
    """The part's error propagates, and written files are removed."""
    hooks: dict[str, Any] = {"watching": config_of(Watching, fails=True)}
    with pytest.raises(RuntimeError, match="a hook that fails"):
        fast_run(experiment.replace(hooks=hooks))
    wrong = experiment.replace(model=config_of(MLP, inputs=2, hidden=[0], outputs=3))
    for attempt in (dry_run, fast_run):
        with pytest.raises(ConfigBuildError, match="model"):
            attempt(wrong)
    assert [*tmp_path.iterdir()] == []
