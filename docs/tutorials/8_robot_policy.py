"""
A robot policy, from demonstrations to a video
==============================================

A policy learns a task from demonstrations: a gripper picks up a block and carries it
to a mark. This tutorial records demonstrations as a LeRobot dataset, clones the
behavior of the expert, measures the success rate in simulation during the training,
and shows a video of the trained policy. The simulator is a small one, in two
dimensions, which needs neither a GPU nor OpenGL; a real one is used in the same way.
"""

# %%
# An environment and an expert
# ----------------------------
# The environment has the interface of gymnasium: ``reset(seed=...)`` begins an episode,
# ``step`` executes an action and reports success, ``render`` returns an image. It is a
# module of its own, because the episodes run in worker processes that import it.

import tempfile
from pathlib import Path

folder = Path(tempfile.mkdtemp(prefix="robot-"))
(folder / "pick_place.py").write_text('''
"""A gripper, a block and a mark on a table of 2 x 2 units."""

import numpy as np
from gymnasium.spaces import Box

REACH = 0.1  # distance at which the gripper holds the block, or the block is in place


class PickPlace:
    """Pick up the block and carry it to the mark.

    State: block and mark as seen from the gripper (2 + 2), holding (1).
    Action: velocity of the gripper (2), closed or open (1).
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    observation_space = Box(-2, 2, (5,), np.float32)
    action_space = Box(-1, 1, (3,), np.float32)

    def __init__(self, render_mode=None, limit=120):
        self.render_mode, self.limit = render_mode, limit

    def reset(self, *, seed=None, options=None):
        random = np.random.default_rng(seed)
        self.gripper, self.block, self.mark = random.uniform(-0.9, 0.9, (3, 2))
        self.holding, self.steps = False, 0
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        self.gripper = np.clip(self.gripper + 0.05 * np.clip(action[:2], -1, 1), -1, 1)
        near = np.linalg.norm(self.gripper - self.block) < REACH
        self.holding = bool(action[2] > 0 and (self.holding or near))
        if self.holding:
            self.block = self.gripper.copy()
        placed = np.linalg.norm(self.block - self.mark) < REACH
        info = {"success": bool(placed)}
        return self.observe(), float(placed), False, self.steps >= self.limit, info

    def observe(self):
        seen = [self.block - self.gripper, self.mark - self.gripper, [self.holding]]
        return np.concatenate(seen).astype(np.float32)

    def render(self):
        """Return an image of 160 x 160 pixels."""
        y, x = np.mgrid[1:-1:160j, -1:1:160j]
        image = np.full((160, 160, 3), 235, np.uint8)

        def paint(where, color):
            image[where] = color

        paint(np.hypot(x - self.mark[0], y - self.mark[1]) < 0.12, (120, 200, 130))
        block = np.maximum(abs(x - self.block[0]), abs(y - self.block[1]))
        paint(block < 0.08, (214, 90, 60))
        ring = np.hypot(x - self.gripper[0], y - self.gripper[1])
        paint((ring > 0.09) & (ring < (0.13 if self.holding else 0.15)), (50, 60, 80))
        return image

    def close(self):
        pass


def make_environment(render_mode=None) -> PickPlace:
    return PickPlace(render_mode)


def expert(state):
    """Move to the block, close the gripper, and move to the mark."""
    block, mark, holding = state[:2], state[2:4], state[4] > 0.5
    target = mark if holding else block
    closed = holding or np.linalg.norm(block) < 2 * REACH
    velocity = np.clip(target / 0.15, -1, 1)  # slower near the target
    return np.append(velocity, 1.0 if closed else -1.0).astype(np.float32)
''')

# %%
# An episode of the expert, every eighth frame:

import sys

import matplotlib.pyplot as plt

sys.path.append(str(folder))
from pick_place import PickPlace, expert


def play(act, seed):
    """Return the frames of an episode, and its success."""
    environment = PickPlace(render_mode="rgb_array")
    state, _ = environment.reset(seed=seed)
    frames, success, truncated = [environment.render()], False, False
    while not (success or truncated):
        state, _, _, truncated, info = environment.step(act(state))
        frames.append(environment.render())
        success = info["success"]
    return frames, success


def show_strip(frames):
    """Show every eighth frame, and the last one."""
    chosen = [*frames[:-1:8], frames[-1]]
    _, axes = plt.subplots(1, len(chosen), figsize=(9, 1.6), layout="constrained")
    for ax, frame in zip(axes, chosen, strict=True):
        ax.imshow(frame)
        ax.set_axis_off()
    plt.show()


frames, success = play(expert, seed=4)
show_strip(frames)

# %%
# Record demonstrations
# ---------------------
# ``LeRobotWriter`` writes the format of LeRobot (v3.0), which other tools read as well.
# The seeds of demonstrations begin at 1000; the evaluation uses others.

from robo_orchard_lab.data.lerobot import LeRobotDataset, LeRobotWriter

