"""Outputs of a run on a disk that is full for a moment, or in a removed folder."""

from __future__ import annotations

import contextlib
import io
import logging
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors import safe_open
from safetensors.torch import load_file

from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.checkpoint import CheckpointStore
from robo_orchard_lab.pipeline.errors import StoreLockedError
from robo_orchard_lab.pipeline.hook_set import HookLike
from robo_orchard_lab.pipeline.hooks import (
    KeepBestConfig,
    LossTrackerConfig,
    MetricsLoggerConfig,
    ProgressBarHookConfig,
    SaveCheckpointConfig,
    SaveModelConfig,
    TorchProfilerHookConfig,
)
from robo_orchard_lab.pipeline.run.run_state import read_run_state
from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig, read_metrics
from tiny import make_loader, make_trainer

LIMITS = resource.getrlimit(resource.RLIMIT_FSIZE)


def fill(largest_file: int = 64) -> None:
    """Make larger writes fail as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, LIMITS[1]))


def during(steps: dict[int, Any]) -> PipelineHooks:
    """Return hooks that call a function at the end of a step, and make room after the loop."""
    hooks = PipelineHooks("during")
    hooks.on_loop.after(lambda args: fill(LIMITS[0]))

    @hooks.on_step.after
    def call(args: PipelineHookArgs) -> None:
        if args.exception is None and args.global_step_id + 1 in steps:
            steps[args.global_step_id + 1]()

    return hooks


def publishing(values: list[float]) -> PipelineHooks:
    hooks = PipelineHooks("publisher")
    hooks.on_step.after(lambda args: args.metrics.publish("score", values[args.global_step_id]))
    return hooks


def run(folder: Path, *hooks: HookLike, **options: Any) -> None:
    options.setdefault("max_step", 6)
    make_trainer(hooks, loader=make_loader(3), run_folder=folder, **options)()


def logger_to(path: Path) -> list[HookLike]:
    sinks = {"file": JsonLinesSinkConfig(path=str(path))}
    return [LossTrackerConfig(), MetricsLoggerConfig(every="1 steps", sinks=sinks)]


def reports(caplog: pytest.LogCaptureFixture, about: object) -> list[str]:
    return [record.getMessage() for record in caplog.records if str(about) in record.getMessage()]


def test_best_weights_are_written_when_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The best weights of a full disk's time are written later, although the values got worse."""
    path = tmp_path / "best.safetensors"
    kept: dict[int, torch.Tensor] = {}
    snapshots = PipelineHooks("snapshots")
    snapshots.on_optimizer_step.after(
        lambda args: kept.update({args.progress.steps_done: args.model[0].weight.detach().clone()})
    )
    disk = during({2: fill, 4: lambda: fill(LIMITS[0])})
    best = KeepBestConfig(monitor="score", mode="max", path=path)
    run(tmp_path, publishing([1, 2, 9, 3, 4, 5]), disk, snapshots, best)
    with safe_open(path, "pt") as file:
        assert (file.metadata()["value"], file.metadata()["value_step"]) == ("9.0", "3")
    assert torch.equal(load_file(path)["0.weight"], kept[3])
    failed, written = reports(caplog, path)
    assert failed.startswith(f"KeepBest: writing {path} failed; the run continues")
    assert failed.endswith("OSError: [Errno 27] File too large")
    assert written.startswith(f"KeepBest: {path} is written, after ")


def test_run_fails_at_its_end_without_room_for_the_model(tmp_path: Path) -> None:
    """The error names the hook and the file, and the run has made all its steps."""
    steps: list[int] = []
    counter = PipelineHooks("counter")
    counter.on_step.after(lambda args: steps.append(args.global_step_id))
    with pytest.raises(OSError, match=r"SaveModel could not write .*pretrained_model: .*too l"):
        run(tmp_path, during({2: fill}), counter, SaveModelConfig(every="2 steps"))
    assert steps == [*range(6)]


def test_exported_model_is_complete_when_there_is_room(tmp_path: Path) -> None:
    """The model of the last save is written at the end, if there is room by then."""
    disk = during({2: fill, 5: lambda: fill(LIMITS[0])})
    run(tmp_path, disk, SaveModelConfig(every="3 steps", at_end=False), max_step=5)
    with safe_open(tmp_path / "pretrained_model" / "model.safetensors", "pt") as file:
        assert file.metadata()["global_step_id"] == "3"


