"""Command ``submit``, and the options of jobs that ``sweep`` shares."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robo_orchard_lab.cli import training
from robo_orchard_lab.cli.errors import CommandError
from robo_orchard_lab.cli.experiment_arguments import (
    ExperimentArguments,
    ExperimentCommand,
    allow_option,
    file_argument,
)
from robo_orchard_lab.cli.output import PROGRAM, json_option, print_json, say

if TYPE_CHECKING:
    from robo_orchard_lab.cluster.submission import ClusterSettings

_OPTIONS = (
    click.option(
        "--cluster",
        type=click.Choice(["slurm", "local"]),
        help="SLURM, or processes of this machine; by default SLURM where sbatch is installed.",
    ),
    click.option(
        "--time",
        "time_limit",
        metavar="TIME",
        help="Time limit of a job, such as 4h, 90min or 1-12:00:00; then it is requeued.",
    ),
    click.option(
        "--margin",
        metavar="TIME",
        help="Time before the limit at which the run is saved; by default 2min, and at most a "
        "quarter of the limit.",
    ),
    click.option(
        "--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Machines."
    ),
    click.option(
        "--gpus-per-node",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="GPUs of each machine.",
    ),
    click.option(
        "--cpus-per-node",
        type=click.IntRange(min=1),
        metavar="N",
        help="CPU cores of each machine, also for loader workers; by default SLURM's, often one.",
    ),
    click.option(
        "--processes-per-node",
        type=click.IntRange(min=1),
        metavar="N",
        help="Ranks on each machine; by default one for each GPU, at least one.",
    ),
    click.option(
        "--max-requeues",
        type=click.IntRange(min=0),
        default=100,
        show_default=True,
        help="Requeues after which the job fails.",
    ),
    *(
        click.option(f"--{name}", metavar=name.upper(), help=f"SLURM's {name}.")
        for name in ("partition", "account", "qos", "constraint")
    ),
    click.option(
        "--slurm",
        multiple=True,
        metavar="NAME[=VALUE]",
        help="Further option of sbatch, such as mem=64G or exclusive; repeatable.",
    ),
    click.option(
        "--setup",
        multiple=True,
        metavar="COMMAND",
        help="Shell command of the SLURM job before the training, such as `module load cuda`; "
        "repeatable.",
    ),
)


def cluster_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of jobs to a command; `cluster_settings` reads them."""
    return reduce(lambda made, option: option(made), reversed(_OPTIONS), command)


def cluster_settings(
    *,
    cluster: str | None,
    time_limit: str | None,
    margin: str | None,
    nodes: int,
    gpus_per_node: int,
    cpus_per_node: int | None,
    processes_per_node: int | None,
    max_requeues: int,
    slurm: tuple[str, ...],
    setup: tuple[str, ...],
    **named: str | None,
) -> ClusterSettings:
    """Return the settings of a job from the options of `cluster_options`."""
    from robo_orchard_lab.cluster.submission import ClusterSettings, find_cluster

    if time_limit is None:
        raise CommandError("a job requires a time limit", "pass --time, such as --time 4h")
    options = {name: value for name, value in named.items() if value is not None}
    for option in slurm:
        name, _, value = option.lstrip("-").partition("=")
        options[name.replace("_", "-")] = value
    return ClusterSettings(
        cluster="slurm" if (cluster or find_cluster()) == "slurm" else "local",
        time_s=_seconds("--time", time_limit),
        margin_s=None if margin is None else _seconds("--margin", margin),
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        cpus_per_node=cpus_per_node,
        processes_per_node=processes_per_node,
        max_requeues=max_requeues,
        options=options,
        setup=setup,
    )


def _seconds(option: str, value: str) -> float:
    from robo_orchard_lab.pipeline.hooks.time_limit import duration_s

    try:
        return duration_s(value)
    except ValueError as error:
        raise CommandError(f"{option}: {error}") from None


@click.command("submit", cls=ExperimentCommand)
@file_argument
@cluster_options
@allow_option
@click.option(
    "--dry-run", is_flag=True, help="Check everything and print the script for sbatch; no job."
)
@json_option
def submit(
    file: Path,
    experiment: ExperimentArguments,
    allow: str | None,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train FILE in a job of SLURM, or in the background, until the run is complete.

    \b
      robo-orchard-lab submit experiment.yaml --nodes 2 --gpus-per-node 8 --time 4h
      robo-orchard-lab submit experiment.yaml --time 90min --partition gpu --slurm mem=64G
      robo-orchard-lab submit experiment.yaml --time 1h --cluster local --trainer.max_epoch 3
      robo-orchard-lab submit experiment.yaml --time 4h --dry-run

    The job saves before its time limit and requeues itself; it is one run, which resumes from its
    checkpoint. `robo-orchard-lab runs` shows its state. The file is validated first, and the job
    trains a copy of it.
    """
    from robo_orchard_lab.cluster import submission

    submission.require_submitit()
    settings = cluster_settings(**options)
    config = experiment.load(file)
    submission.check_experiment(config)
    training.check_start(config, experiment, allow=allow)
    if dry_run:
        script = ""
        if settings.is_slurm:
            script = submission.sbatch_script(config, settings, trust=experiment.trust, allow=allow)
        if as_json:
            print_json({"cluster": settings.cluster, "script": script or None})
        elif script:
            say(script.rstrip())
        else:
            parameters = settings.executor_parameters(config.name)
            say("\n".join(f"{name}: {value}" for name, value in parameters.items()))
        return
    job = submission.submit(config, settings, trust=experiment.trust, allow=allow)
    run = config.folder()
    if as_json:
        found = {"run_folder": str(run), "cluster": job.cluster, "job_id": job.id}
        print_json({**found, "submission": str(job.folder), "log": str(job.log)})
        return
    say(f"{run}: {job.cluster} job {job.id}")
    rows = {
        "state": f"{PROGRAM} runs {run}",
        "log": str(run / job.log.relative_to(run.absolute())),
        "cancel": submission.cancel_command(job),
    }
    for name, text in rows.items():
        say(f"  {name:<6}  {text}")
