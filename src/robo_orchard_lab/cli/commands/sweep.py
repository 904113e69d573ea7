"""Commands ``sweep FILE`` and ``sweep show``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robo_orchard_core.utils.config.errors import ConfigError, dotted
from robo_orchard_core.utils.logging import one_line
from robo_orchard_lab.cli.commands import Command, CommandGroup
from robo_orchard_lab.cli.commands.submit import cluster_options, cluster_settings
from robo_orchard_lab.cli.errors import CommandError
from robo_orchard_lab.cli.experiment_arguments import (
    ExperimentArguments,
    ExperimentCommand,
    file_argument,
)
from robo_orchard_lab.cli.output import json_option, note, print_json, print_table, say

if TYPE_CHECKING:
    import optuna

    from robo_orchard_lab.cluster.submission import ClusterSettings
    from robo_orchard_lab.experiment.config import ExperimentConfig
    from robo_orchard_lab.search.space import SweepSpace

_storage_option = click.option(
    "--storage",
    metavar="ADDRESS",
    envvar="ROBO_ORCHARD_LAB_SWEEP_STORAGE",
    help="Database of the study, such as postgresql://user@host/sweeps, to share it between "
    "machines; by default a SQLite file in the folder. The environment variable keeps a password "
    "out of the command line.",
)
_study_option = click.option(
    "--study", metavar="NAME", help="Name of the study; by default that of the folder."
)


class _SweepGroup(CommandGroup):
    """Group whose arguments are those of ``run`` unless they begin with a command."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.commands:
            args = ["run", *args]
        return super().resolve_command(ctx, args)


@click.group("sweep", cls=_SweepGroup)
def sweep() -> None:
    """Search the best values for fields of an experiment, with Optuna.

    \b
      robo-orchard-lab sweep experiment.yaml --space space.yaml --trials 20 --jobs 2
      robo-orchard-lab sweep show sweeps/spirals

    `sweep FILE` is short for `sweep run FILE`.
    """


