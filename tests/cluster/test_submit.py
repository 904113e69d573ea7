"""Tests of jobs: real processes of submitit, requeued until their runs are complete."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import psutil  # type: ignore[import-untyped]  # accelerate brings it
import pytest
import torch
from safetensors.torch import load_file
from tests.cli.running import START, environment
from tests.cli.spirals import MODULE, write_experiment

from launching import coverage_settings
from robo_orchard_core.utils.process_identity import ProcessIdentity
from robo_orchard_lab.cli.main import main
from robo_orchard_lab.pipeline.run.run_state import read_run_state
from robo_orchard_lab.report.files import Problems
from robo_orchard_lab.report.jobs import Job, read_job, with_slurm_states
from robo_orchard_lab.search.storage import open_storage, recover
from robo_orchard_lab.search.sweep import default_storage

pytest.importorskip("submitit")

STAND_IN = Path(__file__).parent / "slurm_stand_in"
RUN = Path("runs/spirals")
LOCAL = ("--cluster", "local")
LONGEST_S = 300.0
JOB = str(random.randrange(10_000, 90_000))  # another port for each run of the tests

HOOKS = '''

import signal
import subprocess


class Interrupt(PipelineHooks):
    """Interruptions of the job at steps of the run, by name."""

    keeps_trajectory = True

    def __init__(self, at: dict[int, str]) -> None:
        super().__init__()
        self.at = {int(step): name for step, name in at.items()}
        self.on_step.after(self.interrupt)

    def interrupt(self, args) -> None:
        name = self.at.get(args.global_step_id)
        if name == "limit":  # the clock of the job: submitit's signal before the time limit
            os.kill(os.getppid(), signal.SIGUSR2)
        elif name == "cancel":
            os.kill(os.getppid(), signal.SIGTERM)
        elif name == "slurm" and args.accelerator.is_main_process:
            command = ["scancel", "--signal=USR2", os.environ["SLURM_JOB_ID"]]
            subprocess.run(command, check=True, start_new_session=True)  # torchrun signals groups
        elif name == "again":  # as the hook TimeLimit
            args.requests.save("again", by="Interrupt")
            args.requests.stop("again", by="Interrupt", exit_code=75)
        elif name == "unsaved":
            args.requests.stop("again", by="Interrupt", exit_code=75)
'''

MEASURED = """
import sys

if {{"submitit.core._submit", "robo_orchard_lab.cluster"}} & {{*sys.orig_argv}}:
    from coverage import Coverage

    measured = Coverage(**{settings}, data_suffix=True, auto_data=True)
    measured.set_option("run:disable_warnings", ["no-data-collected"])
    measured.start()
"""
"""Module ``sitecustomize`` that measures the coverage of the processes of jobs."""


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an experiment and a user's module."""
    write_experiment(tmp_path)
    (tmp_path / "hooks_of_jobs.py").write_text(MODULE + HOOKS)
    if (settings := coverage_settings()) is not None:
        (tmp_path / "sitecustomize.py").write_text(MEASURED.format(settings=settings))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHON", sys.executable)
    return tmp_path


