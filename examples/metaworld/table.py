"""Measure success by number of demonstrations and policy; print a table.

    cd examples/metaworld
    nice -n 19 python table.py                     # 18 trainings; 20 minutes on two CPU cores
    python table.py --demonstrations 50 --policies BehaviorCloning --seeds 0 --steps 400

A seed chooses the goals of the demonstrations, the initial weights and the order of the samples.
Goals of the evaluation are the same for all trainings. Each result is a file in ``runs/table``:
after an interruption, run the command again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from collect import collect
from pick_place import make_environment
from robo_orchard_lab.experiment import ExperimentConfig
from robo_orchard_lab.pipeline.hooks import EMA
from robo_orchard_lab.policy import Policy, rollout
from robo_orchard_lab.policy.rollouts import wilson_interval

FOLDER = Path("runs/table")
FILES = {"BehaviorCloning": "pick_place.yaml", "DiffusionPolicy": "diffusion.yaml"}
EPISODES = 100
MAX_EPISODE_STEPS = 200


def measure(policy: str, demonstrations: int, seed: int, steps: int) -> int:
    """Train a policy, and return the number of successes on the evaluation's goals."""
    data = FOLDER / f"demonstrations-{seed}"
    if not data.exists():
        collect(data, 50, seed)
    experiment = ExperimentConfig.load(
        Path(__file__).with_name(FILES[policy]),
        trust="pick_place",
        overrides={
            "seed": seed,
            "data.train.dataset.folder": str(data),
            "data.train.dataset.episodes": [*range(demonstrations)],
            "trainer.max_step": steps,
            "hooks.rollouts": None,
            "hooks.best": None,
            "hooks.report": None,
            "hooks.bar.metrics": [],
        },
    )
    folder = FOLDER / f"{policy}-{demonstrations}-{seed}-{steps}"
    run = experiment.build(run_folder=folder)
    run.trainer()
    ema, model = run.hooks["ema"], run.model
    assert isinstance(ema, EMA)
    assert isinstance(model, Policy)
    with ema.applied():
        torch.manual_seed(0)
        result = rollout(
            model.eval(),
            make_environment,
            range(EPISODES),
            environments=2,
            max_episode_steps=MAX_EPISODE_STEPS,
        )
    return sum(episode.is_success for episode in result.episodes)


def successes(policy: str, demonstrations: int, seed: int, steps: int) -> int:
    """Return the number of successes from its file, or measure it."""
    file = FOLDER / f"{policy}-{demonstrations}-{seed}-{steps}.json"
    if not file.exists():
        count = measure(policy, demonstrations, seed, steps)
        file.write_text(json.dumps({"successes": count, "episodes": EPISODES}), "utf-8")
    found: int = json.loads(file.read_text("utf-8"))["successes"]
    print(f"{policy}, {demonstrations} demonstrations, seed {seed}: {found} of {EPISODES}")
    return found


def cell(counts: Sequence[int]) -> str:
    """Return success in percent with Wilson's 95 % interval, and the successes of each seed."""
    total = EPISODES * len(counts)
    low, high = wilson_interval(sum(counts), total)
    percent = 100 * sum(counts) / total
    return f"{percent:.1f} % ({100 * low:.1f} to {100 * high:.1f}): {', '.join(map(str, counts))}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure success by number of demonstrations.")
    parser.add_argument("--demonstrations", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--policies", nargs="+", choices=FILES, default=[*FILES])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    given = parser.parse_args()
    rows = [
        [str(count)]
        + [
            cell([successes(policy, count, seed, given.steps) for seed in given.seeds])
            for policy in given.policies
        ]
        for count in given.demonstrations
    ]
    for row in (["demonstrations", *given.policies], ["---"] * (1 + len(given.policies)), *rows):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
