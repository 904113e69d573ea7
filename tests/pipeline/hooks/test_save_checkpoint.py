"""Checkpoints: when they are saved, their content, and failures."""

from __future__ import annotations

import json
import logging
import resource
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.checkpoint import CheckpointStore, load_checkpoint
from robo_orchard_lab.pipeline.errors import (
    CheckpointError,
    PipelineConfigError,
    PipelineStateError,
    RunPreempted,
    StateError,
    StoreLockedError,
)
from robo_orchard_lab.pipeline.hook_set import HookLike
from robo_orchard_lab.pipeline.hooks import SaveCheckpointConfig
from robo_orchard_lab.pipeline.run.run_state import read_run_state
from tiny import equal, make_loader, make_model, make_trainer, weights


def train(folder: Path, *hooks: HookLike, **options: Any) -> HookBasedTrainer:
    """Run a trainer in a folder to its end."""
    options.setdefault("max_epoch", 2)
    torch.manual_seed(3)
    trainer = make_trainer(hooks, loader=make_loader(3, shuffle=True), run_folder=folder, **options)
    trainer()
    return trainer


def steps_in(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a run folder, which holds only links and a lock
    besides.
    """
    found = sorted((folder / "checkpoints").iterdir())
    names = [path.name for path in found if not path.is_symlink() and path.name != ".lock"]
    assert all(name.startswith("step_") for name in names)
    return [int(name.removeprefix("step_")) for name in names]


def at_step(step: int, do: Any) -> PipelineHooks:
    hooks = PipelineHooks(f"at step {step}")
    hooks.on_step.after(when=f"at steps {step}")(do)
    return hooks


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        ("2 steps", [2, 4, 6]),
        ("4 steps", [4, 6]),  # the last one at the end
        ("1 epoch", [3, 6]),
        ("3 steps | 1 epoch | 2 optimizer steps", [2, 3, 4, 6]),
        (None, [6]),
    ],
)
def test_saves_follow_the_trigger_and_the_end(
    every: str | None, expected: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each commit point has at most one save, and the end of the run one."""
    caplog.set_level(logging.INFO)
    train(tmp_path, SaveCheckpointConfig(every=every, keep_last=None))
    assert steps_in(tmp_path) == expected
    assert [record.msg for record in caplog.records].count("saved %s: %s") == len(expected)
    assert (tmp_path / "checkpoints" / "last").readlink() == Path(f"step_{expected[-1]:08}")
    checkpoint = read_run_state(tmp_path).checkpoint
    assert checkpoint is not None
    assert (checkpoint.path, checkpoint.step) == (
        f"checkpoints/step_{expected[-1]:08}",
        expected[-1],
    )


def test_time_trigger_saves_after_a_step(tmp_path: Path) -> None:
    """A trigger in seconds saves at the end of a step."""
    train(tmp_path, SaveCheckpointConfig(every="0.000001 s", keep_last=None))
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_requests_of_hooks_are_saved(tmp_path: Path) -> None:
    """A request of any hook saves a checkpoint, whose metadata has the hook and the reason."""
    asks = at_step(4, lambda args: args.requests.save("to see", by="me"))
    train(tmp_path, SaveCheckpointConfig(every=None), asks)
    assert steps_in(tmp_path) == [4, 6]
    info = load_checkpoint(tmp_path / "checkpoints" / "step_00000004").info
    assert info.metadata["reason"] == "to see, requested by me"


def test_save_request_without_saver_is_an_error() -> None:
    """A request that no hook can execute is not ignored."""
    asks = at_step(2, lambda args: args.requests.save("to see", by="me"))
    with pytest.raises(PipelineStateError, match=r"me requested a checkpoint \(to see\)"):
        make_trainer([asks], max_step=3)()


def test_checkpoint_describes_its_run(tmp_path: Path) -> None:
    """The manifest has the config, the command and the versions."""
    train(tmp_path, SaveCheckpointConfig(every="3 steps", keep_last=7))
    about = load_checkpoint(tmp_path / "checkpoints" / "last").info.metadata
    configuration = about["configuration"]
    assert configuration["hooks"]["SaveCheckpoint"]["keep_last"] == 7
    assert configuration["limits"] == {"max_step": None, "max_optimizer_step": None, "max_epoch": 2}
    assert configuration["optimizer"]["class"] == "torch.optim.sgd:SGD"
    assert about["versions"]["torch"] == torch.__version__
    assert about["command"] == shlex.join(sys.orig_argv)
    json.dumps(about)


def test_checkpoint_names_the_git_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's commit and dirty flag are recorded; settings of the repository run nothing."""

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=Someone", "-c", "user.email=someone@example.org")
        command = ["git", "-C", str(tmp_path / "code"), *who, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    script = tmp_path / "code" / "train.py"
    script.parent.mkdir()
    script.write_text("steps = 1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "Begin")
    git("config", "core.fsmonitor", f"touch {tmp_path / 'ran'}; false")
    (script.parent / "new.txt").write_text("")
    monkeypatch.setattr(sys, "argv", [str(script)])
    train(tmp_path, SaveCheckpointConfig(every="3 steps"))
    about = load_checkpoint(tmp_path / "checkpoints" / "last").info.metadata
    assert about["git"] == {"commit": git("rev-parse", "HEAD"), "changed": False}
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("background", [False, True])
def test_every_checkpoint_resumes_exactly(background: bool, tmp_path: Path) -> None:
    """Each checkpoint, saved in the background or not, resumes to the same weights."""
    save = SaveCheckpointConfig(every="1 steps", keep_last=None, in_background=background)
    uninterrupted = train(tmp_path, save)
    for step in range(1, 6):
        path = tmp_path / "checkpoints" / f"step_{step:08}"
        resumed = train(tmp_path / str(step), save, model=make_model(9), resume_from=path)
        assert equal(weights(resumed.model), weights(uninterrupted.model))
        assert steps_in(tmp_path / str(step)) == list(range(step + 1, 7))


def test_background_save_is_consistent(tmp_path: Path) -> None:
    """A later update does not change the copy; it equals a foreground save."""
    for name, background in (("in the foreground", False), ("in the background", True)):
        save = SaveCheckpointConfig(every="1 steps", keep_last=None, in_background=background)
        model = torch.nn.Sequential(torch.nn.Linear(4, 20_000), torch.nn.Linear(20_000, 2))
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.01)
        optimizer = torch.optim.AdamW(model.parameters())
        train(tmp_path / name, save, model=model, optimizer=optimizer)
    for step in range(1, 7):
        saved, expected = (
            load_checkpoint(tmp_path / name / "checkpoints" / f"step_{step:08}").parts
            for name in ("in the background", "in the foreground")
        )
        for part in ("model", "optimizer"):
            assert same(saved[part], expected[part]), (step, part)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


class Heavy(PipelineHooks):
    """Hook with a state that is slow to write."""

    def __init__(self) -> None:
        super().__init__()
        self.state = torch.zeros(16 << 20)

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.state = state["state"]


def test_busy_background_may_skip_saves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No step waits for a save with when_busy='skip', but the last save is made."""
    save = SaveCheckpointConfig(
        every="1 steps", keep_last=None, in_background=True, when_busy="skip"
    )
    train(tmp_path, save, Heavy())
    steps = steps_in(tmp_path)
    assert steps[0] == 1
    assert steps[-1] == 6
    assert len(steps) < 6
    assert "no save at step 2" in caplog.text


def test_script_without_logging_shows_the_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Standard error shows whether a run is fresh or resumed, and from which checkpoint."""
    save = SaveCheckpointConfig(every="1 epoch")
    train(tmp_path, save, max_epoch=1, resume_from="auto")
    root = tmp_path / "checkpoints"
    assert capsys.readouterr().err == f"no checkpoint in {root}; starting a fresh run\n"
    train(tmp_path, save, max_epoch=2, resume_from="auto")
    assert capsys.readouterr().err.startswith(f"resumed from {root / 'step_00000003'} at step 3 (")


def test_auto_starts_resumes_and_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One command serves a new run, a resumed one and a completed one."""
    caplog.set_level(logging.INFO)
    save = SaveCheckpointConfig(every="1 epoch")
    train(tmp_path, save, max_epoch=1, resume_from="auto")
    assert "starting a fresh run" in caplog.text
    second = train(tmp_path, save, model=make_model(8), max_epoch=2, resume_from="auto")
    assert "resumed from" in caplog.text
    uninterrupted = train(tmp_path / "uninterrupted", save)
    assert equal(weights(second.model), weights(uninterrupted.model))
    before = (tmp_path / "checkpoints" / "last").stat().st_mtime_ns
    train(tmp_path, save, max_epoch=2, resume_from="auto")
    assert "nothing left to do" in caplog.text
    assert steps_in(tmp_path) == [3, 6]
    assert (tmp_path / "checkpoints" / "last").stat().st_mtime_ns == before


def test_auto_removes_remains_of_a_killed_run(tmp_path: Path) -> None:
    """Stale checkpoints are removed after a resume, also of a completed run."""
    train(tmp_path, SaveCheckpointConfig(every="1 step", keep_last=None))
    save = SaveCheckpointConfig(every="1 step", keep_last=2)
    with pytest.raises(StateError):
        train(tmp_path, save, model=torch.nn.Linear(4, 2), resume_from="auto")
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6]  # of a run that this start does not continue
    train(tmp_path, save, resume_from="auto")
    assert steps_in(tmp_path) == [5, 6]


def damage(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_auto_falls_back_and_logs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A damaged checkpoint is skipped by name; if all are damaged, that is an error."""
    save = SaveCheckpointConfig(every="2 steps", keep_last=None)
    uninterrupted = train(tmp_path, save)
    root = tmp_path / "checkpoints"
    damage(root / "step_00000006")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):  # a path never falls back
        train(tmp_path, save, resume_from=root / "last")
    second = train(tmp_path, save, model=make_model(8), resume_from="auto")
    assert f"skipped {root / 'step_00000006'}" in caplog.text
    assert equal(weights(second.model), weights(uninterrupted.model))
    load_checkpoint(root / "step_00000006")  # saved again
    for path in root.glob("step_*"):
        damage(path)
    with pytest.raises(CheckpointError, match="step_00000002"):
        train(tmp_path, save, resume_from="auto")


def test_folder_of_checkpoints_is_not_a_checkpoint(tmp_path: Path) -> None:
    """Given the run folder or the folder of checkpoints, the error names the path to use."""
    train(tmp_path, SaveCheckpointConfig())
    for folder in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(CheckpointError, match=r"pass one of them, such as .*/last, or resume"):
            train(tmp_path, SaveCheckpointConfig(), resume_from=folder)


def test_auto_needs_a_folder() -> None:
    """Without a saving hook and a run folder, "auto" is an error."""
    with pytest.raises(PipelineConfigError, match="no directory to search"):
        make_trainer(max_step=1, resume_from="auto")


def test_hook_needs_a_folder() -> None:
    """Without a folder here and a run folder, the run can't begin."""
    trainer = make_trainer(SaveCheckpointConfig(), max_step=1)
    with pytest.raises(PipelineConfigError, match=r"SaveCheckpoint\.folder"):
        trainer()


def test_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    """The second run's error names the first one's process, and nothing is damaged."""

    def start_another(args: PipelineHookArgs) -> None:
        for resume_from in (None, "auto"):
            with pytest.raises(StoreLockedError, match=r"process \d+"):
                train(tmp_path, SaveCheckpointConfig(), resume_from=resume_from)

    train(tmp_path, SaveCheckpointConfig(), at_step(4, start_another))
    assert steps_in(tmp_path) == [3, 6]
    train(tmp_path, SaveCheckpointConfig(), resume_from="auto")  # unlocked again


class Publisher(PipelineHooks):
    """Hook that publishes a value and requests a logging point in every step."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = values
        self.on_step.after(self.publish)
        self.on_loop.before(lambda args: args.metrics.listen(lambda record: None))

    def publish(self, args: PipelineHookArgs) -> None:
        args.metrics.publish("score", self.values[args.global_step_id])
        args.requests.log("each step")


@pytest.mark.parametrize("resumed", [False, True])
def test_best_checkpoints_are_kept_off_the_trigger(resumed: bool, tmp_path: Path) -> None:
    """Good values are saved at their steps, off the trigger, and are kept longest."""
    values = Publisher([0.3, 0.9, 0.1, float("nan"), 0.8, 0.2])
    save = SaveCheckpointConfig(
        every="3 steps", keep_last=1, keep_best=2, monitor="score", mode="max"
    )
    if resumed:
        train(tmp_path, values, save, max_step=4)
        train(tmp_path, values, save, model=make_model(9), resume_from="auto")
    else:
        train(tmp_path, values, save)
    assert steps_in(tmp_path) == [2, 5, 6]
    root = tmp_path / "checkpoints"
    assert (root / "best").readlink() == Path("step_00000002")
    assert load_checkpoint(root / "best").info.metrics["score"] == pytest.approx(0.9)


def test_metadata_has_only_metrics_of_the_saved_weights(tmp_path: Path) -> None:
    """A checkpoint has only metrics measured on its weights, not of an earlier step."""
    hooks = at_step(2, Publisher([0.5] * 6).publish)
    train(tmp_path, hooks, SaveCheckpointConfig(every="1 steps", keep_last=None), max_step=3)
    found = {
        step: dict(load_checkpoint(tmp_path / "checkpoints" / f"step_{step:08}").info.metrics)
        for step in (1, 2, 3)
    }
    assert found == {1: {}, 2: {"score": 0.5}, 3: {}}


class FullDisk(PipelineHooks):
    """Hook that blocks file growth, as on a full disk, from the end of a step to the next one."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.on_step.after(when=f"at steps {first}")(self.fill)
        self.on_step.before(when=f"at steps {last}")(self.make_room)
        self.on_loop.after(self.make_room)

    def fill(self, args: PipelineHookArgs) -> None:
        time.sleep(0.2)  # until the background save ends
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, self.limits[1]))

    def make_room(self, args: PipelineHookArgs) -> None:
        time.sleep(0.2)  # or hits the full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)


