"""Rollouts of a policy in vectorised environments: `rollout`, `Episode`, `RolloutResult`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from robo_orchard_lab.pipeline.distributed.stall_clock import record_heartbeat
from robo_orchard_lab.pipeline.isolation import isolated_rng
from robo_orchard_lab.policy.environment_pool import EnvironmentPool, RolloutError
from robo_orchard_lab.policy.environment_worker import SUCCESS_KEYS, EnvironmentSpec, Steps

OnError: TypeAlias = Literal["raise", "record"]
"""Rule for a failed episode: raise an error, or record the episode as a failure with the error."""

OBSERVATION, STATE, IMAGES = "observation.", "observation.state", "observation.images."
_VIDEO_FPS = 20.0
_Z_95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


class ActingPolicy(Protocol):
    """Policy as rollouts use it."""

    n_action_steps: int
    """Number of predicted actions to execute before the next prediction."""

    def predict_actions(self, observation: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return actions of shape (batch, steps, action dimension)."""
        ...

    def parameters(self) -> Iterator[Any]:
        """Return the weights, on the device of the observations."""
        ...


@dataclass(frozen=True, slots=True)
class Episode:
    """Result of one episode."""

    seed: int
    is_success: bool
    length: int
    """Number of environment steps."""
    reward: float
    """Sum of rewards."""
    error: str | None = None
    """Error that ended the episode, or None."""

    @property
    def outcome(self) -> str:
        """Text such as ``success after 54 steps``."""
        return f"{'success' if self.is_success else 'failure'} after {self.length} steps"


@dataclass(frozen=True, slots=True)
class Video:
    """Frames of an episode, uint8 of shape (T, H, W, 3)."""

    episode: Episode
    frames: npt.NDArray[np.uint8]
    fps: float


@dataclass(frozen=True, slots=True)
class RolloutResult:
    """Episodes in the order of their seeds, and their statistics."""

    episodes: tuple[Episode, ...]

    @property
    def pc_success(self) -> float:
        """Successful episodes in percent; failed rollouts count as unsuccessful."""
        return 100.0 * self._successes / len(self.episodes)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the success rate, in percent."""
        low, high = wilson_interval(self._successes, len(self.episodes))
        return 100.0 * low, 100.0 * high

    @property
    def mean_length(self) -> float:
        """Mean number of environment steps."""
        return sum(episode.length for episode in self.episodes) / len(self.episodes)

    @property
    def errors(self) -> list[Episode]:
        """Episodes that an error ended."""
        return [episode for episode in self.episodes if episode.error is not None]

    @property
    def _successes(self) -> int:
        return sum(episode.is_success for episode in self.episodes)

    def __str__(self) -> str:
        """Return a line.

        >>> print(RolloutResult((Episode(0, True, 54, 1.0), Episode(1, False, 500, 0.0))))
        success 50.0 % (9.5 to 90.5 %) of 2 episodes, mean length 277.0 steps
        """
        low, high = self.interval
        errors = f", {len(self.errors)} of them ended by an error" if self.errors else ""
        return (
            f"success {self.pc_success:.1f} % ({low:.1f} to {high:.1f} %) of "
            f"{len(self.episodes)} episodes{errors}, mean length {self.mean_length:.1f} steps"
        )


def wilson_interval(successes: int, count: int, z: float = _Z_95) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion, by default of 95 %.

    From E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.

    >>> low, high = wilson_interval(19, 20)
    >>> round(low, 4), round(high, 4)
    (0.7639, 0.9911)
    """
    share, square = successes / count, z * z
    center = (share + square / (2 * count)) / (1 + square / count)
    spread = share * (1 - share) / count + square / (4 * count * count)
    half = z / (1 + square / count) * math.sqrt(spread)
    # At the ends the interval is exact; rounding must not leave [0, 1].
    low = 0.0 if successes == 0 else center - half
    return low, 1.0 if successes == count else center + half