@pytest.fixture
def slurm(work: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """SLURM's commands on PATH; the folder with the states of their jobs."""
    folder = work / "slurm"
    folder.mkdir()
    monkeypatch.setenv("SLURM_STAND_IN", str(folder))
    monkeypatch.setenv("SLURM_STAND_IN_FIRST", JOB)
    monkeypatch.setenv("PATH", f"{STAND_IN}{os.pathsep}{os.environ['PATH']}")
    yield folder
    for file in folder.glob("*.daemon"):
        with suppress(psutil.NoSuchProcess):  # of a test that failed
            daemon = psutil.Process(int(file.read_text()))
            for process in (*daemon.children(recursive=True), daemon):
                process.kill()


def wait(condition: Callable[[], object]) -> None:
    """Wait until a condition is true."""
    ends_at = time.monotonic() + LONGEST_S
    while not condition():
        assert time.monotonic() < ends_at
        time.sleep(0.05)


def interrupted(**at: str) -> list[str]:
    """Options that interrupt the run after steps, as in ``_5="limit"``."""
    steps = {int(name[1:]): kind for name, kind in at.items()}
    hook = {"class_type": "hooks_of_jobs:Interrupt", "at": steps}
    return ["--trust", "hooks_of_jobs", f"--hooks.interrupt={json.dumps(hook)}"]


def submit(*arguments: str, code: int = 0) -> None:
    limits = ["--time", "4h", "--max-requeues", "10"]
    assert main(["submit", "spirals.yaml", *limits, *arguments]) == code


def job_of(run: Path = RUN) -> Job:
    [job] = with_slurm_states([read_job(run, Problems())])
    assert job is not None
    return job


def end(run: Path = RUN) -> Job:
    """Wait for the end of the job of a run, and of its processes."""
    wait(lambda: not job_of(run).is_active)
    found = json.loads((job_of(run).folder / "submission.json").read_text())
    if found["process"] is not None:
        wait(lambda: ProcessIdentity.model_validate(found["process"]).is_gone())
    return job_of(run)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "last" / "model.safetensors")


