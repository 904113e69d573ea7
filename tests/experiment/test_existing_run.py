"""Starting a run in a folder with an existing run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from robo_orchard_lab.experiment.config import ExperimentConfig
from robo_orchard_lab.experiment.document import read_experiment
from robo_orchard_lab.experiment.existing_run import (
    ChangedRunError,
    ExistingRun,
    check_changes,
    find_existing_run,
    record,
)
from robo_orchard_lab.pipeline.checkpoint import CheckpointStore

TRUST = ("torch",)


@pytest.fixture
def experiment(tmp_path: Path) -> ExperimentConfig:
    hooks = "robo_orchard_lab.pipeline.hooks"
    samples = "robo_orchard_lab.experiment.samples"
    return ExperimentConfig.from_dict(
        {
            "run_folder": str(tmp_path / "run"),
            "model": {
                "class_type": f"{samples}:MLP",
                "inputs": 2,
                "hidden": [4],
                "outputs": 3,
            },
            "data": {
                "train": {"dataset": {"class_type": f"{samples}:Spirals", "size": 12}},
            },
            "batch_processor": {
                "class_type": "robo_orchard_lab.pipeline.batch_processor:SupervisedProcessor",
                "loss": {"class_type": "torch.nn.modules.loss:CrossEntropyLoss"},
            },
            "optimizer": {"class_type": "torch.optim.sgd:SGD", "lr": 0.1},
            "hooks": {
                "stats": {"class_type": f"{hooks}.stats_monitor:StatsMonitor"},
                "clip": {
                    "class_type": f"{hooks}.gradient_clipping:GradientClippingHook",
                    "max_norm": 1.0,
                },
            },
            "trainer": {"max_epoch": 2},
        },
        trust=TRUST,
    )


def start_and_save(experiment: ExperimentConfig) -> ExistingRun:
    """Start a run, save one checkpoint, and return the found run."""
    record(experiment, processes=1)
    with CheckpointStore(experiment.folder() / "checkpoints") as store:
        store.save(3, {"trainer": {}})
    found = find_existing_run(experiment.folder())
    assert found is not None
    return found


def test_existing_run_is_found_in_its_folder(experiment: ExperimentConfig) -> None:
    """A folder has no run before a start, then its config, newest checkpoint and state."""
    folder = experiment.folder()
    assert find_existing_run(folder) is None
    record(experiment, processes=1)
    found = find_existing_run(folder)
    assert found is not None
    assert (found.config, found.newest_step) == (folder / "config.yaml", None)
    assert found.state is None
    assert start_and_save(experiment).newest_step == 3


def test_the_saved_config_equals_the_experiment(experiment: ExperimentConfig) -> None:
    """The saved config equals the experiment, except for the run folder."""
    record(experiment, processes=1)
    kept = ExperimentConfig.load(experiment.folder() / "config.yaml", trust=TRUST)
    assert kept == experiment.replace(run_folder=None)


def test_unchanged_run_resumes_from_any_folder(
    experiment: ExperimentConfig, tmp_path: Path
) -> None:
    """Neither the folder's path nor the resume option is a difference."""
    before = start_and_save(experiment)
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = find_existing_run(tmp_path / "moved")
    assert moved is not None
    same = experiment.replace(run_folder=str(tmp_path / "moved"), resume="never")
    assert check_changes(same, moved, TRUST) == []
    assert before.newest_step == moved.newest_step


def test_changes_are_allowed_by_effect(experiment: ExperimentConfig) -> None:
    """Harmless changes are recorded, trajectory changes need permission, others are refused."""
    before = start_and_save(experiment)
    longer = experiment.replace(**{"trainer.max_epoch": 5})
    harmless = check_changes(longer, before, TRUST)
    assert [(each.field, each.before, each.after) for each in harmless] == [
        ("trainer.max_epoch", 2, 5)
    ]
    start = json.loads(record(longer, processes=1, changes=harmless).read_text())
    assert start["changes"] == [
        {"path": "trainer.max_epoch", "before": 2, "after": 5, "resume": "harmless"}
    ]
    hooks = dict(longer.hooks, clip=longer.hooks["clip"].replace(max_norm=3.0))
    other = longer.replace(hooks=hooks)
    with pytest.raises(
        ChangedRunError,
        match=r"would not train the same weights with changed hooks\.clip\.max_norm",
    ):
        check_changes(other, before, TRUST)
    assert len(check_changes(other, before, TRUST, allow="trajectory")) == 1
    never = other.replace(seed=3)
    with pytest.raises(ChangedRunError, match="can't resume with changed seed") as refused:
        check_changes(never, before, TRUST, allow="trajectory")
    assert [each.field for each in refused.value.changes] == ["seed", "hooks.clip.max_norm"]


def test_unloadable_config_is_compared_as_written(
    experiment: ExperimentConfig,
) -> None:
    """A missing class in the old config is a difference, not an error."""
    before = start_and_save(experiment)
    text = before.config.read_text()
    before.config.write_text(text.replace("samples:MLP", "samples:GoneMLP"))
    with pytest.raises(ChangedRunError, match=r"with changed model\.class_type"):
        check_changes(experiment, before, TRUST)


def test_damaged_files_stop_no_resume(
    experiment: ExperimentConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """A run whose state and config are damaged resumes from its checkpoint, with warnings."""
    record(experiment, processes=1)
    experiment.build().trainer()
    folder = experiment.folder()
    files = [folder / "config.yaml", folder / "run_state.json"]
    for file in files:
        file.write_bytes(file.read_bytes().replace(b":", b"\xff", 1))
    found = find_existing_run(folder)
    assert found is not None
    assert found.newest_step is not None
    assert found.state is None
    assert check_changes(experiment, found, TRUST) == []
    assert "the experiment can't be compared with the run to resume" in caplog.text
    built = experiment.replace(**{"trainer.max_epoch": 3}).build()
    record(experiment, processes=1)
    built.trainer()
    assert built.trainer.progress.epoch_id == 3
    assert read_experiment(folder / "config.yaml")
    assert all(file.with_name(f"{file.name}.unreadable-1").exists() for file in files)