features = {
    "observation.state": {"dtype": "float32", "shape": (5,)},
    "action": {"dtype": "float32", "shape": (3,), "names": ["x", "y", "grip"]},
}
with LeRobotWriter(folder / "data", fps=20, features=features) as writer:
    for seed in range(1000, 1060):
        environment = PickPlace()
        state, _ = environment.reset(seed=seed)
        success = False
        while not success:
            action = expert(state)
            writer.add_frame(
                {
                    "observation.state": state,
                    "action": action,
                    "task": "place the block",
                }
            )
            state, _, _, _, info = environment.step(action)
            success = info["success"]
        writer.save_episode()

dataset = LeRobotDataset(folder / "data", chunk_size=8)
print(len(dataset), "samples")
for name in ("observation.state", "action", "action_is_pad"):
    print(f"{name:18} {tuple(dataset[0][name].shape)}")

# %%
# A sample has the state of a frame, and the actions of this frame and of the next
# seven: a *chunk*. ``action_is_pad`` marks actions after the end of the episode.
#
# Train, and measure the success
# ------------------------------
# The policy takes its sizes and its normalization from the statistics of the data.
# ``RolloutEvaluation`` runs the policy in the environment, in worker processes, with
# the same 20 seeds each time; ``KeepBest`` keeps the policy with the highest rate.

(folder / "clone.yaml").write_text("""\
name: clone
model:
  class_type: BehaviorCloning
  statistics: {from_data: statistics}
  chunk_size: 8        # actions of a prediction
  n_action_steps: 2    # of them executed before the next prediction
  hidden: [128, 128]
data:
  train:
    dataset: {class_type: LeRobotDataset, folder: data, chunk_size: 8}
    batch_size: 128
    shuffle: true
batch_processor: {class_type: PolicyProcessor}
optimizer: {class_type: torch.optim:AdamW, lr: 0.002}
lr_scheduler:
  class_type: torch.optim.lr_scheduler:OneCycleLR
  max_lr: 0.002
  total_steps: auto
hooks:
  log:
    class_type: MetricsLogger
    every: 50 steps
    sinks: [{class_type: JsonLinesSink, path: metrics.jsonl}]
  loss: {class_type: LossTracker}
  success:
    class_type: RolloutEvaluation
    environment: {func: pick_place:make_environment, render_mode: rgb_array}
    every: 200 steps
    episodes: 20
    environments: 2
  best:
    class_type: KeepBest
    monitor: eval/pc_success
    mode: max
    path: pretrained_model/model.safetensors
trainer: {max_step: 600}
""")

import shlex
import subprocess


def run(command: str) -> None:
    """Run a `robo-orchard-lab` command in the folder, and print its output."""
    print(f"$ {command}")
    words = [sys.executable, "-m", "robo_orchard_lab", *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)


run("robo-orchard-lab train clone.yaml --trust pick_place")

# %%
# The success rate during the training, with its 95 % interval:

from robo_orchard_lab.pipeline.sinks import read_metrics

for record in read_metrics(folder / "runs/clone/metrics.jsonl"):
    values = {value.name: value.value for value in record.values}
    if "eval/pc_success" in values:
        low, high = values["eval/pc_success_low"], values["eval/pc_success_high"]
        print(
            f"step {record.global_step_id}: {values['eval/pc_success']:.0f} % "
            f"({low:.0f} to {high:.0f} %), "
            f"episodes of {values['eval/episode_length']:.0f} steps"
        )

# %%
# Watch the policy
# ----------------
# ``rollout`` runs the best policy of the run on other seeds, and records a video.

run(
    "robo-orchard-lab rollout runs/clone --trust pick_place "
    "--episodes 6 --first-seed 100 --video policy.mp4"
)

# %%

import base64


class Video:
    """A video to show in a notebook and in this tutorial."""

    def __init__(self, path: Path) -> None:
        self.data = base64.b64encode(path.read_bytes()).decode()

    def _repr_html_(self) -> str:
        return (
            '<video controls loop muted width="320" title="Six episodes of the policy" '
            f'src="data:video/mp4;base64,{self.data}"></video>'
        )


Video(folder / "policy.mp4")

# %%
# Use the policy
# --------------
# The folder ``pretrained_model`` has the weights, the statistics and the class of the
# policy. It acts without a trainer and without the dataset.

import torch

from robo_orchard_lab.policy import load_policy

policy = load_policy(folder / "runs/clone/pretrained_model")
plan = []


def act(state):
    """Return the next of the two actions that the policy predicted last."""
    if not plan:
        batch = {"observation.state": torch.from_numpy(state)[None]}
        plan.extend(policy.predict_actions(batch)[0, : policy.n_action_steps].numpy())
    return plan.pop(0)


frames, success = play(act, seed=4)
print("success" if success else "failure", "after", len(frames) - 1, "steps")
show_strip(frames)

# %%
# Next
# ----
# - A diffusion policy is one line, ``class_type: DiffusionPolicy`` for the model:
#   :doc:`/how_to/robot_learning`.
# - The same steps with Meta-World's simulated arm are in ``examples/metaworld``:
#   ``bash scripts/robot_demo.sh`` records, trains and evaluates in a few minutes.
# - :doc:`/how_to/robot_data`, :doc:`/how_to/rollouts`