def check_policy(model: Any) -> str | None:
    """Describe what a model lacks to act in environments, or return None."""
    if not callable(getattr(model, "predict_actions", None)) or not isinstance(
        getattr(model, "n_action_steps", None), int
    ):
        return (
            "expected a policy with predict_actions(observation) and n_action_steps, found "
            f"{type(model).__name__}"
        )
    return None


@dataclass
class Rollouts:
    """Episodes of a policy in the environments of a pool, in groups of the pool's size.

    The environments of a group run in lockstep, and each prediction has a row for each of them,
    also after the end of an episode. An episode's result therefore depends on its group only, not
    on the world size: row for row, the policy computes on tensors of the same shape, with random
    numbers seeded by the group.

    An episode ends with a success, at the environment's end, or after ``max_episode_steps``.
    Actions are clipped to the environment's action space.

    Args:
        policy: in evaluation mode.
        pool: environments.
        max_episode_steps: limit of steps of an episode.
        on_error: rule for a failed episode.
    """

    policy: ActingPolicy
    pool: EnvironmentPool
    max_episode_steps: int = 1000
    on_error: OnError = "raise"

    def check(self, seed: int = 0) -> None:
        """Reset one environment and predict its first action, without a step.

        Raises:
            RolloutError: the environment can't be created, or does not fit the policy.
        """
        observation = self.pool.reset({0: seed})[0]
        if isinstance(observation, RolloutError):
            raise observation
        spec = self.pool.spec()
        with isolated_rng({}):
            self._checked(self._predict(to_batch([observation] * len(self.pool))), spec)

    def groups(self, seeds: Sequence[int]) -> list[tuple[int, ...]]:
        """Divide seeds into groups of the pool's size, the last one may be smaller."""
        size = len(self.pool)
        return [tuple(seeds[start : start + size]) for start in range(0, len(seeds), size)]

    def run(self, groups: Sequence[Sequence[int]]) -> list[Episode]:
        """Run groups of episodes; return the episodes in order.

        Raises:
            RolloutError: an episode failed, with ``on_error="raise"``.
        """
        return [row.episode for group in groups for row in self._run_group(group, [*group])]

    def record(self, seeds: Sequence[int], group: Sequence[int]) -> list[Video]:
        """Repeat some episodes of a group, and return their videos.

        Raises:
            RolloutError: the environment can't render, or an episode failed.
        """
        spec = self.pool.spec()
        if spec.render_problem is not None:
            raise RolloutError(spec.render_problem)
        stride = max(1, round(spec.frames_per_second / _VIDEO_FPS))
        rows = self._run_group(group, seeds, stride)
        videos = []
        for row in rows:
            if row.error is not None:
                raise row.error
            frames = np.stack(row.frames)
            videos.append(Video(row.episode, frames, spec.frames_per_second / stride))
        return videos

    def _run_group(
        self, group: Sequence[int], seeds: Sequence[int], stride: int | None = None
    ) -> list[_Row]:
        """Run the episodes of some seeds in the slots of their group."""
        rows = {slot: _Row(seed) for slot, seed in enumerate(group) if seed in seeds}
        with isolated_rng({}):
            torch.manual_seed(group[0])
            observations = self.pool.reset({slot: row.seed for slot, row in rows.items()})
            spec = self.pool.spec()
            for slot, row in rows.items():
                if isinstance(found := observations[slot], RolloutError):
                    self._fail(row, found)
                elif stride is not None:
                    self._add_frames(row, [self.pool.render(slot)])
            while active := {slot: row for slot, row in rows.items() if not row.is_done}:
                self._advance(active, observations, spec, stride)
                record_heartbeat()
        return [*rows.values()]

    def _advance(
        self,
        active: Mapping[int, _Row],
        observations: dict[int, Any],
        spec: EnvironmentSpec,
        stride: int | None,
    ) -> None:
        """Predict actions for all environments, and execute them in the active ones."""
        first = next(observations[slot] for slot in active)
        all_rows = [
            first if isinstance(found := observations.get(slot, first), RolloutError) else found
            for slot in range(len(self.pool))
        ]
        batch = to_batch(all_rows)
        try:
            predicted = self._predict(batch)
        except RolloutError as error:
            for row in active.values():
                failed = RolloutError(error.problem, row.seed, row.length)
                self._fail(row, failed, error.__cause__)
            return
        actions = self._checked(predicted, spec)
        chosen, frames_at = {}, {}
        for slot, row in active.items():
            rest = self.max_episode_steps - row.length
            own = actions[slot][: min(self.policy.n_action_steps, rest)]
            if (problem := _non_finite(batch, slot, own)) is not None:
                self._fail(row, RolloutError(problem, row.seed, row.length))
                continue
            chosen[slot] = np.clip(own, spec.low, spec.high).astype(spec.low.dtype)
            if stride is not None:
                steps = range(1, len(own) + 1)
                frames_at[slot] = [n - 1 for n in steps if (row.length + n) % stride == 0]
        for slot, result in self.pool.step(chosen, frames_at).items():
            row = active[slot]
            if isinstance(result, RolloutError):
                self._fail(row, result)
                continue
            observations[slot] = result.observation
            self._add_frames(row, result.frames)
            row.add(result, self.max_episode_steps)
            if row.is_done and not row.reports_success:
                keys = " or ".join(f"info[{key!r}]" for key in SUCCESS_KEYS)
                raise RolloutError(
                    f"expected {keys} in the result of step, found neither in an episode",
                    *(row.seed, row.length),
                )

    def _predict(self, batch: Mapping[str, torch.Tensor]) -> npt.NDArray[Any]:
        device = next((tensor.device for tensor in self.policy.parameters()), torch.device("cpu"))
        try:
            with torch.no_grad():
                tensor = self.policy.predict_actions({n: v.to(device) for n, v in batch.items()})
                found: npt.NDArray[Any] = tensor.float().cpu().numpy()  # a device sync
        except Exception as error:  # of any policy
            raise RolloutError(f"{type(error).__name__}: {error}") from error
        return found

    def _checked(self, actions: npt.NDArray[Any], spec: EnvironmentSpec) -> npt.NDArray[Any]:
        """Return actions of shape (slot, steps, ...) that fit the action space."""
        rows, steps, shape = len(self.pool), self.policy.n_action_steps, spec.action_shape
        where = f"{type(self.policy).__name__}.predict_actions"
        if actions.shape[:1] + actions.shape[2:] != (rows, *shape):
            raise RolloutError(
                f"the policy does not fit the environment: expected actions of shape "
                f"{(rows, 'steps', *shape)}, found {actions.shape} from {where}"
            )
        if actions.shape[1] < steps:
            raise RolloutError(
                f"expected at least n_action_steps = {steps} predicted actions, found "
                f"{actions.shape[1]} from {where}"
            )
        return actions[:, :steps]

    def _fail(self, row: _Row, error: RolloutError, cause: BaseException | None = None) -> None:
        if self.on_error == "raise":
            raise error from cause
        row.error, row.is_done = error, True
        row.length = row.length if error.step is None else error.step

    def _add_frames(self, row: _Row, frames: Sequence[Any]) -> None:
        for frame in frames:
            if isinstance(frame, RolloutError):
                raise frame
            if getattr(frame, "ndim", 0) != 3 or frame.shape[-1] != 3 or frame.dtype != np.uint8:
                found = getattr(frame, "shape", type(frame).__name__)
                problem = f"expected frames of shape (H, W, 3) and uint8 from render, found {found}"
                raise RolloutError(problem, row.seed, row.length)
        row.frames += frames


