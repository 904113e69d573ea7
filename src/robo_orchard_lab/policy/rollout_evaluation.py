"""Hook that measures the success rate of the policy in simulators during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

from pydantic import Field

from robo_orchard_core.utils.config import Config, ConfigFieldError, Function, function_of
from robo_orchard_core.utils.hook import HookContext
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.distributed.collectives import gather_objects
from robo_orchard_lab.pipeline.errors import PipelineConfigError, check_state_version
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.model import plain_model
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from robo_orchard_lab.pipeline.sharding import is_sharded_model
from robo_orchard_lab.pipeline.state_schema import Count, StateSchema
from robo_orchard_lab.pipeline.trigger import Last, TriggerField
from robo_orchard_lab.policy.environment_pool import EnvironmentPool, RolloutError
from robo_orchard_lab.policy.rollouts import (
    ActingPolicy,
    Episode,
    OnError,
    RolloutResult,
    Rollouts,
    check_policy,
)

logger = job_logger(__name__)

STATE_VERSION = 1
_METRICS = ("pc_success", "pc_success_low", "pc_success_high", "episode_length", "rollout_errors")


class RolloutEvaluation(PipelineHooks):
    """Success rate of the policy in simulated environments, on a trigger or on request.

    Worker processes run the environments, and the policy predicts the actions of all of them at
    once. Each evaluation uses the same seeds. The result does not depend on the world size: the
    ranks share groups of ``environments`` episodes. Weights, modes, buffers and RNGs of the
    training are restored.

    Videos of the first successes and failures are recorded by repeating these episodes, and go to
    ``args.report`` with a table of all episodes. To keep the best weights, use ``KeepBest`` or
    ``checkpoint`` with ``monitor: eval/pc_success`` and ``mode: max``.

    - Ranks: all; ranks without a group wait. The main process records videos.
    - Publishes: ``eval/pc_success`` in percent with its 95 % interval by Wilson,
      ``eval/pc_success_low`` and ``eval/pc_success_high``; ``eval/episode_length`` in steps;
      ``eval/rollout_errors``, the number of episodes that an error ended. With a label,
      ``eval/<label>/pc_success`` and so on.
    - Requests: evaluations.
    - State: the step of the last evaluation.
    - Cost: none for a step. Before the first step, the main process creates one environment, resets
      it, and predicts its first actions, which finds settings that don't fit. The workers stay
      until the end of the loop. With several ranks, one collective for an evaluation.

    Raises:
        PipelineConfigError: when the loop begins, the model is no policy or is sharded; before the
            first step, the environment can't be created or does not fit the policy, or weights are
            unknown.
        RolloutError: an episode failed, with ``on_error="raise"``; the message names its seed.
    """

    keeps_trajectory = True
    reads = ("model.weights", "model.buffers")
    changes = ("metrics", "report")
    requests = ("evaluate",)

    def __init__(self, cfg: RolloutEvaluationConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self._prefix = "eval/" if cfg.label is None else f"eval/{cfg.label}/"
        self._seeds = range(cfg.first_seed, cfg.first_seed + cfg.episodes)
        self._pool: EnvironmentPool | None = None
        self._evaluated_at: int | None = None  # completed steps at the last evaluation
        self._has_no_videos = False  # and the log says so
        self.published_metrics = [self._prefix + name for name in _METRICS]
        self.register_hook("on_loop", HookContext.from_callable(self._open, self._close))
        if (weights := cfg.weights) is not None:  # refuses unknown weights before the first step
            self.on_epoch.before(lambda args: args.run.weight_set(weights))
        if cfg.every is not None:
            self.register_at_commit(partial(self._request, f"every {cfg.every}"), cfg.every)
        if cfg.at_end:
            self.register_at_commit(partial(self._request, "at the end"), Last())

    def _open(self, args: PipelineHookArgs) -> None:
        run, cfg = args.run, self.cfg
        place = run.locate(self.name)
        if is_sharded_model(run.model):
            raise PipelineConfigError(
                f"{place}: expected a model that each rank has completely, found a sharded model; "
                "evaluate its exported weights with `robo-orchard-lab rollout`"
            )
        if problem := check_policy(plain_model(run)):
            raise PipelineConfigError(f"{place}: {problem}")
        other = run.evaluated_loaders.setdefault(self._prefix, self.name)
        if other != self.name:
            raise PipelineConfigError(
                f"{place}: {other} publishes {self._prefix}pc_success as well; set a label"
            )
        try:
            self._pool = EnvironmentPool(
                environment_factory(cfg.environment),
                cfg.environments,
                step_timeout_s=cfg.step_timeout_s,
            )
        except RolloutError as error:
            raise PipelineConfigError(f"{run.locate(self.name, 'environment')}: {error}") from error
        run.evaluations[self.name] = self._evaluate
        if args.accelerator.is_main_process:
            run.start_checks.append(partial(self._check, run))
        if cfg.at_start and args.global_step_id == 0:
            self._request("at the start", args)

    def _close(self, args: PipelineHookArgs) -> None:
        args.run.evaluations.pop(self.name, None)
        if args.run.evaluated_loaders.get(self._prefix) == self.name:
            del args.run.evaluated_loaders[self._prefix]
        if self._pool is not None:
            pool, self._pool = self._pool, None
            if args.exception is None:
                pool.close()
            else:
                pool.kill()

    def _check(self, run: PipelineRun) -> None:
        """Reset an environment and predict actions before the first step, on the main process."""
        try:
            with run.evaluating(rank_local=True) as model:
                rollouts = self._rollouts(model)
                rollouts.check(self._seeds[0])
                problem = rollouts.pool.spec().render_problem
        except RolloutError as error:
            raise PipelineConfigError(f"{run.locate(self.name, 'environment')}: {error}") from error
        if problem is not None and self.cfg.videos and run.report.is_wanted:
            self._skip_videos(run, problem)

    def _rollouts(self, model: ActingPolicy) -> Rollouts:
        assert self._pool is not None  # within the loop
        return Rollouts(model, self._pool, self.cfg.max_episode_steps, self.cfg.on_error)

    def _request(self, reason: str, args: PipelineHookArgs) -> None:
        if args.exception is None and args.progress.steps_done != self._evaluated_at:
            args.requests.evaluate(reason, by=self.name, name=self.name)

    def _evaluate(self, args: PipelineHookArgs) -> None:
        step = args.progress.steps_done
        if step == self._evaluated_at:
            return
        accelerator = args.accelerator
        with args.evaluating(self.cfg.weights) as model:
            rollouts = self._rollouts(model)
            groups = rollouts.groups(self._seeds)
            own = rollouts.run(groups[accelerator.process_index :: accelerator.num_processes])
            shares = gather_objects(own) if accelerator.num_processes > 1 else [own]  # collective
            result = RolloutResult(tuple(sorted(chain(*shares), key=lambda each: each.seed)))
            self._publish(args, result)
            if args.report.is_wanted:
                self._add_table(args, result)
                self._add_videos(args, result, rollouts)
        self._evaluated_at = step

    def _publish(self, args: PipelineHookArgs, result: RolloutResult) -> None:
        low, high = result.interval
        values = (result.pc_success, low, high, result.mean_length, float(len(result.errors)))
        for name, value in zip(_METRICS, values, strict=True):
            args.metrics.publish(self._prefix + name, value, reduce="last")  # equal on all ranks
        logger.info("%s at %s: %s", self.name, args.progress, result)
        for episode in result.errors:
            where = f"seed {episode.seed}, step {episode.length}"
            logger.error("%s: episode failed: %s: %s", self.name, where, episode.error)

    def _add_table(self, args: PipelineHookArgs, result: RolloutResult) -> None:
        rows = [(e.seed, e.is_success, e.length, e.error or "") for e in result.episodes]
        columns = ("seed", "success", "steps", "error")
        args.report.add_table(f"{self._prefix}episodes", rows, columns, caption=str(result))

    def _add_videos(
        self, args: PipelineHookArgs, result: RolloutResult, rollouts: Rollouts
    ) -> None:
        """Repeat the first successes and failures with rendering, and report their videos."""
        if self._has_no_videos:
            return None
        chosen = first_of_each(result.episodes, self.cfg.videos)
        seeds = {episode.seed: episode for episode in chosen}
        for group in rollouts.groups(self._seeds):
            if not (wanted := [seed for seed in group if seed in seeds]):
                continue
            try:
                videos = rollouts.record(wanted, group)
            except RolloutError as error:
                return self._skip_videos(args.run, str(error))
            for video in videos:
                found, before = video.episode, seeds[video.episode.seed]
                if (found.is_success, found.length) != (before.is_success, before.length):
                    logger.warning(
                        "%s: the episode of seed %d was %s when it was repeated for its video, and "
                        "%s before; reset(seed=...) of the environment is not repeatable",
                        *(self.name, found.seed, found.outcome, before.outcome),
                    )
                name = self._prefix + ("success" if found.is_success else "failure")
                caption = f"seed {found.seed}: {found.outcome}"
                args.report.add_video(name, video.frames, caption, fps=video.fps)
        return None

    def _skip_videos(self, run: PipelineRun, problem: str) -> None:
        """Log once that there are no videos, or raise an error where they are required."""
        if self.cfg.require_videos:
            raise PipelineConfigError(f"{run.locate(self.name, 'videos')}: no video: {problem}")
        if not self._has_no_videos:
            self._has_no_videos = True
            logger.warning("%s: no videos: %s; or set videos to 0", self.name, problem)

    state_schema = StateSchema(STATE_VERSION, evaluated_at=Count | None)

    def state_dict(self) -> dict[str, Any]:
        return {"version": STATE_VERSION, "evaluated_at": self._evaluated_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state_version(state, STATE_VERSION, self.name)
        self._evaluated_at = state["evaluated_at"]


class RolloutEvaluationConfig(PipelineHooksConfig[RolloutEvaluation]):
    """Environment, episodes, trigger and weights of the evaluation.

    >>> from robo_orchard_lab.policy import Reach
    >>> config = RolloutEvaluationConfig(environment={"class_type": Reach}, every="200 steps")
    >>> print(config.every)
    200 steps
    """

    class_type: type[RolloutEvaluation] = RolloutEvaluation
    environment: Function = Field(
        description="Function that returns a gymnasium.Env, with its arguments; only the worker "
        "processes call it.",
    )
    every: TriggerField | None = Field(
        default="1 epoch",
        description="Trigger, such as '200 steps | 1 epoch'; None evaluates only at the end, or on "
        "requests of hooks.",
    )
    at_start: bool = Field(
        default=False, description="Evaluate before the first step, but not when resuming."
    )
    at_end: bool = Field(
        default=True,
        description="Evaluate when the run reaches one of its limits, but not when a hook stops "
        "the run.",
    )
    episodes: int = Field(default=20, ge=1, description="Number of episodes.")
    first_seed: int = Field(
        default=0, ge=0, description="Seed of the first episode; the next ones count up."
    )
    environments: int = Field(
        default=4,
        ge=1,
        description="Worker processes of each rank, and rows of a prediction; another number may "
        "change the last bits of actions.",
    )
    max_episode_steps: int = Field(
        default=1000, ge=1, description="Limit of an episode in environment steps."
    )
    step_timeout_s: float = Field(
        default=60.0,
        gt=0,
        description="Limit of the wall-clock time of a step in seconds; a worker that exceeds it "
        "is killed.",
    )
    on_error: OnError = Field(
        default="raise",
        description="End the run if an episode fails by an error ('raise'), or count the episode "
        "as unsuccessful and log its seed ('record').",
    )
    weights: str | None = Field(
        default=None,
        description="Name of the hook whose weights to evaluate, such as 'EMA'; None for the "
        "model's own.",
    )
    label: str | None = Field(
        default=None,
        min_length=1,
        description="Name within metrics, for several such hooks: eval/<label>/pc_success.",
    )
    videos: int = Field(
        default=1, ge=0, description="Number of successes, and of failures, to show as videos."
    )
    require_videos: bool = Field(
        default=False, description="Fail if the environment can't render, instead of a log line."
    )

    def __post_init__(self) -> None:
        if self.label is not None and "/" in self.label:
            raise ConfigFieldError(f"expected a name without '/', found {self.label!r}", ("label",))


def environment_factory(environment: Any) -> Callable[[], Any]:
    """Return a picklable function that creates the environment of a config, without a call."""
    is_class = isinstance(environment, Config) and hasattr(environment, "class_type")
    # A call of a class's config creates the instance, in the worker.
    factory: Callable[[], Any] = environment if is_class else function_of(environment)
    return factory


def first_of_each(episodes: Sequence[Episode], count: int) -> list[Episode]:
    """Return the first successes and the first failures without an error, ``count`` of each."""
    ran = [episode for episode in episodes if episode.error is None]
    kinds = ([e for e in ran if e.is_success], [e for e in ran if not e.is_success])
    return [episode for kind in kinds for episode in kind[:count]]
