"""The Meta-World example: demonstrations, training and success."""

from __future__ import annotations

import filecmp
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from launching import command, environment
from robo_orchard_lab.data.lerobot import LeRobotDataset
from robo_orchard_lab.experiment import ExperimentConfig

pytest.importorskip("metaworld")
pytest.importorskip("mujoco")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "metaworld"
TRUST = "pick_place"
UNSEEN = {  # a run without images, in a folder of the test
    "hooks.rollouts.environment.render": False,
    "hooks.rollouts.videos": 0,
    "hooks.rollouts.environments": 2,
    "hooks.report": None,
    "hooks.bar": None,
}


@pytest.fixture(autouse=True)
def example_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the example's modules importable, and run in a folder of the test."""
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder with the 50 demonstrations of seed 0."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLE)
        from collect import collect

        yield collect(tmp_path_factory.mktemp("metaworld") / "demonstrations")


def overrides(demonstrations: Path, **more: Any) -> dict[str, Any]:
    named = {name.replace("__", "."): value for name, value in more.items()}
    return {"data.train.dataset.folder": str(demonstrations), **UNSEEN, **named}


def train(file: str, values: dict[str, Any]) -> list[float]:
    """Train a file of the example; return the success rates of its evaluations, in percent."""
    experiment = ExperimentConfig.load(EXAMPLE / file, trust=TRUST, overrides=values)
    run = experiment.build(run_folder="runs/one")
    rates: list[float] = []
    run.trainer.metrics.subscribe("eval/pc_success", lambda found: rates.append(found.value))
    run.trainer()
    return rates


BEFORE_AND_AFTER = {"hooks.rollouts.at_start": True, "hooks.rollouts.every": None}


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
)
def test_200_steps_of_behavior_cloning_succeed(seed: int, demonstrations: Path) -> None:
    """Of 20 held-out goals, at most 1 succeeds before training, and at least 16 after 200 steps."""
    values = overrides(demonstrations, seed=seed, trainer__max_step=200) | BEFORE_AND_AFTER
    untrained, trained = train("pick_place.yaml", values)
    assert untrained <= 5.0
    assert trained >= 80.0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_500_steps_of_the_diffusion_policy_succeed(seed: int, demonstrations: Path) -> None:
    """The diffusion policy, too, learns the task, from its file."""
    values = overrides(demonstrations, seed=seed, trainer__max_step=500) | BEFORE_AND_AFTER
    untrained, trained = train("diffusion.yaml", values)
    assert untrained <= 5.0
    assert trained >= 80.0


def test_one_line_changes_the_policy(demonstrations: Path) -> None:
    """With another class, the file of behavior cloning is the file of the diffusion policy."""
    text = (EXAMPLE / "pick_place.yaml").read_text("utf-8")
    assert text.count("class_type: BehaviorCloning") == 1
    Path("changed.yaml").write_text(text.replace("BehaviorCloning", "DiffusionPolicy"), "utf-8")
    values = overrides(demonstrations) | {
        "name": "same",
        "hooks.rollouts": None,
        "hooks.best": None,
    }
    changed = ExperimentConfig.load("changed.yaml", trust=TRUST, overrides=values).build(
        run_folder="runs/changed"
    )
    own = ExperimentConfig.load(EXAMPLE / "diffusion.yaml", trust=TRUST, overrides=values).build(
        run_folder="runs/own"
    )
    assert changed.model.config == own.model.config
    assert type(own.model).__name__ == "DiffusionPolicy"