@sweep.command("run", cls=ExperimentCommand)
@file_argument
@click.option(
    "--space",
    "space_file",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="File with metric, parameters, sampler and pruner.",
)
@click.option("--trials", type=click.IntRange(min=1), required=True, help="Number of trials.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Trials at a time; each has its own cores and devices.",
)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="World size of each run.",
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the sweep; by default sweeps/NAME of the experiment.",
)
@click.option(
    "--submit",
    "is_submitted",
    is_flag=True,
    help="Train each trial in a job of SLURM, or of this machine, as `submit` does; --jobs limits "
    "the jobs at a time.",
)
@cluster_options
@_storage_option
@_study_option
@json_option
def run(
    file: Path,
    experiment: ExperimentArguments,
    space_file: Path,
    trials: int,
    jobs: int,
    processes: int,
    folder: Path | None,
    is_submitted: bool,
    storage: str | None,
    study: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Train FILE with different values of some fields, and rank the results.

    \b
      robo-orchard-lab sweep experiment.yaml --space space.yaml --trials 20 --jobs 2
      robo-orchard-lab sweep experiment.yaml --space space.yaml --trials 40 --trainer.max_epoch 3
      robo-orchard-lab sweep experiment.yaml --space space.yaml --trials 40 --submit --time 1h

    \b
    space.yaml:
      metric: eval/val/loss
      direction: minimize
      parameters:
        optimizer.lr: {low: 1.0e-4, high: 0.1, log: true}
        data.train.batch_size: {choices: [16, 32, 64]}
        optimizer: {choices: {sgd: {class_type: "torch.optim:SGD"}, ...}}
      pruner: {class_type: MedianPruner, n_startup_trials: 3}

    Each trial is a run with its own folder and report. The same command continues a killed sweep:
    finished trials stay, and the other runs resume from their checkpoints.
    """
    _require_optuna()
    from robo_orchard_lab.search.space import SweepSpace
    from robo_orchard_lab.search.sweep import Sweep

    config = experiment.load(file)
    cluster = _cluster(config, processes, options) if is_submitted else None
    if cluster is None and options["time_limit"] is not None:
        raise CommandError("--time is the limit of a job", "pass --submit to train in jobs")
    space = SweepSpace.read(space_file)
    _check_fields(file, experiment, space)
    if folder is None:
        folder = Path("sweeps") / config.name
    document = {**config.to_dict(), "run_folder": None}
    started = Sweep(
        *(file, space, folder),
        storage=storage or "",
        study=study or "",
        arguments=[f"--{dotted(each.path)}={each.text}" for each in experiment.overrides],
        trust=experiment.trust,
        processes=processes,
        document=document,
        cluster=cluster,
        report=lambda line: note(one_line(line)),
    )
    try:
        started.run(trials, jobs)
    finally:
        _print_results(started.open(), folder, experiment.trust, as_json=as_json)


@sweep.command("show", cls=Command)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@_storage_option
@_study_option
@json_option
def show(folder: Path, storage: str | None, study: str | None, as_json: bool) -> None:
    """Show the ranking of the sweep in FOLDER, and the command that repeats the best run.

    \b
      robo-orchard-lab sweep show sweeps/spirals
      robo-orchard-lab sweep show sweeps/spirals --json
    """
    _require_optuna()
    import optuna

    from robo_orchard_lab.search.storage import open_storage
    from robo_orchard_lab.search.sweep import default_storage

    if storage is None and not (folder / "study.db").is_file():
        raise CommandError(
            f"there is no sweep in {folder}: it has no study.db",
            "name the folder of a sweep, or pass --storage",
        )
    name = study or folder.resolve().name
    try:
        found = optuna.load_study(
            storage=open_storage(storage or default_storage(folder)), study_name=name
        )
    except KeyError:
        raise CommandError(f"the storage has no study {name!r}", "pass --study NAME") from None
    _print_results(found, folder, (), as_json=as_json)


def _require_optuna() -> None:
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise CommandError(
            "a sweep requires Optuna, which is not installed",
            'pip install "robo-orchard-hooks[search]"',
        ) from None


def _check_fields(file: Path, experiment: ExperimentArguments, space: SweepSpace) -> None:
    """Validate the experiment with one value of each dimension, before the first trial."""
    for name, dimension in space.parameters.items():
        try:
            argument = f"--{name}={json.dumps(dimension.example())}"
            experiment.with_argument(argument).load(file)
        except ConfigError as error:
            raise CommandError(f"parameters.{name}: {error}") from error


def _cluster(config: ExperimentConfig, processes: int, options: dict[str, Any]) -> ClusterSettings:
    """Return the settings of the jobs of trials, after the checks of `submit`."""
    from robo_orchard_lab.cluster.submission import check_experiment, require_submitit

    require_submitit()
    if processes != 1:
        raise CommandError("--processes is for runs without jobs", "pass --processes-per-node")
    check_experiment(config)
    return cluster_settings(**options)


def _print_results(
    study: optuna.Study, folder: Path, trust: tuple[str, ...], *, as_json: bool
) -> None:
    from robo_orchard_lab.report.files import reason_of
    from robo_orchard_lab.search.results import SweepResults

    found = SweepResults.read(study, folder, trust)
    page = None
    try:
        page = found.write_page(folder)
    except OSError as error:
        note(f"the page of {folder} can't be written: {reason_of(error)}")
    if as_json:
        trials = [{**asdict(trial), "run": str(trial.run)} for trial in found.trials]
        rest = {"importance": found.importance, "repeat_best": found.command}
        print_json({"trials": trials, **rest, "page": None if page is None else str(page)})
        return
    for number, table in enumerate(found.tables()):
        if number:
            say()
        print_table(table.headings, table.rows)
        if table.note:
            say(f"\n{table.note}")
    if page is not None:
        say(f"\npage: {page}")
