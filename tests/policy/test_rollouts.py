"""Episodes of a policy in worker processes: results, faults, and the end of all processes."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]  # accelerate brings it
import pytest
import torch

from launching import HELPERS, environment
from reaching import make_reach, make_without_package, processes_in, reach
from reaching_policy import ReachPolicy
from robo_orchard_lab.policy import Episode, RolloutError, RolloutResult, rollout
from robo_orchard_lab.policy.environment_pool import EnvironmentPool
from robo_orchard_lab.policy.rollouts import Rollouts, to_batch, wilson_interval


def alive(trace: Path) -> list[int]:
    """Return the workers of a trace file that run."""
    return [
        pid
        for pid in processes_in(trace)
        if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    ]


def await_end(trace: Path, timeout_s: float = 20.0) -> list[int]:
    """Wait for the end of all workers of a trace file; return those that remain."""
    end = time.monotonic() + timeout_s
    while (left := alive(trace)) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def await_start(trace: Path, count: int = 4) -> None:
    """Wait until a trace file has some processes, and all of them run."""
    end = time.monotonic() + 120
    while len(processes_in(trace)) < count and time.monotonic() < end:
        time.sleep(0.05)
    assert len(alive(trace)) == count


def test_a_policy_that_acts_succeeds_and_one_that_does_not_fails(tmp_path: Path) -> None:
    """Success rate, lengths and seeds are those of the episodes, and all workers end."""
    trace = tmp_path / "trace"
    factory = reach(trace=str(trace), child=True)
    good = rollout(ReachPolicy(), factory, range(5, 12), environments=3)
    assert (good.pc_success, [e.seed for e in good.episodes]) == (100.0, [*range(5, 12)])
    assert all(1 <= e.length <= 10 for e in good.episodes)
    idle = rollout(ReachPolicy(gain=0.0), factory, range(3), environments=2, max_episode_steps=7)
    assert (idle.pc_success, idle.mean_length) == (0.0, 7.0)
    assert len(processes_in(trace)) == 2 * 5
    assert await_end(trace) == []


def test_the_result_is_that_of_a_loop_over_steps() -> None:
    """Chunks of actions run as in a plain loop with one environment."""
    policy = ReachPolicy(n_action_steps=3)
    found = rollout(policy, reach(), [4], environments=1)
    env = make_reach()
    observation, _ = env.reset(seed=4)
    count, reward, is_success = 0, 0.0, False
    while not is_success:
        batch = {"observation.state": torch.from_numpy(observation)[None]}
        for action in policy.predict_actions(batch)[0, :3].detach().numpy():
            observation, gain, *_, info = env.step(action.clip(-1, 1))
            count, reward, is_success = count + 1, reward + gain, info["success"]
            if is_success:
                break
    assert found.episodes == (Episode(4, True, count, pytest.approx(reward)),)  # type: ignore[arg-type]  # pytest's


def test_the_result_does_not_depend_on_the_division_of_groups() -> None:
    """Episodes with random actions are identical, bit for bit, whichever process runs a group."""
    policy = ReachPolicy(noise=0.5)
    state = torch.get_rng_state()
    with EnvironmentPool(reach(), 3) as pool:
        rollouts = Rollouts(policy, pool)
        groups = rollouts.groups(range(8))
        together = rollouts.run(groups)
        torch.manual_seed(7)
        apart = [each for group in reversed(groups) for each in reversed(rollouts.run([group]))]
    assert together == [*reversed(apart)]
    assert len({episode.reward for episode in together}) == 8
    torch.set_rng_state(state)
    rollout(policy, reach(), [0], environments=1)
    assert torch.equal(torch.get_rng_state(), state)


FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "raises": ({"fault": "raise"}, {}, "seed 3, step 2: ValueError: the gripper is stuck"),
    "dies": ({"fault": "die"}, {}, "seed 3, step 2: .* ended with exit code 7"),
    "hangs": (
        {"fault": "hang"},
        {"step_timeout_s": 1.0},
        "seed 3, step 2: .* time limit of a step",
    ),
    "hangs and blocks Python": (
        {"fault": "hang without release", "child": True},
        {"step_timeout_s": 1.0},
        "seed 3, step 2: .* time limit of a step",
    ),
    "nan": ({"fault": "nan"}, {}, "seed 3, step 4: expected finite observations, found NaN"),
}


@pytest.mark.parametrize(("arguments", "options", "message"), FAULTS.values(), ids=FAULTS)
def test_a_failed_environment_is_an_error_or_a_record(
    arguments: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """The error names seed and step; a record counts the episode, and the others run."""
    trace = tmp_path / "trace"
    factory = reach(**arguments, fault_seed=3, trace=str(trace))
    with pytest.raises(RolloutError, match=message) as raised:
        rollout(ReachPolicy(), factory, range(6), environments=2, **options)
    assert (raised.value.seed, raised.value.step is not None) == (3, True)
    assert await_end(trace) == []
    found = rollout(ReachPolicy(), factory, range(6), environments=2, on_error="record", **options)
    assert [e.seed for e in found.episodes if e.is_success] == [0, 1, 2, 4, 5]
    [failed] = found.errors
    assert (failed.seed, failed.is_success) == (3, False)
    assert f"{failed.error}" in str(raised.value)
    assert await_end(trace) == []


def test_a_worker_error_has_the_trace_of_the_environment() -> None:
    """The note of the error has the line of the environment that raised."""
    with pytest.raises(RolloutError) as raised:
        rollout(ReachPolicy(), reach(fault="raise"), [0], environments=1)
    assert any("reaching.py" in note and "_fail" in note for note in raised.value.__notes__)


def test_a_blocked_step_prints_its_stack(capfd: pytest.CaptureFixture[str]) -> None:
    """Standard error shows where the simulator was when its time was over."""
    with pytest.raises(RolloutError, match="standard error has its stack"):
        rollout(ReachPolicy(), reach(fault="hang"), [0], environments=1, step_timeout_s=0.5)
    assert "in _fail" in capfd.readouterr().err


POLICIES: dict[str, tuple[ReachPolicy, str]] = {
    "nan": (ReachPolicy(bad_x=0.2), r"seed 0, step 0: expected finite actions .*nan"),
    "raises": (ReachPolicy(raises=True), "seed 0, step 0: ValueError: the policy has no plan"),
    "other size": (
        ReachPolicy(action_size=3),
        r"expected actions of shape \(2, 'steps', 2\), found \(2, 4, 3\) from ReachPolicy",
    ),
    "few steps": (
        ReachPolicy(n_action_steps=9),
        "expected at least n_action_steps = 9 predicted actions, found 4",
    ),
}


@pytest.mark.parametrize(("policy", "message"), POLICIES.values(), ids=POLICIES)
def test_a_policy_that_fails_is_an_error(policy: ReachPolicy, message: str) -> None:
    """Wrong actions are refused before they reach an environment."""
    with pytest.raises(RolloutError, match=message):
        rollout(policy, reach(), range(4), environments=2)


def test_a_policy_with_nan_for_some_goals_fails_these_episodes() -> None:
    """With on_error="record", only the episodes with NaN actions count as failed."""
    found = rollout(ReachPolicy(bad_x=0.2), reach(), range(8), on_error="record")
    goals = {seed: make_reach().reset(seed=seed)[0][2] for seed in range(8)}
    assert {e.seed for e in found.errors} == {s for s, x in goals.items() if x > 0.2}
    assert {e.seed for e in found.episodes if e.is_success} == {
        seed for seed, x in goals.items() if x <= 0.2
    }


def test_an_environment_that_never_reports_success_is_refused() -> None:
    """An environment without info["success"] is an error, and not a success rate of 0."""
    with pytest.raises(RolloutError, match=r"expected info\['success'\] or info\['is_success'\]"):
        rollout(ReachPolicy(), reach(fault="silent"), [0], environments=1, on_error="record")


def test_a_missing_package_has_its_pip_command() -> None:
    """The error of an environment whose package is missing names the extra."""
    with pytest.raises(RolloutError, match=r"pip install 'robo-orchard-hooks\[metaworld\]'"):
        rollout(ReachPolicy(), make_without_package, [0])


def test_a_factory_that_no_worker_can_import_is_refused() -> None:
    """A lambda, and a function of the running script, are errors before a process starts."""
    with pytest.raises(RolloutError, match="define it at the top level of a module of its own"):
        rollout(ReachPolicy(), lambda: make_reach(), [0])


def test_observations_become_a_batch_of_lerobot() -> None:
    """Images of uint8 become channels first in [0, 1]; unknown names are refused."""
    pixels = np.full((2, 3, 3), 51, np.uint8)
    batch = to_batch([{"observation.state": [1.0], "observation.images.top": pixels}] * 2)
    assert batch["observation.images.top"].shape == (2, 3, 2, 3)
    assert batch["observation.images.top"].unique().tolist() == [pytest.approx(0.2)]
    assert batch["observation.state"].tolist() == [[1.0], [1.0]]
    with pytest.raises(RolloutError, match=r"expected names such as .* found pixels"):
        to_batch([{"pixels": pixels}])
    for other in ({}, {"observation.state": [1.0, 2.0]}, {"observation.state": ["a"]}):
        with pytest.raises(
            RolloutError, match=r"expected observation.state as an array of one sha"
        ):
            to_batch([{"observation.state": [1.0]}, other])
    with pytest.raises(RolloutError, match=r"expected uint8 of shape \(H, W, 3\)"):
        to_batch([{"observation.images.top": pixels.astype(float)}])


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(0, 20, 0.0, 0.16113), (20, 20, 0.83887, 1.0), (10, 20, 0.29930, 0.70070), (1, 1, 0.20655, 1)],
)
def test_the_interval_is_wilsons(successes: int, count: int, low: float, high: float) -> None:
    """The interval has the values of published tables."""
    assert wilson_interval(successes, count) == pytest.approx((low, high), abs=1e-5)
    episodes = [Episode(n, n < successes, 1, 0.0) for n in range(count)]
    assert RolloutResult(tuple(episodes)).interval == pytest.approx(
        (100 * low, 100 * high), abs=1e-3
    )
    assert math.isclose(RolloutResult(tuple(episodes)).pc_success, 100 * successes / count)


JOB = """
import sys, time
from reaching import reach
from robo_orchard_lab.policy.environment_pool import EnvironmentPool
environment = reach(fault=sys.argv[2], child=True, trace=sys.argv[1])
pool = EnvironmentPool(environment, 2, step_timeout_s=600)
pool.reset({0: 1, 1: 2})
print("idle", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("fault", ["none", "hang at start"])
def test_no_worker_outlives_a_killed_job(fault: str, tmp_path: Path) -> None:
    """After kill -9 no idle or blocked worker runs, and no child of one."""
    trace = tmp_path / "trace"
    with subprocess.Popen(
        [sys.executable, "-c", JOB, str(trace), fault],
        env={**environment(), "PYTHONPATH": f"{os.pathsep.join(sys.path)}{os.pathsep}{HELPERS}"},
        stdout=subprocess.PIPE,
    ) as job:
        try:
            await_start(trace)
            if fault == "none":
                assert job.stdout is not None
                assert job.stdout.readline() == b"idle\n"
        finally:
            job.kill()
    assert await_end(trace) == []


def test_no_worker_outlives_an_interrupt(tmp_path: Path) -> None:
    """After Ctrl-C no worker and no child of one runs, though the simulator blocks."""
    trace = tmp_path / "trace"

    def interrupt() -> None:
        await_start(trace)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        rollout(
            ReachPolicy(),
            reach(fault="hang", child=True, trace=str(trace)),
            range(8),
            environments=2,
            step_timeout_s=600,
        )
    thread.join()
    assert await_end(trace) == []


def test_a_signal_to_all_processes_does_not_end_a_worker(tmp_path: Path) -> None:
    """SIGTERM and SIGUSR1, which a scheduler sends to each process, reach the trainer only."""
    with EnvironmentPool(reach(trace=str(tmp_path / "trace")), 1) as pool:
        pool.spec()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(pool.processes[0], number)
        assert isinstance(pool.reset({0: 1})[0], np.ndarray)
    assert not alive(tmp_path / "trace")