@dataclass(slots=True)
class _Row:
    """Episode in progress."""

    seed: int
    length: int = 0
    reward: float = 0.0
    is_success: bool = False
    is_done: bool = False
    reports_success: bool = False
    error: RolloutError | None = None
    frames: list[Any] = field(default_factory=list)

    def add(self, steps: Steps, limit: int) -> None:
        self.length += steps.count
        self.reward += steps.reward
        self.is_success |= steps.is_success
        self.reports_success |= steps.reports_success
        self.is_done = steps.is_done or self.length >= limit

    @property
    def episode(self) -> Episode:
        error = None if self.error is None else self.error.problem
        is_success = self.is_success and error is None
        return Episode(self.seed, is_success, self.length, self.reward, error)


def rollout(
    policy: ActingPolicy,
    environment: Any,
    seeds: Sequence[int],
    *,
    environments: int = 4,
    max_episode_steps: int = 1000,
    step_timeout_s: float = 60.0,
    on_error: OnError = "raise",
) -> RolloutResult:
    """Run one episode of a policy for each seed, in worker processes.

    The global RNGs are restored. The result is the same in each call with the same ``environments``
    if ``environment.reset(seed=...)`` is repeatable.

    Args:
        policy: in evaluation mode, on any device.
        environment: function without arguments that returns the environment, importable by a
            worker process; with arguments, a ``functools.partial`` of it.
        seeds: seed of each episode, for ``reset``.
        environments: number of worker processes, and of rows of each prediction.
        max_episode_steps: limit of steps of an episode.
        step_timeout_s: limit of the wall-clock time of a step; a worker that exceeds it is killed.
        on_error: raise a `RolloutError` for a failed episode, or record it.

    Raises:
        RolloutError: an episode failed, or the environment does not fit the policy.
    """
    if not seeds:
        raise ValueError("expected at least one seed, found none")
    with EnvironmentPool(environment, environments, step_timeout_s=step_timeout_s) as pool:
        rollouts = Rollouts(policy, pool, max_episode_steps, on_error)
        return RolloutResult(tuple(rollouts.run(rollouts.groups(seeds))))


