"""Environment of the Meta-World example: pick up a puck and move it to a goal.

    environment: {func: "pick_place:make_environment"}   # in an experiment file

Goals are numbered: ``reset(seed=s)`` starts an episode with goal ``s`` of the split, the same in
every process. ``MT1("pick-place-v3", seed)`` of Meta-World draws 50 goals for each of its seeds.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import gymnasium
import metaworld
import mujoco
import numpy as np
from gymnasium import spaces
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import SawyerPickPlaceV3Policy
from numpy.typing import NDArray

TASK = "pick-place-v3"
FPS = 80
STATE_DIM, ACTION_DIM = 39, 4
GOALS_PER_SEED = 50
FIRST_SEED = {"train": 0, "eval": 10_000}  # of Meta-World; the splits have different goals

Split: TypeAlias = Literal["train", "eval"]
Observation: TypeAlias = Any  # an array, or a dict of arrays with cameras


@lru_cache(maxsize=8)
def goals(seed: int) -> list[Any]:
    """Return the 50 goals of a seed of Meta-World, which costs 0.7 s."""
    return list(metaworld.MT1(TASK, seed=seed).train_tasks)


class PickPlace(gymnasium.Env[Observation, NDArray[np.float32]]):
    """Meta-World's pick-place-v3 with numbered goals; an episode ends at the first success.

    Observations are states of shape (39,). With cameras, they are dicts with LeRobot's keys, and
    images of shape (height, width, 3), uint8. Actions of shape (4,) in [-1, 1] move the hand along
    three axes and close the gripper.

    Args:
        split: ``train`` or ``eval``.
        goal_seed: another seed, other goals.
        cameras: cameras of the observations, such as ``corner2``.
        render: make `render` return images, also without cameras. Images require OpenGL; on a
            machine without a screen, set ``MUJOCO_GL=egl``.
        image_size: height and width in pixels.
        max_episode_steps: truncates episodes without success; the expert needs about 55 steps.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}  # noqa: RUF012

    def __init__(
        self,
        split: Split = "eval",
        goal_seed: int = 0,
        cameras: Sequence[str] = (),
        render: bool = False,
        image_size: int = 128,
        max_episode_steps: int = 200,
    ) -> None:
        self.render_mode = "rgb_array" if render or cameras else None
        self.cameras = tuple(cameras)
        self.max_episode_steps = max_episode_steps
        self._first_seed = FIRST_SEED[split] + goal_seed
        self._goal = -1
        self._steps = 0
        make: Any = ALL_V3_ENVIRONMENTS[TASK]
        self._env = make(render_mode=self.render_mode, width=image_size, height=image_size)
        self._env.model.light_castshadow[:] = 0  # shadows double the time of an image
        self.action_space = self._env.action_space
        state = spaces.Box(-np.inf, np.inf, (STATE_DIM,), np.float32)
        image = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        images = {f"observation.images.{camera}": image for camera in self.cameras}
        self.observation_space = (
            spaces.Dict({"observation.state": state, **images}) if images else state
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode with goal ``seed``; without a seed, with the next goal."""
        super().reset(seed=seed)
        self._goal = self._goal + 1 if seed is None else seed
        self._steps = 0
        block, number = divmod(self._goal, GOALS_PER_SEED)
        self._env.set_task(goals(self._first_seed + block)[number])
        state, info = self._env.reset()
        return self._observation(state), info

    def step(
        self, action: NDArray[np.float32]
    ) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Execute one action; ``info["success"]`` is 1.0 when the puck is at the goal."""
        state, reward, _, _, info = self._env.step(action)
        self._steps += 1
        is_truncated = self._steps >= self.max_episode_steps
        return self._observation(state), float(reward), info["success"] > 0, is_truncated, info

    def render(self) -> NDArray[np.uint8]:
        """Return an image of the first camera, (height, width, 3)."""
        return self._image(self.cameras[0] if self.cameras else "corner")

    def close(self) -> None:
        self._env.close()

    def _observation(self, state: NDArray[np.float64]) -> Observation:
        state = state.astype(np.float32)
        if not self.cameras:
            return state
        images = {f"observation.images.{name}": self._image(name) for name in self.cameras}
        return {"observation.state": state, **images}

    def _image(self, camera: str) -> NDArray[np.uint8]:
        kind = mujoco.mjtObj.mjOBJ_CAMERA
        self._env.mujoco_renderer.camera_id = mujoco.mj_name2id(self._env.model, kind, camera)
        image = self._env.render()
        # Meta-World's corner cameras are mounted upside down.
        return np.ascontiguousarray(image[::-1, ::-1] if camera.startswith("corner") else image)


def make_environment(
    split: Split = "eval",
    goal_seed: int = 0,
    cameras: Sequence[str] = (),
    render: bool = False,
    image_size: int = 128,
    max_episode_steps: int = 200,
) -> PickPlace:
    """Return a `PickPlace` environment; the arguments are plain data, as in a file."""
    return PickPlace(split, goal_seed, cameras, render, image_size, max_episode_steps)


class Expert:
    """Meta-World's scripted expert of pick-place-v3; it succeeds on all goals."""

    def __init__(self) -> None:
        self._policy: Any = SawyerPickPlaceV3Policy()

    def action(self, state: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the action for a state (39,), in the range of the action space."""
        with warnings.catch_warnings(action="ignore"):  # actions out of range, clipped here
            action = self._policy.get_action(state)
        clipped: NDArray[np.float32] = np.clip(action, -1.0, 1.0).astype(np.float32)
        return clipped