def assert_uninterrupted(run: Path = RUN, *arguments: str) -> None:
    """Assert that a run has the weights of an uninterrupted one, bit for bit."""
    command = ["train", "spirals.yaml", "--run_folder", "straight", *arguments]
    assert main(command) == 0
    expected, found = weights(Path("straight")), weights(run)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def listed(capsys: pytest.CaptureFixture[str], run: Path = RUN) -> dict[str, Any]:
    """The entry of a run in the output of ``runs --json``."""
    capsys.readouterr()
    assert main(["runs", "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)
    [found] = [each for each in runs if each["path"] == str(run)]
    return dict(found)


def test_a_job_is_requeued_until_its_run_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    """A job with two requeues is one run, with the weights of an uninterrupted run."""
    submit(*LOCAL, *interrupted(_5="limit", _17="again"), "--resume", "never")
    assert f"{RUN}: local job {job_of().id}" in capsys.readouterr().out
    Path("spirals.yaml").write_text("changed after the submission")
    job = end()
    assert job.state == "finished", job.log.read_text()
    assert job.steps[0] == 0 < job.steps[1] < job.steps[2] == 18
    state = read_run_state(RUN)
    assert (state.state, state.progress["global_step_id"]) == ("completed", 30)
    assert len([*(RUN / "starts").glob("*.json")]) == 3
    found = listed(capsys)
    assert (found["state"], found["job"]["state"]) == ("completed", "finished")
    assert main(["runs"]) == 0
    assert f"{job.id} finished" in capsys.readouterr().out
    write_experiment(Path.cwd())
    assert_uninterrupted()


def test_a_job_without_progress_ends(capsys: pytest.CaptureFixture[str]) -> None:
    """Two starts that save no further step end the job with an error that names the step."""
    submit(*LOCAL, *interrupted(_3="unsaved"), "--checkpoint.every", "5 epochs")
    job = end()
    assert (job.state, job.steps) == ("failed", (0, 0)), job.log.read_text()
    assert "two starts of the job saved no step after step 0" in job.message
    assert main(["runs"]) == 0
    printed = capsys.readouterr()
    assert f"{job.id} failed" in printed.out
    assert "submit the run again with a longer --time" in printed.err


def test_a_job_that_is_cancelled_or_fails_is_not_requeued() -> None:
    """SIGTERM saves the run and ends its job; a further job resumes it, and ends with its error."""
    submit(*LOCAL, *interrupted(_5="cancel"))
    job = end()
    assert (job.state, job.steps) == ("failed", (0,)), job.log.read_text()
    assert "cancelled" in job.message
    state = read_run_state(RUN)
    assert state.state == "preempted"
    fails = "--hooks.slow={class_type: 'hooks_of_jobs:Slow', fail_at: 25}"
    submit(*LOCAL, "--trust", "hooks_of_jobs", "--allow", "trajectory", fails)
    job = end()
    assert (job.state, job.exit_code, job.folder.name) == ("failed", 1, "0002")
    assert job.steps == (state.progress["global_step_id"],)
    assert "no step 25" in job.log.read_text()


def test_a_slurm_job_requeues_itself(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A SLURM job is requeued under its id, and completes with the weights of one run."""
    submit("--partition", "gpu", "--slurm", "mem=4G", *interrupted(_5="slurm"))
    assert f"slurm job {JOB}" in capsys.readouterr().out
    job = end()
    assert (job.state, job.id, len(job.steps)) == ("finished", JOB, 2), job.log.read_text()
    script = (job.folder / f"{JOB}_submission.sh").read_text()
    for line in ("--partition=gpu", "--mem=4G", "--requeue", "--signal=USR2@120", "--time=240"):
        assert f"#SBATCH {line}\n" in script
    wait(lambda: (slurm / f"{JOB}.state").read_text() == "COMPLETED")
    assert listed(capsys)["job"]["state"] == "finished"
    assert_uninterrupted()


def test_the_queue_is_asked_for_states(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A waiting job is queued; a second one is refused; a job that SLURM cancelled is failed."""
    monkeypatch.setenv("SLURM_STAND_IN_HOLD", "1")
    submit()
    found = listed(capsys)
    assert (found["state"], found["job"]["state"], found["job"]["id"]) == (
        "unknown",
        "queued",
        JOB,
    )
    assert main(["runs"]) == 0
    assert f"{JOB} queued" in capsys.readouterr().out
    submit(code=2)
    assert (
        f"is job {JOB}, queued; wait for it, or cancel it: scancel {JOB}" in capsys.readouterr().err
    )
    assert main(["train", "spirals.yaml"]) == 2
    assert f"is job {JOB}, queued" in capsys.readouterr().err
    assert main(["runs", "--where", "job=queued", "--columns", "job_id,job"]) == 0
    assert JOB in capsys.readouterr().out
    (slurm / f"{JOB}.state").write_text("CANCELLED")
    [job] = with_slurm_states([job_of()])
    assert job is not None
    assert (job.state, job.message) == ("failed", "SLURM ended the job: CANCELLED")
    assert listed(capsys)["job"]["state"] == "failed"
    submit()
    assert job_of().id == str(int(JOB) + 1)


def test_a_planted_pickle_is_not_loaded(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job has a new folder: pickles in a run folder from elsewhere are not loaded."""
    monkeypatch.setenv("SLURM_STAND_IN_HOLD", "1")
    planted = RUN / "submissions" / "0001"
    planted.mkdir(parents=True)
    for name in (f"{JOB}_submitted.pkl", f"{JOB}_0_result.pkl"):
        (planted / name).write_bytes(b"cos\nsystem\n(S'touch loaded'\ntR.")
    submit()
    assert {path.name for path in job_of().folder.glob("*.pkl")} == {f"{JOB}_submitted.pkl"}
    assert job_of().folder.name == "0002"
    assert listed(capsys)["job"]["id"] == JOB
    assert not Path("loaded").exists()
    (slurm / f"{JOB}.state").write_text("CANCELLED")
    elsewhere = Path("elsewhere")
    (RUN / "submissions").rename(elsewhere)
    (RUN / "submissions").symlink_to(elsewhere.absolute())
    submit(code=2)
    assert "leads out of the run folder" in capsys.readouterr().err


def test_the_script_is_printed_without_slurm(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dry run prints the script for sbatch; nothing is written."""
    options = ["--nodes", "2", "--gpus-per-node", "8", "--slurm", "exclusive", "--margin", "5min"]
    options += ["--cpus-per-node", "64"]
    submit("--cluster", "slurm", *options, "--setup", "module load cuda", "--dry-run")
    lines = capsys.readouterr().out.splitlines()
    for option in ("nodes=2", "gpus-per-node=8", "ntasks-per-node=1", "signal=USR2@300"):
        assert f"#SBATCH --{option}" in lines
    assert "#SBATCH --exclusive" in lines
    assert "#SBATCH --cpus-per-task=64" in lines
    assert any("srun" in line and "--cpus-per-task=64" in line for line in lines)
    assert "module load cuda" in lines
    assert any(str(work / RUN / "submissions" / "0001") in line for line in lines)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--trainer.max_epoch", "none"], "trainer.max_epoch"),
        (["--hooks.preemption=null"], "expected a hook that saves on SIGTERM"),
        (["--checkpoint=null"], "must save: remove checkpoint: null"),
        (["--time", "soon"], "--time: can't read 'soon'"),
        (["--time", "90s", "--margin", "2min"], "pass a smaller --margin"),
        (["--nodes", "2"], "expected one node for local processes, found 2"),
        (["--slurm", "mem=4G"], "expected no options of SLURM for a local job, found mem"),
        (["--cluster", "slurm", "--slurm", "time=5"], "the job sets time itself: pass --time"),
        (["--cluster", "slurm", "--slurm", "=5"], "expected an option such as mem=64G, found ''"),
        (["--cluster", "slurm"], "srun"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_nothing_is_submitted_of_a_wrong_command(
    arguments: list[str],
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A wrong file or option is refused in a line, and leaves no job."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    submit(*LOCAL, *arguments, code=2)
    error = capsys.readouterr().err
    assert problem in error
    assert error.startswith("error: ")
    assert not any(Path("runs").rglob("submission.json"))


def test_a_dead_local_job_is_failed(capsys: pytest.CaptureFixture[str]) -> None:
    """A local job whose process has died is failed; damaged files are listed."""
    folder = RUN / "submissions" / "0001"
    folder.mkdir(parents=True)
    gone = ProcessIdentity.own().model_copy(update={"started_at": 1.0}).model_dump()
    record = {"cluster": "local", "job_id": "17", "process": gone}
    (folder / "submission.json").write_text(json.dumps(record))
    (folder / "status.json").write_text('{"state": "running", "starts": [{"step": 3}, 4]}')
    assert (job_of().state, job_of().steps) == ("failed", (3,))
    (folder / "status.json").write_text('{"state": "\\u001b[31m", "job_id": "; reboot"}')
    found = listed(capsys)
    assert (found["job"]["id"], found["job"]["state"]) == ("17", "failed")
    assert any("status.json is damaged" in problem for problem in found["problems"])


SPACE = """\
metric: eval/val/loss
parameters: {optimizer.lr: {low: 0.01, high: 0.1}}
sampler: {class_type: RandomSampler, seed: 0}
"""


def sweep(*arguments: str, trials: int) -> list[str]:
    Path("space.yaml").write_text(SPACE)
    options = ["--space", "space.yaml", "--trials", str(trials), "--submit", *LOCAL, "--time", "1h"]
    return ["sweep", "spirals.yaml", *options, *arguments]


def assert_sweep(capsys: pytest.CaptureFixture[str], trials: int) -> None:
    """Assert that the trials of a sweep ended in jobs with one start, and have results."""
    capsys.readouterr()
    assert main(["sweep", "show", "sweeps/spirals", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["trials"]
    assert [trial["state"] for trial in found] == ["completed"] * trials
    for trial in found:
        assert trial["value"] > 0
        job = job_of(Path(trial["run"]))
        assert (job.state, len(job.steps)) == ("finished", 1)


def test_a_sweep_submits_its_trials(capsys: pytest.CaptureFixture[str]) -> None:
    """A trial of a sweep with --submit is a job, and reports its values to the study."""
    assert main(sweep("--trainer.max_epoch", "1", trials=1)) == 0
    assert_sweep(capsys, 1)


@pytest.mark.slow
def test_jobs_of_a_killed_sweep_are_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    """A sweep that was killed ends the jobs of its trials, and resumes their runs in new jobs."""
    slow = "--hooks.slow={class_type: 'hooks_of_jobs:Slow', seconds: 0.1}"
    arguments = sweep("--trust", "hooks_of_jobs", slow, "--jobs", "2", trials=2)
    killed = subprocess.Popen([*START, *arguments], env=environment())
    first = Path("sweeps/spirals/trials/0000")
    wait(lambda: (first / "run_state.json").is_file())
    killed.kill()
    killed.wait()
    assert main(arguments) == 0
    assert [each.name for each in sorted((first / "submissions").iterdir())] == ["0001", "0002"]
    assert_sweep(capsys, 2)


@pytest.mark.slow
def test_values_of_a_job_that_outlives_its_sweep_count(capsys: pytest.CaptureFixture[str]) -> None:
    """A trial whose job completes after its sweep was killed has the values of that job."""
    slow = "--hooks.slow={class_type: 'hooks_of_jobs:Slow', seconds: 0.1}"
    arguments = sweep("--trust", "hooks_of_jobs", slow, trials=1)
    killed = subprocess.Popen([*START, *arguments], env=environment())
    run = Path("sweeps/spirals/trials/0000")
    wait(lambda: (run / "run_state.json").is_file())
    killed.kill()
    killed.wait()
    storage = open_storage(default_storage(run.parent.parent))
    study = optuna.load_study(study_name="spirals", storage=storage)
    recover(study, run.parent.parent)
    assert len(study.get_trials()[1].intermediate_values) < 3  # the job reports the others
    wait(lambda: job_of(run).state == "finished")
    assert main(arguments) == 0
    repeated = study.get_trials()[1]
    assert sorted(repeated.intermediate_values) == [10, 20, 30]
    capsys.readouterr()
    assert main(["sweep", "show", "sweeps/spirals", "--json"]) == 0
    [trial] = json.loads(capsys.readouterr().out)["trials"]
    assert (trial["state"], trial["value"]) == ("completed", repeated.intermediate_values[30])


@pytest.mark.slow
def test_a_job_with_a_limit_of_seconds_completes_its_run() -> None:
    """A job with a short time limit is requeued until its run is complete, bit for bit."""
    began = time.monotonic()
    steps = ["--trainer.max_epoch", "40"]
    assert main(["train", "spirals.yaml", "--run_folder", "timed", *steps]) == 0
    limit_s = max(20, round(6 * (time.monotonic() - began)))
    # The 400 steps take twice the limit, however slow this machine is now.
    slow = f"--hooks.slow={{class_type: 'hooks_of_jobs:Slow', seconds: {limit_s / 200}}}"
    command = ["submit", "spirals.yaml", "--time", f"{limit_s}s", *LOCAL]
    command += ["--trust", "hooks_of_jobs", slow, *steps]
    assert main(command) == 0
    job = end()
    assert job.state == "finished", job.log.read_text()
    assert len(job.steps) > 1
    assert_uninterrupted(RUN, *steps)


@pytest.mark.slow
def test_a_local_job_is_requeued_any_number_of_times() -> None:
    """A local job continues in a further one where submitit's executor would end it."""
    submit(*LOCAL, *interrupted(**{f"_{step}": "limit" for step in range(2, 28, 4)}))
    job = end()
    assert (job.state, len(job.steps)) == ("finished", 8), job.log.read_text()
    starts = json.loads((job.folder / "status.json").read_text())["starts"]
    assert len({start["job_id"] for start in starts}) == 2
    assert starts[-1]["job_id"] == job.id
    assert_uninterrupted()


@pytest.mark.slow
def test_a_slurm_job_of_two_nodes_requeues_itself(slurm: Path) -> None:
    """Two nodes form one job by torchrun, save at one commit point, and complete the run."""
    # Ranks exchange signals rarely, and fast steps would end the run before.
    slow = "--hooks.slow={class_type: 'hooks_of_jobs:Slow', seconds: 0.2}"
    submit("--nodes", "2", *interrupted(_3="slurm"), slow, "--data.train.batch_size", "4")
    job = end()
    assert (job.state, len(job.steps)) == ("finished", 2), job.log.read_text()
    assert read_run_state(RUN).processes == 2
    assert (job.folder / f"{job.id}_1_log.out").is_file()
    submit("--nodes", "2", "--data.train.batch_size", "4", "--run_folder", "runs/straight")
    assert end(Path("runs/straight")).state == "finished"
    assert 0 < job.steps[1] < 30
    expected, found = weights(Path("runs/straight")), weights(RUN)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