def to_batch(observations: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Return observations of environments as a batch with LeRobot's keys.

    An array becomes ``observation.state``. A mapping has these keys; its images are uint8 of shape
    (H, W, 3), and become float32 of shape (3, H, W) in [0, 1].

    >>> {name: tuple(values.shape) for name, values in to_batch([[0.0, 1.0], [2.0, 3.0]]).items()}
    {'observation.state': (2, 2)}
    """
    named = [each if isinstance(each, Mapping) else {STATE: each} for each in observations]
    batch = {}
    for key in named[0]:
        if not key.startswith(OBSERVATION):
            raise RolloutError(
                f"expected names such as {STATE} and {IMAGES}top, found {', '.join(named[0])}; "
                "rename them in the environment"
            )
        try:
            values = torch.from_numpy(np.stack([np.asarray(each[key]) for each in named]))
        except (KeyError, TypeError, ValueError) as error:  # missing, no numbers, or two shapes
            problem = f"expected {key} as an array of one shape in each observation: {error}"
            raise RolloutError(problem) from error
        if key.startswith(IMAGES):
            if values.dtype != torch.uint8 or values.ndim != 4 or values.shape[-1] != 3:
                found = f"{values.dtype} of shape {(*values.shape[1:],)}"
                raise RolloutError(f"expected uint8 of shape (H, W, 3) in {key}, found {found}")
            values = values.permute(0, 3, 1, 2).float() / 255
        batch[key] = values.float()
    return batch


def _non_finite(
    batch: Mapping[str, torch.Tensor], slot: int, actions: npt.NDArray[Any]
) -> str | None:
    """Describe NaN or infinity in the observation or the actions of a slot, or return None."""
    for name, values in batch.items():
        if not bool(values[slot].isfinite().all()):
            return f"expected finite observations, found NaN or infinity in {name}"
    if not np.isfinite(actions).all():
        bad = actions[~np.isfinite(actions).all(axis=tuple(range(1, actions.ndim)))][0]
        return f"expected finite actions from the policy, found {bad.ravel().tolist()!s:.100}"
    return None
