"""Command ``rollout``: a policy in its environment, with success rate and video."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robo_orchard_lab.cli.errors import CommandError, ExitCode
from robo_orchard_lab.cli.experiment_arguments import ExperimentArguments, ExperimentCommand
from robo_orchard_lab.cli.output import json_option, note, print_json, print_table, say
from robo_orchard_lab.experiment.run_folder import CONFIG_FILE, NoRunError, find_run

if TYPE_CHECKING:
    from robo_orchard_lab.experiment.config import ExperimentConfig
    from robo_orchard_lab.policy.rollout_evaluation import RolloutEvaluationConfig
    from robo_orchard_lab.policy.rollouts import Video


@click.command("rollout", cls=ExperimentCommand)
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--environment",
    metavar="FUNCTION",
    help="Function that returns the environment, such as pick_place:make_environment, or JSON with "
    'its arguments: \'{"func": ..., "split": "eval"}\'. By default that of the run\'s '
    "RolloutEvaluation.",
)
@click.option("--episodes", type=click.IntRange(min=1), metavar="N", help="Number of episodes.")
@click.option("--first-seed", type=click.IntRange(min=0), metavar="N", help="Seed of the first.")
@click.option(
    "--video",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.mp4",
    help="Write a video of all episodes, one after the other.",
)
@click.option("--device", default="auto", metavar="DEVICE", help="cpu, cuda, ...; default: auto.")
@json_option
def rollout(
    path: Path,
    experiment: ExperimentArguments,
    environment: str | None,
    episodes: int | None,
    first_seed: int | None,
    video: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Run episodes of a policy, and print its success rate.

    \b
      robo-orchard-lab rollout runs/pick_place --episodes 20 --video out.mp4
      robo-orchard-lab rollout pretrained_model --environment pick_place:make_environment

    PATH is a run folder or the folder of a saved policy (config.json and model.safetensors). Of a
    run, the policy is that of pretrained_model/, or else of the newest checkpoint. Environment and
    settings are those of the run's RolloutEvaluation. An episode that an error ends counts as
    unsuccessful.
    """
    if video is not None and video.suffix != ".mp4":
        raise CommandError(f"expected --video FILE.mp4, found {video}")
    if not path.exists():
        raise CommandError(
            f"there is no {path}", "name a run folder, or a folder of a saved policy"
        )
    run = None
    with suppress(NoRunError):
        found = find_run(path)
        run = experiment.within(found.folder).load(found.config)
    settings = _settings(run, experiment, environment, path)
    changes = {"episodes": episodes, "first_seed": first_seed}
    settings = settings.replace(**{n: value for n, value in changes.items() if value is not None})
    policy = _load_policy(path, run, settings, experiment)

    import torch

    if device == "auto":
        device = str(torch.accelerator.current_accelerator() or "cpu")
    _run_and_print(policy.to(device), settings, video, as_json=as_json)


def _settings(
    run: ExperimentConfig | None,
    experiment: ExperimentArguments,
    environment: str | None,
    path: Path,
) -> RolloutEvaluationConfig:
    """Return the run's settings with another environment, or the default settings with one."""
    from robo_orchard_core.utils.config.formats import read_json
    from robo_orchard_lab.experiment.catalogue import ExperimentTrust, with_definitions
    from robo_orchard_lab.policy.rollout_evaluation import RolloutEvaluationConfig

    hooks = run.hooks.values() if run is not None else ()
    own = next((hook for hook in hooks if isinstance(hook, RolloutEvaluationConfig)), None)
    if environment is None:
        if own is None:
            raise CommandError(
                f"expected a run with a RolloutEvaluation to take the environment from, found none "
                f"for {path}",
                "pass --environment MODULE:FUNCTION",
            )
        return own
    is_json = environment.lstrip().startswith("{")
    document: Any = read_json(environment) if is_json else {"func": environment}
    trusted = ExperimentTrust.of(experiment.trust)
    trusted.make_local_modules_importable()
    fields = with_definitions({"environment": document})
    assert isinstance(fields, dict)
    given = RolloutEvaluationConfig.from_dict(fields, trust=trusted.trust)
    return given if own is None else own.replace(environment=given.environment)