def test_collection_is_deterministic_and_survives_an_interruption(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same seed writes the same bytes, also after an interruption, and the expert succeeds."""
    import collect
    from pick_place import Expert

    collect.collect("first", episodes=3, seed=5)
    act = Expert.action
    calls = iter(range(70))

    def interrupted(self: Any, state: Any) -> Any:
        if next(calls, None) is None:  # in the second episode
            raise KeyboardInterrupt
        return act(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(Expert, "action", interrupted)
        with pytest.raises(KeyboardInterrupt):
            collect.collect("again", episodes=3, seed=9)
    assert not Path("again").exists()
    collect.collect("again", episodes=3, seed=5)
    files = [str(path.relative_to("first")) for path in Path("first").rglob("*") if path.is_file()]
    assert len(files) >= 4
    assert filecmp.cmpfiles("first", "again", files, shallow=False)[0] == files
    assert sorted(path.name for path in Path().iterdir()) == ["again", "first"]
    dataset = LeRobotDataset("first", chunk_size=8)
    lengths = torch.bincount(torch.tensor([int(s["episode_index"]) for s in iter_samples(dataset)]))
    assert ((lengths > 30) & (lengths < 100)).all()


def iter_samples(dataset: LeRobotDataset) -> Iterator[dict[str, Any]]:
    return (dataset[index] for index in range(len(dataset)))


def test_episodes_of_a_goal_are_repeatable() -> None:
    """A seed starts the same episode in new and used environments; splits differ."""
    from pick_place import Expert, make_environment

    used, new, other = make_environment(), make_environment(), make_environment("train")
    expert = Expert()
    state, _ = used.reset(seed=3)
    for _ in range(5):
        used.step(expert.action(state))
    first, again = used.reset(seed=7)[0], new.reset(seed=7)[0]
    assert (first == again).all()
    for _ in range(5):
        first, again = (each.step(expert.action(first))[0] for each in (used, new))
        assert (first == again).all()
    assert (used.reset(seed=57)[0] != used.reset(seed=7)[0]).any()  # of the next 50 goals
    assert (other.reset(seed=7)[0] != used.reset(seed=7)[0]).any()
    assert (used.reset()[0] == new.reset(seed=8)[0]).all()  # without a seed, the next goal
    for each in (used, new, other):
        assert each.observation_space.contains(each.reset(seed=0)[0])
        each.close()


def test_command_refuses_an_existing_folder() -> None:
    """The command neither overwrites nor extends a dataset."""
    Path("here").mkdir()
    script = [sys.executable, str(EXAMPLE / "collect.py"), "--folder", "here"]
    done = subprocess.run(script, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 1
    assert done.stderr == "here exists; remove it, or pass another --folder\n"


@pytest.mark.slow
def test_example_resumes_exactly(demonstrations: Path) -> None:
    """`prove-resume` passes on the example, with rollouts between the stops."""
    arguments = ["prove-resume", str(EXAMPLE / "pick_place.yaml"), "--trust", TRUST]
    for name, value in {**overrides(demonstrations), "hooks.rollouts.every": "6 steps"}.items():
        arguments.append(f"--{name}={json.dumps(value)}")
    script = [sys.executable, "-m", "robo_orchard_lab", *arguments]
    done = subprocess.run(script, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed exactly" in done.stdout


@pytest.mark.slow
def test_killed_job_of_two_processes_has_the_success_of_one_process(demonstrations: Path) -> None:
    """Two processes with half the batch, killed twice, reach the success rate of one process."""
    values = overrides(demonstrations, trainer__max_step=200, checkpoint__every="20 steps")
    (alone,) = train("pick_place.yaml", values)
    values |= {"data.train.batch_size": 128}
    options = [f"--{name}={json.dumps(value)}" for name, value in values.items()]
    arguments = ["train", EXAMPLE / "pick_place.yaml", "--trust", TRUST, *options]
    job = [*command("robo_orchard_lab", *arguments, "--run_folder", "runs/two")]
    job.insert(job.index("robo_orchard_lab"), "-m")
    metrics = Path("runs/two/metrics.jsonl")
    for steps in (40, 120):
        killed = subprocess.Popen(job, env=environment(), start_new_session=True)
        while not metrics.exists() or last_record(metrics)["global_step_id"] < steps:
            assert killed.poll() is None
            time.sleep(0.05)
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    subprocess.run(job, env=environment(), check=True)
    record = last_record(metrics)
    assert record["global_step_id"] == 200
    assert record["metrics"]["eval/pc_success"] == alone >= 80.0


def last_record(path: Path) -> Any:
    complete = [
        line for line in path.read_text("utf-8").splitlines(keepends=True) if line[-1] == "\n"
    ]
    return json.loads(complete[-1]) if complete else {"global_step_id": 0}