@pytest.mark.parametrize("background", [False, True])
def test_full_disk_does_not_end_the_run(
    background: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The error is logged, older checkpoints stay, and the next save succeeds."""
    save = SaveCheckpointConfig(every="1 steps", keep_last=None, in_background=background)
    train(tmp_path, FullDisk(2, 4), save)
    assert steps_in(tmp_path) == [1, 4, 5, 6]
    errors = [record for record in caplog.records if "a save failed" in record.getMessage()]
    assert len(errors) == 2
    assert "File too large" in errors[0].getMessage()


@pytest.mark.parametrize("background", [False, True])
def test_full_disk_stops_the_run_on_request(background: bool, tmp_path: Path) -> None:
    """The error with on_failure='stop' names the file, and the older checkpoint is intact."""
    save = SaveCheckpointConfig(every="1 steps", on_failure="stop", in_background=background)
    with pytest.raises(CheckpointError, match="step_00000002"):
        train(tmp_path, FullDisk(2, 6), save)
    assert steps_in(tmp_path) == [1]
    load_checkpoint(tmp_path / "checkpoints" / "last")
    assert read_run_state(tmp_path).state == "failed"


def test_failed_last_save_is_raised_at_the_end(tmp_path: Path) -> None:
    """The training is complete and can be saved elsewhere by hand."""
    torch.manual_seed(3)
    save = SaveCheckpointConfig(every="2 steps")
    trainer = make_trainer([FullDisk(6, 7), save], run_folder=tmp_path, max_step=6)
    with pytest.raises(CheckpointError, match="step_00000006"):
        trainer()
    assert steps_in(tmp_path) == [2, 4]
    trainer.save_checkpoint(tmp_path / "elsewhere")
    load_checkpoint(tmp_path / "elsewhere")


def test_failed_background_save_is_repeated_at_the_end(tmp_path: Path) -> None:
    """A failed save is logged; after space is freed, the end is saved."""
    disk = FullDisk(6, 7)

    class MakesRoom(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "a save failed" in record.getMessage():
                resource.setrlimit(resource.RLIMIT_FSIZE, disk.limits)

    reader = MakesRoom()
    logging.getLogger("robo_orchard_lab").addHandler(reader)
    try:
        save = SaveCheckpointConfig(every="3 steps", in_background=True)
        train(tmp_path, disk, save, max_step=6, max_epoch=None)
    finally:
        logging.getLogger("robo_orchard_lab").removeHandler(reader)
    assert steps_in(tmp_path) == [3, 6]
    assert read_run_state(tmp_path).state == "completed"


def test_unsaveable_state_ends_the_run(tmp_path: Path) -> None:
    """The error comes at once, with the path of the value, as every save would fail."""

    class Odd(PipelineHooks):
        def state_dict(self) -> dict[str, Any]:
            return {"file": object()}

    with pytest.raises(StateError, match=r"hooks\.Odd\.file"):
        train(tmp_path, Odd(), SaveCheckpointConfig())
    assert steps_in(tmp_path) == []


def test_preempted_run_is_saved_only_on_request(tmp_path: Path) -> None:
    """A preemption decides about saving; a regular end is always saved."""
    stop = at_step(4, lambda args: args.requests.stop("time is up", exit_code=75))
    with pytest.raises(RunPreempted) as preempted:
        train(tmp_path, stop, SaveCheckpointConfig())
    assert preempted.value.code == 75
    assert steps_in(tmp_path) == [3]
    assert read_run_state(tmp_path).state == "preempted"


@pytest.mark.parametrize(
    "wrong",
    [
        {"keep_best": 1},
        {"monitor": "loss"},
        {"monitor": "loss", "keep_best": 1},
        {"mode": "min"},
        {"keep_last": 0},
        {"every": "7"},
        {"on_failure": "ignore"},
        {"digest": "md5"},
    ],
)
def test_invalid_configs_are_refused(wrong: dict[str, Any]) -> None:
    """The error names the field."""
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        SaveCheckpointConfig(**wrong)


def test_several_savers_have_separate_triggers(tmp_path: Path) -> None:
    """Two hooks save into two folders by their own triggers; requests go to both."""
    often = SaveCheckpointConfig(every="2 steps", folder=tmp_path / "often", keep_last=None)()
    rarely = SaveCheckpointConfig(every="3 steps", folder=tmp_path / "rarely", keep_last=None)()
    often.name = "often"
    asks = at_step(1, lambda args: args.requests.save("to see", by="me"))
    make_trainer([often, rarely, asks], max_step=5)()
    found = {}
    for name in ("often", "rarely"):
        with CheckpointStore(tmp_path / name) as store:
            found[name] = [info.step for info in store.list()]
    assert found == {"often": [1, 2, 4, 5], "rarely": [1, 3, 5]}


def test_immediate_stop_does_not_wait_for_a_save(tmp_path: Path) -> None:
    """The running save is abandoned, and the folder is unlocked afterwards."""
    begun, may_go_on = threading.Event(), threading.Event()
    root = tmp_path / "checkpoints"

    def hold_up(event: str, args: tuple[Any, ...]) -> None:
        if event == "os.mkdir" and str(args[0]).startswith(f"{root}/.step_00000002"):
            begun.set()
            may_go_on.wait(60)

    def stop(args: PipelineHookArgs) -> None:
        assert begun.wait(60)
        raise RunPreempted(143)

    sys.addaudithook(hold_up)  # permanent, but limited to this test's folder
    save = SaveCheckpointConfig(every="1 steps", keep_last=None, in_background=True)
    with pytest.raises(RunPreempted):
        train(tmp_path, save, at_step(3, stop))
    store = CheckpointStore(root)
    assert [info.step for info in store.list()] == [1]
    with pytest.raises(StoreLockedError):
        store.open()
    may_go_on.set()
    while True:
        with suppress(StoreLockedError), store:
            assert [info.step for info in store.list()] == [1, 2]
            break
        time.sleep(0.01)


def test_two_hooks_on_one_folder_are_refused(tmp_path: Path) -> None:
    """The error names both hooks and the remedy, not a lock of this process."""
    first, second = (
        SaveCheckpointConfig()(),
        SaveCheckpointConfig(folder=tmp_path / "checkpoints")(),
    )
    first.name, second.name = "mine", "checkpoint"
    with pytest.raises(
        PipelineConfigError, match=r"mine and checkpoint both save .*/checkpoints; remove one"
    ):
        train(tmp_path, first, second)
    train(tmp_path, first)  # the folder is free again
