"""Sample environment for a first rollout: no simulator, and an episode takes milliseconds."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


class Reach:
    """Point on a plane that must reach a goal, as a gymnasium environment without its base class.

    The observation has the position and the goal, in [-1, 1]; an action in [-1, 1] moves the point
    by a fifth of it. The seed of ``reset`` determines the goal.

    >>> environment = Reach(limit=30)
    >>> observation, _ = environment.reset(seed=4)
    >>> observation.shape, environment.action_space.shape
    ((4,), (2,))

    Args:
        limit: number of steps after which an episode is truncated.
        radius: distance to the goal that counts as success.
        render_mode: ``rgb_array`` renders images of 64 x 64 pixels.

    Raises:
        ModuleNotFoundError: gymnasium is not installed.
    """

    def __init__(
        self, limit: int = 50, radius: float = 0.1, render_mode: str | None = None
    ) -> None:
        from gymnasium.spaces import Box  # of the extra `robotics`

        self.action_space = Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = Box(-10.0, 10.0, (4,), np.float32)
        self.render_mode = render_mode
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
        self.limit, self.radius = limit, radius
        self.steps = 0
        self.position: npt.NDArray[Any] = np.zeros(2)
        self.goal: npt.NDArray[Any] = np.zeros(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; return the observation and an empty info."""
        self.steps, self.position = 0, np.zeros(2)
        self.goal = np.random.default_rng(seed).uniform(-1, 1, 2)
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Return observation, reward, termination, truncation, and info with the success."""
        self.steps += 1
        self.position = self.position + 0.2 * np.clip(action, -1, 1)
        distance = float(np.linalg.norm(self.position - self.goal))
        info = {"success": distance < self.radius}
        return self._observation(), -distance, False, self.steps >= self.limit, info

    def render(self) -> npt.NDArray[np.uint8]:
        """Return an image with the goal in green and the point in white."""
        frame = np.zeros((64, 64, 3), np.uint8)
        for place, color in ((self.goal, (0, 160, 0)), (self.position, (255, 255, 255))):
            column, row = ((place.clip(-1, 1) + 1) * 30).astype(int)
            frame[row : row + 4, column : column + 4] = color
        return frame

    def close(self) -> None:
        """Do nothing."""

    def _observation(self) -> npt.NDArray[np.float32]:
        return np.concatenate([self.position, self.goal]).astype(np.float32)
