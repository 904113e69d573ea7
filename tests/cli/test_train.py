"""Tests of the commands ``train`` and ``resume``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.cli.running import START, environment, run_in_terminal
from tests.cli.spirals import SLOW, write_experiment

from launching import without_greetings
from robo_orchard_core.utils.config import formats
from robo_orchard_lab.cli.main import main
from robo_orchard_lab.pipeline.checkpoint import CheckpointStore, FiniteCheck, load_checkpoint

FILE = "spirals.yaml"
RUN = Path("runs/spirals")


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the file, in which one is."""
    write_experiment(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(run_folder: Path | str = RUN) -> dict[str, torch.Tensor]:
    return load_file(Path(run_folder) / "checkpoints" / "last" / "model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def state(run_folder: Path | str = RUN) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(run_folder) / "run_state.json").read_text())
    return found


def start(run_folder: Path | str = RUN, number: int = 1) -> dict[str, Any]:
    file = Path(run_folder) / "starts" / f"{number:04d}.json"
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_train_writes_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    """The run is in its folder, with overrides; the last lines name the next commands."""
    assert main(["train", FILE, "--trainer.max_epoch", "2", "--optimizer.lr=0.05"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "runs/spirals: completed after 20 steps",
        "  newest checkpoint  runs/spirals/checkpoints/step_00000020",
        "  evaluate           robo-orchard-lab evaluate runs/spirals",
        "  export weights     robo-orchard-lab checkpoint export runs/spirals",
    ]
    assert state()["state"] == "completed"
    assert start()["changes"] == []
    assert "lr: 0.05" in (RUN / "config.yaml").read_text()
    assert len((RUN / "metrics.jsonl").read_text().splitlines()) == 4


def test_resume_skips_a_poisoned_checkpoint(caplog: pytest.LogCaptureFixture) -> None:
    """``resume`` continues from the newest healthy checkpoint, also of a completed run."""
    assert main(["train", FILE, "--trainer.max_epoch", "2"]) == 0
    expected = weights()
    saved = load_checkpoint(RUN / "checkpoints" / "last")
    for tensor in saved.parts["model"].values():
        tensor.fill_(float("nan"))
    with CheckpointStore(RUN / "checkpoints") as store:
        finite = FiniteCheck(lambda name: name.startswith("model/"))
        store.save(20, saved.parts, saved.rank_parts, metadata=saved.info.metadata, finite=finite)
    assert main(["resume", str(RUN)]) == 0
    assert "step_00000020 has non-finite values in model/" in caplog.text
    assert equal(weights(), expected)


def test_each_format_gives_the_same_run() -> None:
    """YAML, TOML and JSON train the same weights, bit for bit."""
    document = formats.read(Path(FILE).read_text(), "yaml")
    for name in ("toml", "json"):
        Path(f"spirals.{name}").write_text(formats.write(document, formats.check_format(name)))
    for name in ("yaml", "toml", "json"):
        assert main(["train", f"spirals.{name}", "--run_folder", name]) == 0
    assert equal(weights("yaml"), weights("toml"))
    assert equal(weights("yaml"), weights("json"))


def test_the_config_of_a_run_repeats_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Repeats the run in another folder bit for bit; in its own folder only to continue."""
    assert main(["train", FILE, "--run_folder", "elsewhere"]) == 0
    own = "elsewhere/config.yaml"
    capsys.readouterr()
    assert main(["train", own, "--run_folder", "again", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["run_folder"], found["state"]) == ("again", "completed")
    assert equal(weights("elsewhere"), weights("again"))
    assert main(["train", own]) == 2
    shown = capsys.readouterr().err
    assert "error: the run in elsewhere is completed" in shown
    assert "--run_folder FOLDER repeats it there" in shown
    assert main(["train", own, "--trainer.max_epoch", "4"]) == 0
    assert state("elsewhere")["progress"]["epoch_id"] == 4


def test_starting_a_completed_run_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Starting the same file again succeeds and trains nothing."""
    assert main(["train", FILE]) == 0
    before = weights()
    capsys.readouterr()
    assert main(["train", FILE]) == 0
    assert capsys.readouterr().out.startswith("runs/spirals: completed after 30 steps")
    assert equal(weights(), before)


def test_changed_fields_are_sorted_and_checked(capsys: pytest.CaptureFixture[str]) -> None:
    """Harmless changes pass, others require --allow, impossible changes are refused."""
    assert main(["train", FILE, "--trainer.max_epoch", "1"]) == 0
    capsys.readouterr()
    clip = "--hooks.clip={class_type: GradientClippingHook, max_norm: 1.0}"
    changed = ["train", FILE, "--trainer.max_epoch", "2", clip]
    assert main(changed) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert (
        "the run in runs/spirals would not train the same weights with changed hooks.clip"
        in shown.err
    )
    lines = [line.split()[:2] for line in shown.err.splitlines()[2:4]]
    assert lines == [["trajectory", "hooks.clip"], ["harmless", "trainer.max_epoch"]]
    assert "--allow trajectory resumes it with the changes; `robo-orchard-lab resume" in shown.err
    assert state()["progress"]["epoch_id"] == 1
    assert main([changed[0], "--allow", *changed[1:]]) == 0  # which means the same alone
    assert state()["progress"]["epoch_id"] == 2
    assert [each["path"] for each in start(number=2)["changes"]] == [
        *("hooks.clip", "trainer.max_epoch")
    ]
    assert main([*changed, "--optimizer.momentum", "0.5", "--allow", "trajectory"]) == 2
    shown = capsys.readouterr()
    assert "can't resume with changed optimizer.momentum" in shown.err
    assert "restores this value from the checkpoint" in shown.err
    assert main([*changed, "--optimizer.lr", "1", "--resume", "never"]) == 0


def test_weights_that_do_not_fit_leave_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Weights of another shape are refused at the option, before anything is written; a rule
    begins the run.
    """
    assert main(["train", FILE, "--trainer.max_epoch", "1"]) == 0
    other = ["train", FILE, "--from", str(RUN), "--run_folder", "runs/fine", "--model.outputs", "5"]
    assert main([*other, "--trainer.max_epoch", "1"]) == 2
    error = capsys.readouterr().err
    assert "command line: --from: init_from.path: runs/spirals/checkpoints/step_0000" in error
    assert "layers.2.weight (shape 3x8, expected 5x8)" in error
    assert not Path("runs/fine").exists()
    rule = "--init_from.on_mismatch={layers.2.*: skip}"
    assert main([*other, "--trainer.max_epoch", "1", rule]) == 0
    assert start("runs/fine")["initial_weights"]["skipped"].keys() == {
        *("layers.2.weight", "layers.2.bias")
    }
    RUN.rename("moved")  # a resume needs no source
    assert main([*other, "--trainer.max_epoch", "2", rule, "--dry-run"]) == 0
    assert main([*other, "--trainer.max_epoch", "2", rule]) == 0
    assert start("runs/fine", 2)["initial_weights"] is None


def test_the_learning_rate_is_changed_on_a_resume(capsys: pytest.CaptureFixture[str]) -> None:
    """``--allow trajectory`` sets a new learning rate and LR scheduler, shown before the first
    step; later resumes of the run keep both, also from the checkpoint before the change.
    """
    assert main(["train", FILE, "--trainer.max_epoch", "1"]) == 0
    curve = "--lr_scheduler={class_type: 'torch.optim.lr_scheduler:StepLR', step_size: 12}"
    changed = ["train", FILE, "--trainer.max_epoch", "2", "--optimizer.lr", "0.02", curve]
    capsys.readouterr()
    assert main(changed) == 2
    shown = capsys.readouterr().err
    assert "would not train the same weights with changed optimizer.lr, lr_scheduler" in shown
    assert "from the resumed step on, on the new curve" in shown
    assert main([*changed, "--allow", "trajectory"]) == 0
    shown = capsys.readouterr().err
    assert "  0.1 -> 0.02, 0.02, 0.002, 0.002, ..." in shown
    expected = weights()
    assert main(["resume", str(RUN / "checkpoints/step_00000010")]) == 0
    assert "0.1 -> 0.02" in capsys.readouterr().err  # from before the change
    assert equal(weights(), expected)
    assert main(["resume", str(RUN), "--trainer.max_epoch", "3"]) == 0
    assert "->" not in capsys.readouterr().err
    saved = load_checkpoint(RUN / "checkpoints" / "last")
    assert saved.parts["trainer"]["lr_scheduler"]["last_epoch"] == 30
    assert saved.parts["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.02 / 100)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "missing argument 'FILE'"),
        (["train", "spiral.yaml"], "did you mean spirals.yaml?"),
        (["train", FILE, "--trainer.max_epochs", "3"], "did you mean 'max_epoch'"),
        (["train", FILE, "--dry-run", "--debug-fast"], "expected one of"),
        (["train", FILE, "--allow", "all"], "'all' is not 'trajectory'"),
        (["train", FILE, "-q", "--log-level", "info"], "found --quiet and --log-level"),
        (["train", FILE, SLOW], "mine:Slow"),
        (
            ["train", FILE, "--run_folder", f"{FILE}/x"],
            "spirals.yaml/x can't be the run folder: spirals.yaml",
        ),
        (["resume", "runs/none"], "there is no runs/none; expected a run folder"),
        (["resume", FILE], "spirals.yaml is a file; expected a run folder"),
        (["resume", ".", "--run_folder", "x"], "not a run folder"),
    ],
)
def test_wrong_usage_exits_with_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error says what is wrong, and no run starts."""
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err
    assert not Path("runs").exists()


def test_a_failed_run_exits_with_1(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The error has two lines, after the state of the run and the command to resume it."""
    caplog.set_level("INFO")  # the fresh run is announced in the log, as for a user
    slow = ["--trust", "mine", "--hooks.slow={class_type: 'mine:Slow', seconds: 0.0, fail_at: 15}"]
    assert main(["train", FILE, *slow]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    tail = [line for line in shown.err.splitlines() if " INFO " not in line]
    assert tail[:2] == [
        "runs/spirals: ended after 15 steps",
        "  resume from step 10:  robo-orchard-lab resume runs/spirals --trust mine",
    ]
    assert tail[2] == "error: RuntimeError: no step 15"
    assert "mine.py:" in tail[3]
    assert "in hook 'slow'" in tail[3]
    assert main(["resume", str(RUN), "--trust", "mine", "--hooks.slow=null"]) == 2
    assert main(["resume", str(RUN), "--trust", "mine", "--hooks.slow.fail_at=null"]) == 2
    fixed = ["--hooks.slow.fail_at=null", "--allow", "trajectory"]
    assert main(["resume", str(RUN), "--trust", "mine", *fixed]) == 0
    assert state()["state"] == "completed"


def test_a_run_resumes_from_a_named_checkpoint() -> None:
    """Later steps are trained again; the weights are the same."""
    assert main(["train", FILE]) == 0
    before = weights()
    assert main(["resume", str(RUN / "checkpoints" / "step_00000010")]) == 0
    assert equal(weights(), before)
    assert state()["progress"]["epoch_id"] == 3


def test_a_time_limit_exits_with_75(capsys: pytest.CaptureFixture[str]) -> None:
    """A run that a time limit saved and stopped resumes exactly."""
    limit = "--hooks.limit={class_type: TimeLimit, limit: 1.0, margin: 0.5}"
    assert main(["train", FILE, limit]) == 75  # this process has taken longer than that already
    shown = capsys.readouterr()
    assert "runs/spirals: saved and stopped after " in shown.err
    assert "robo-orchard-lab resume runs/spirals" in shown.err
    assert main(["resume", str(RUN), "--hooks.limit=null"]) == 0
    assert main(["train", FILE, "--run_folder", "straight"]) == 0
    assert equal(weights(), weights("straight"))


def began(run_folder: Path, step: int) -> None:
    """Wait until a run has saved at a step."""
    ends_at = time.monotonic() + 60
    while not (run_folder / "checkpoints" / f"step_{step:08d}").is_dir():
        assert time.monotonic() < ends_at
        time.sleep(0.02)
    time.sleep(0.2)  # the run itself knows of it a moment later than the disk


@pytest.mark.parametrize("saves", [True, False])
def test_a_run_resumes_exactly_after_ctrl_c(saves: bool) -> None:
    """The exit code is 130; a Preemption hook saves first."""
    slow = [SLOW, "--trust", "mine", *([] if saves else ["--hooks.preemption=null"])]
    started = subprocess.Popen(
        [*START, "train", FILE, *slow],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    began(RUN, 10)
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=60)
    assert (started.returncode, out) == (130, "")
    assert "Traceback" not in err
    steps = state()["progress"]["global_step_id"]
    assert 10 <= steps < 30
    if saves:
        assert f"runs/spirals: saved and stopped after {steps} steps (received SIGINT)" in err
        assert state()["checkpoint"]["step"] == steps
    else:
        assert f"runs/spirals: ended after {steps} steps" in err
        assert "error: interrupted" in err
    assert ":  robo-orchard-lab resume runs/spirals --trust mine" in err
    quick = ["--trust", "mine", "--hooks.slow.seconds=0.0", "--allow", "trajectory"]
    assert main(["resume", str(RUN), *quick]) == 0
    assert main(["train", FILE, "--run_folder", "straight"]) == 0
    assert equal(weights(), weights("straight"))


def test_sigterm_exits_with_143(capsys: pytest.CaptureFixture[str]) -> None:
    """The run is saved; until it ends, another start in its folder is refused."""
    started = subprocess.Popen(
        [*START, "train", FILE, SLOW, "--trust", "mine"],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    began(RUN, 10)
    config = (RUN / "config.yaml").read_bytes()
    for options in ([], ["--resume", "never", "--seed", "3"]):  # a second one is refused
        assert main(["train", FILE, *options]) == 1
        assert f"is still running, as process {started.pid}" in capsys.readouterr().err
    assert (RUN / "config.yaml").read_bytes() == config
    started.send_signal(signal.SIGTERM)
    _, err = started.communicate(timeout=60)
    assert started.returncode == 143
    assert "(received SIGTERM)" in err


def test_a_terminal_shows_the_progress_bar() -> None:
    """The progress bar is drawn, and complete or removed before the last lines."""
    bar = "--hooks.bar={class_type: ProgressBarHook}"
    ended = run_in_terminal("train", FILE, bar, SLOW, "--trust", "mine", "--trainer.max_epoch", "1")
    assert ended.code == 0
    assert "\x1b[" in ended.out
    assert "10/10" in ended.out
    assert "runs/spirals: completed after 10 steps" in ended.out


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, *ranks, "-m", "robo_orchard_lab", *arguments],
        env=environment(variables),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_ranks_of_torchrun_train_one_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two ranks train one run, one rank reports, and evaluation agrees with one process."""
    done = torchrun("train", FILE, "--data.train.batch_size", "4", "--accelerator.cpu", "true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("runs/spirals: completed after 30 steps") == 1
    assert (start()["processes"], state()["processes"]) == (2, 2)
    measured = torchrun("evaluate", str(RUN), "--json")
    assert measured.returncode == 0, measured.stderr
    assert main(["evaluate", str(RUN), "--json"]) == 0
    metrics = json.loads(without_greetings(measured.stdout))["metrics"]
    alone = json.loads(capsys.readouterr().out)["metrics"]
    assert metrics == pytest.approx(alone, rel=1e-5)


def test_a_file_removes_no_checkpoints_of_another_run(capsys: pytest.CaptureFixture[str]) -> None:
    """`resume: never` in a file does not remove checkpoints; on the command line, it does."""
    assert main(["train", FILE]) == 0
    Path("other.yaml").write_text(f"base: {FILE}\nresume: never\ncheckpoint: {{keep_last: 1}}\n")
    before = sorted(os.listdir(Path(RUN, "checkpoints")))
    assert main(["train", "other.yaml"]) == 2
    assert "resume: never" in capsys.readouterr().err
    assert sorted(os.listdir(Path(RUN, "checkpoints"))) == before
    assert main(["train", "other.yaml", "--resume", "never"]) == 0


def test_a_link_out_of_the_run_folder_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is written through a link that someone put into the run folder."""
    assert main(["train", FILE]) == 0
    Path(RUN, "metrics.jsonl").unlink(missing_ok=True)
    Path(RUN, "metrics.jsonl").symlink_to(Path("elsewhere").absolute())
    for command in (["train", FILE], ["train", f"{RUN}/config.yaml"], ["resume", str(RUN)]):
        assert main(command) == 2
        assert "metrics.jsonl" in capsys.readouterr().err
    assert not Path("elsewhere").exists()


@pytest.mark.parametrize(
    ("limit", "value", "done"), [("max_epoch", 2, 3), ("max_step", 7, 30), ("max_epoch", 3, None)]
)
def test_a_limit_that_is_passed_is_refused(
    limit: str, value: int, done: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A completed run stays as it is; a checkpoint before the limit resumes."""
    every = "--checkpoint={every: 1 epoch, keep_last: 3}"
    assert main(["train", FILE, every]) == 0
    before = Path(RUN, "config.yaml").read_bytes()
    capsys.readouterr()
    changed = ["resume", str(RUN), f"--trainer.{limit}", str(value)]
    if done is None:
        assert main(changed) == 0  # the limit that is reached
        return
    for command in (changed, ["train", FILE, every, *changed[2:]]):
        assert main(command) == 2
        shown = capsys.readouterr().err
        assert f"trainer.{limit} is {value}, but" in shown
        assert f"has completed {done}: nothing is left to train" in shown
        assert f"pass --trainer.{limit} {done + 1} or more" in shown
        assert Path(RUN, "config.yaml").read_bytes() == before
        assert not Path(RUN, "starts", "0002.json").exists()
    earlier = str(RUN / "checkpoints" / "step_00000010")
    assert main(["resume", earlier, "--trainer.max_epoch", "2"]) == 0
    assert state()["progress"]["epoch_id"] == 2


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            "hooks:\n",
            "hooks:\n  stop:\n    class_type: EarlyStopping\n    monitor: eval/val/los\n"
            "    mode: min\n    patience: 1\n",
            "spirals.yaml:17: hooks.stop.monitor: no hook is known to publish 'eval/val/los', "
            "which stop waits for; did you mean 'eval/val/loss'? ",
        ),
        (
            "trainer:",
            "checkpoint:\n  keep_best: 1\n  mode: min\n  monitor: eval/val/los\ntrainer:",
            "spirals.yaml:24: checkpoint.monitor: no hook is known to publish 'eval/val/los', ",
        ),
        (
            "trainer:",
            'lr_scheduler:\n  class_type: "torch.optim.lr_scheduler:ReduceLROnPlateau"\n'
            "  monitor: loss/total\ntrainer:",
            "spirals.yaml:23: lr_scheduler.monitor: no hook is known to publish 'loss/total', ",
        ),
        (
            "hooks:\n",
            'hooks:\n  mine:\n    class_type: "mine:Unsaved"\n',
            "spirals.yaml:15: hooks.mine: hooks.mine.seen.0 can't be saved: expected ",
        ),
        (
            "path: metrics.jsonl}]",
            "path: metrics.jsonl}, {class_type: TrackerSink, trackers: [clearml]}]",
            "spirals.yaml:16: hooks.log: MetricsLogger.sinks: TrackerSink.trackers names "
            "'clearml', whose package is not installed: pip install clearml",
        ),
    ],
    ids=["hook", "checkpoint", "lr_scheduler", "state", "tracker"],
)
def test_problems_are_found_before_the_first_step(
    before: str, after: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names file, line and field, and nothing is trained."""
    text = Path(FILE).read_text()
    assert text.count(before) == 1
    Path(FILE).write_text(text.replace(before, after))
    code = main(["train", FILE, "--trust", "mine", "--trust", "clearml"])
    assert code != 0
    assert code == 2 or "is known to publish" not in message
    assert f"error: {message}" in capsys.readouterr().err
    assert not RUN.exists() or state()["progress"].get("global_step_id", 0) == 0


def test_an_unknown_metric_of_an_option_names_the_option(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The error begins with the option, once."""
    options = ["--checkpoint.keep_best=1", "--checkpoint.mode=min", "--checkpoint.monitor=los"]
    assert main(["train", "spirals.yaml", *options]) == 2
    assert (
        "error: --checkpoint.monitor: no hook is known to publish 'los'" in capsys.readouterr().err
    )


def test_error_of_a_hook_has_its_place_in_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    """An error that a hook raises, and a file that a hook can't write, name file and line."""
    text = Path(FILE).read_text()
    hook = 'hooks:\n  slow: {class_type: "mine:Slow", seconds: 0, fail_at: 12}\n'
    Path(FILE).write_text(text.replace("hooks:\n", hook))
    assert main(["train", FILE, "--trust", "mine"]) == 1
    assert ", configured at spirals.yaml:15: hooks.slow; --debug" in capsys.readouterr().err
    scheduler = "{class_type: torch.optim.lr_scheduler:StepLR, step_size: 0}"
    Path(FILE).write_text(f"{text}lr_scheduler: {scheduler}\n")
    places = [f"spirals.yaml:{number}: " for number in (13, text.count("\n") + 1)]
    for option in ("--resume=never", "--dry-run"):
        assert main(["train", FILE, option]) == 1
        found = capsys.readouterr().err
        assert "error: ZeroDivisionError: " in found
        assert f"configured at {places[0]}optimizer and {places[1]}lr_scheduler; --debug" in found
    hook = "hooks:\n  best:\n    class_type: KeepBest\n    monitor: eval/val/loss\n    mode: min\n"
    hook += "    path: metrics.jsonl/best.safetensors\n"
    Path(FILE).write_text(text.replace("hooks:\n", hook))
    assert main(["train", FILE, "--resume=never"]) == 2
    expected = "error: spirals.yaml:19: hooks.best.path: can't create the folder "
    assert expected in capsys.readouterr().err