class Hub(torch.nn.Linear, PyTorchModelHubMixin):
    """Model that writes its files itself, by safetensors."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width, 2)


def test_model_that_writes_itself_is_complete_when_there_is_room(tmp_path: Path) -> None:
    """The weights of the failed save are written later, not those of that time."""
    found = []
    hook = SaveModelConfig(every="3 steps", at_end=False)
    for name, steps in (("full", {3: fill, 5: lambda: fill(LIMITS[0])}), ("room", {})):
        torch.manual_seed(0)
        run(tmp_path / name, during(steps), hook, model=Hub(), max_step=5)
        found.append(Hub.from_pretrained(tmp_path / name / "pretrained_model").weight)
    assert torch.equal(*found)


def test_metrics_have_no_gap(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Records of a full disk's time are written, in order, with the first record after it."""
    expected, path = tmp_path / "expected.jsonl", tmp_path / "metrics.jsonl"
    run(tmp_path / "1", *logger_to(expected))
    run(tmp_path / "2", *logger_to(path), during({3: fill, 5: lambda: fill(LIMITS[0])}))
    assert path.read_bytes() == expected.read_bytes()
    failed, written = reports(caplog, path)
    assert failed.startswith(f"MetricsLogger: writing 'file' to {path} failed; the run continues")
    assert written == f"MetricsLogger: 'file' to {path} is written, after 2 failed attempts"


@pytest.mark.parametrize("is_killed", [True, False])
def test_resumed_run_has_no_gap(is_killed: bool, tmp_path: Path) -> None:
    """Records that wait for room are in the checkpoint: a resumed run writes each of them once."""
    expected, path, copy = (tmp_path / f"{name}.jsonl" for name in ("expected", "metrics", "copy"))
    run(tmp_path / "1", *logger_to(expected))

    def stop() -> None:
        shutil.copy(path, copy)
        raise RuntimeError("stop")

    disk = during({3: fill, 5: stop})
    disk.register_at_commit(  # executed after the logging point of step 4, before its checkpoint
        lambda args: args.requests.write(lambda: fill(LIMITS[0]), "to make room"), "at steps 4"
    )
    save = SaveCheckpointConfig(every="4 steps")
    with pytest.raises(RuntimeError, match="stop"):
        run(tmp_path / "2", *logger_to(path), disk, save)
    assert [record.global_step_id for record in read_metrics(copy)] == [1, 2]
    if is_killed:
        shutil.copy(copy, path)
    else:  # the run wrote the records when it closed the file
        assert [record.global_step_id for record in read_metrics(path)] == [1, 2, 3, 4]
    run(tmp_path / "2", *logger_to(path), save, resume_from="auto")
    assert path.read_bytes() == expected.read_bytes()


def test_removed_run_folder_is_made_again(tmp_path: Path) -> None:
    """Checkpoints, their lock, run_state.json, metrics and weights are in the new folder."""
    folder = tmp_path / "run"
    refused: list[Exception] = []

    def open_store() -> None:
        try:
            CheckpointStore(folder / "checkpoints").open()
        except StoreLockedError as error:
            refused.append(error)

    expected = tmp_path / "expected.jsonl"
    run(tmp_path / "1", *logger_to(expected))
    run(
        folder,
        *logger_to(folder / "metrics.jsonl"),
        publishing([1, 2, 3, 2, 1, 0]),
        KeepBestConfig(monitor="score", mode="max", path=folder / "best.safetensors"),
        SaveCheckpointConfig(every="2 steps"),
        during({3: lambda: shutil.rmtree(folder), 5: open_store}),
    )
    checkpoints = CheckpointStore(folder / "checkpoints")
    assert [info.step for info in checkpoints.list()] == [4, 6]
    assert all(found.problem is None for found in checkpoints.verify())
    assert len(refused) == 1
    assert read_run_state(folder).state == "completed"
    assert len(read_metrics(folder / "metrics.jsonl")) == len(read_metrics(expected))
    with safe_open(folder / "best.safetensors", "pt") as file:
        assert file.metadata()["value"] == "3.0"


def test_kept_files_are_made_again(tmp_path: Path) -> None:
    """The record of a run's start returns with the folder, so that the run can be resumed."""
    folder, config = tmp_path / "run", tmp_path / "run" / "config.yaml"
    hooks: list[HookLike] = [SaveCheckpointConfig(every="2 steps")]
    hooks.append(during({3: lambda: shutil.rmtree(folder)}))
    trainer = make_trainer(hooks, run_folder=folder, max_step=4)
    folder.mkdir()
    config.write_text("seed: 3\n")
    trainer.keep_files(config)
    trainer()
    assert config.read_text() == "seed: 3\n"


def test_progress_of_a_full_disk_is_dropped() -> None:
    """A script whose standard error goes to a full disk trains to its end."""
    trainer = make_trainer([ProgressBarHookConfig(plain=True)], max_step=3)
    with io.FileIO("/dev/full", "w") as full:
        lines = io.TextIOWrapper(full, write_through=True)
        with contextlib.redirect_stderr(lines):
            trainer()
        with contextlib.suppress(OSError):
            lines.detach()
    assert trainer.progress.global_step_id == 3


def test_trace_is_complete_or_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An incomplete trace of torch is reported, and removed."""
    profiler = TorchProfilerHookConfig(folder=str(tmp_path / "traces"), start_step=1, steps=1)
    with caplog.at_level(logging.ERROR):
        run(tmp_path, profiler, during({2: lambda: fill(2000), 4: lambda: fill(LIMITS[0])}))
    assert "TorchProfilerHook: profiling failed; training continues" in caplog.text
    assert "torch could not write the complete trace" in caplog.text
    assert not [*(tmp_path / "traces").rglob("*")]