def _load_policy(
    path: Path,
    run: ExperimentConfig | None,
    settings: RolloutEvaluationConfig,
    experiment: ExperimentArguments,
) -> Any:
    """Return the saved policy, or else that of a run's checkpoint, in evaluation mode."""
    from robo_orchard_lab.experiment.build import with_data
    from robo_orchard_lab.experiment.catalogue import ExperimentTrust
    from robo_orchard_lab.experiment.initial_weights import SavedWeights
    from robo_orchard_lab.experiment.run_checkpoints import find_checkpoints
    from robo_orchard_lab.policy.pretrained import load_policy, policy_folder
    from robo_orchard_lab.policy.rollouts import check_policy

    if run is None or policy_folder(path) is not None:
        return load_policy(path, trust=ExperimentTrust.of(experiment.trust).trust)
    saved = SavedWeights.from_checkpoint(find_checkpoints(path).pick())
    if settings.weights is not None:
        saved = saved.of_hook(settings.weights)
    model = with_data(run).model
    if model is None:
        raise CommandError(
            f"the model of {path / CONFIG_FILE} is null, and there is no pretrained_model/",
            "add SaveModel or KeepBest to the hooks of the script",
        )
    policy = model()
    if problem := check_policy(policy):
        raise CommandError(problem)
    saved.load_into(policy)
    note(f"weights of {saved.path}")
    return policy.eval()


def _run_and_print(
    policy: Any, settings: RolloutEvaluationConfig, video: Path | None, *, as_json: bool
) -> None:
    from robo_orchard_lab.policy.environment_pool import EnvironmentPool, RolloutError
    from robo_orchard_lab.policy.rollout_evaluation import environment_factory
    from robo_orchard_lab.policy.rollouts import RolloutResult, Rollouts

    seeds = range(settings.first_seed, settings.first_seed + settings.episodes)
    try:
        with EnvironmentPool(
            environment_factory(settings.environment),
            settings.environments,
            step_timeout_s=settings.step_timeout_s,
        ) as pool:
            rollouts = Rollouts(policy, pool, settings.max_episode_steps, "record")
            problem = None if video is None else rollouts.pool.spec().render_problem
            if problem is not None:
                raise RolloutError(problem)
            groups = rollouts.groups(seeds)
            result = RolloutResult(tuple(rollouts.run(groups)))
            if video is not None:
                failed = {episode.seed for episode in result.errors}
                _write_video(
                    video,
                    [
                        each
                        for group in groups
                        if (wanted := [seed for seed in group if seed not in failed])
                        for each in rollouts.record(wanted, group)
                    ],
                )
    except RolloutError as error:
        raise CommandError(str(error), exit_code=ExitCode.FAILED) from error
    low, high = result.interval
    if as_json:
        values = {"pc_success": result.pc_success, "pc_success_low": low, "pc_success_high": high}
        rows = [
            {"seed": e.seed, "success": e.is_success, "steps": e.length, "error": e.error}
            for e in result.episodes
        ]
        return print_json({**values, "episode_length": result.mean_length, "episodes": rows})
    print_table(
        ["seed", "result", "steps", "error"],
        [
            [str(e.seed), "success" if e.is_success else "failure", str(e.length), e.error or ""]
            for e in result.episodes
        ],
    )
    say(str(result))
    if video is not None:
        say(f"video: {video}")
    return None


def _write_video(path: Path, videos: list[Video]) -> None:
    """Write the videos one after the other."""
    import numpy as np

    from robo_orchard_lab.pipeline.pixels import mp4
    from robo_orchard_lab.pipeline.run.durable import replace_file

    if not videos:
        raise CommandError("no episode to show: all of them failed", exit_code=ExitCode.FAILED)
    data = mp4(np.concatenate([video.frames for video in videos]), videos[0].fps)
    if data is None:
        raise CommandError(
            "a video requires PyAV with H.264", "pip install 'robo-orchard-hooks[robotics]'"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, data)
