"""Commands that train or use the weights of a run, and ``prove-resume``."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from robo_orchard_core.utils.logging import StderrHandler
from robo_orchard_lab.cli import training
from robo_orchard_lab.cli.errors import CommandError, ExitCode, check_target
from robo_orchard_lab.cli.experiment_arguments import (
    FILE_SUFFIXES,
    ExperimentArguments,
    ExperimentCommand,
    allow_option,
    file_argument,
)
from robo_orchard_lab.cli.output import (
    count_text,
    is_watched,
    json_option,
    note,
    print_json,
    print_table,
    say,
)
from robo_orchard_lab.experiment.run_folder import CONFIG_FILE, run_config_file

if TYPE_CHECKING:
    from robo_orchard_lab.experiment.config import ExperimentConfig
    from robo_orchard_lab.experiment.initial_weights import SavedWeights

_PACKAGE = "robo_orchard_lab"
_LEVELS = ("debug", "info", "warning", "error")


def verbosity_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command, and pass ``is_quiet``."""

    @click.option(
        "-v", "--verbose", is_flag=True, help="Show each epoch, each save, and who requested what."
    )
    @click.option("-q", "--quiet", is_flag=True, help="Show warnings and errors only.")
    @click.option(
        "--log-level",
        type=click.Choice(_LEVELS),
        help="Least level of log lines. `warning` is as --quiet, `debug` as --verbose with the "
        "lines of other packages; `info` adds the lines of saves in a terminal.",
    )
    @functools.wraps(command)
    def run(*args: Any, verbose: bool, quiet: bool, log_level: str | None, **others: Any) -> Any:
        given = {"--verbose": verbose, "--quiet": quiet, "--log-level": log_level}
        if len(names := [name for name, value in given.items() if value]) > 1:
            raise CommandError(f"expected one of these options, found {' and '.join(names)}")
        level = logging.WARNING if quiet else logging.DEBUG if verbose else None
        if log_level is not None:
            level = logging.getLevelNamesMapping()[log_level.upper()]
        with _logging_at(level, includes_others=not verbose):
            is_quiet = level is not None and level > logging.INFO
            return command(*args, is_quiet=is_quiet, **others)

    return run


@contextmanager
def _logging_at(level: int | None, *, includes_others: bool) -> Iterator[None]:
    """Set the levels of the log; hide routine records in a terminal without a level."""
    loggers = [logging.getLogger(_PACKAGE), *[logging.getLogger()] * includes_others]
    before = [logger.level for logger in loggers]
    handlers = [each for each in logging.root.handlers if isinstance(each, StderrHandler)]
    if level is not None:
        for logger in loggers:
            logger.setLevel(level)
    for handler in handlers if level is None and is_watched() else ():
        handler.addFilter(_is_no_routine)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_is_no_routine)
        for logger, old in zip(loggers, before, strict=True):
            logger.setLevel(old)


def _is_no_routine(record: logging.LogRecord) -> bool:
    return not getattr(record, "is_routine", False)  # of pipeline.job_log.ROUTINE


@click.command("train", cls=ExperimentCommand, lists_fields=True)
@file_argument
@allow_option
@click.option(
    "--from",
    "source",
    metavar="RUN",
    help="Begin a new run with the weights of RUN, a checkpoint, a *.safetensors file, a folder of "
    "Accelerate or Transformers, or hub:OWNER/NAME; sets init_from.path.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Build everything, compute one batch, describe the run; write nothing.",
)
@click.option(
    "--debug-fast",
    is_flag=True,
    help="Run two steps of training, evaluation, saving and resuming in a temporary folder.",
)
@verbosity_options
@json_option
def train(
    file: Path,
    experiment: ExperimentArguments,
    allow: str | None,
    source: str | None,
    dry_run: bool,
    debug_fast: bool,
    is_quiet: bool,
    as_json: bool,
) -> None:
    """Train the experiment of FILE in its run folder.

    \b
      robo-orchard-lab train experiment.yaml
      robo-orchard-lab train experiment.yaml --trainer.max_epoch 3 --optimizer.lr=0.05
      robo-orchard-lab train experiment.yaml --from runs/pretrained --run_folder runs/fine
      robo-orchard-lab train experiment.yaml --dry-run
      torchrun --nproc-per-node 2 -m robo_orchard_lab train experiment.yaml

    If the run folder has a run, the command resumes it from the newest checkpoint, unless a changed
    field changes the trained weights; --resume never starts from the beginning. FILE may also be
    the config.yaml of a run: with --run_folder FOLDER, it repeats the run in another folder.
    """
    if dry_run and debug_fast:
        raise CommandError("expected one of --dry-run and --debug-fast, found both")
    if source is not None:
        experiment = experiment.with_field("init_from.path", source, "--from")
    own_folder = _run_folder_of(file)
    if own_folder is not None and not experiment.sets("run_folder"):
        experiment = experiment.within(own_folder)
    config = experiment.load(file)
    if debug_fast:
        return training.print_fast_run(config, as_json=as_json)
    is_own_file = own_folder is not None and config.folder().resolve() == own_folder.resolve()
    start = training.check_start(config, experiment, allow=allow, is_own_file=is_own_file)
    if dry_run:
        return training.print_dry_run(config, start, as_json=as_json)
    return training.train(config, experiment, start, as_json=as_json, is_quiet=is_quiet)


def _run_folder_of(file: Path) -> Path | None:
    """Return the run folder if a file is the config.yaml of a run."""
    is_config = file.name == CONFIG_FILE and run_config_file(file.parent) is not None
    return file.parent if is_config else None


@click.command("resume", cls=ExperimentCommand)
@click.argument("run")
@allow_option
@verbosity_options
@json_option
def resume(
    run: str, experiment: ExperimentArguments, allow: str | None, is_quiet: bool, as_json: bool
) -> None:
    """Resume the run in the folder RUN from its newest intact checkpoint.

    \b
      robo-orchard-lab resume runs/spirals
      robo-orchard-lab resume runs/spirals --trainer.max_epoch 10
      robo-orchard-lab resume runs/spirals/checkpoints/step_00000010

    RUN may also be a checkpoint: the run resumes there, and later checkpoints are removed. Fields
    that do not change the trained weights may be changed, such as --trainer.max_epoch; --allow
    permits other changes.
    """
    from robo_orchard_lab.experiment.existing_run import find_existing_run
    from robo_orchard_lab.experiment.run_folder import find_run

    found = find_run(run)
    config = experiment.within(found.folder, resume="auto").load(found.config)
    existing = find_existing_run(found.folder)
    if existing is not None and existing.newest_step is None and training.is_first_rank():
        note(f"{found.folder}: no checkpoint yet; the run starts from the beginning")
    start = training.check_start(config, experiment, allow=allow, checkpoint=found.checkpoint)
    training.train(
        config,
        experiment,
        start,
        resume_from=found.checkpoint,
        as_json=as_json,
        is_quiet=is_quiet,
    )


_run_or_file = click.argument("run_or_file", metavar="RUN|FILE")
_weights_options = (
    click.option(
        "--best",
        is_flag=True,
        help="Use the best weights: those of a KeepBest hook, or by checkpoint.monitor.",
    ),
    click.option(
        "--max-batches",
        type=click.IntRange(min=1),
        metavar="N",
        help="Use only the first N batches, the same at any number of processes.",
    ),
)
_set_options = (
    click.option(
        "--set",
        "sets",
        multiple=True,
        metavar="NAME",
        help="Set of data.evaluation or data.test; repeatable.",
    ),
    click.option(
        "--weights",
        multiple=True,
        metavar="HOOK",
        help="Hook whose weights to use, such as EMA, or `model` for the model's own; repeatable. "
        "By default those of the ValidationHooks.",
    ),
)


def _with(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a decorator that adds options in their order."""
    return lambda function: reduce(lambda made, add: add(made), reversed(options), function)


@click.command("evaluate", cls=ExperimentCommand)
@_run_or_file
@_with(*_set_options, *_weights_options, json_option)
def evaluate(run_or_file: str, experiment: ExperimentArguments, best: bool, **options: Any) -> None:
    """Evaluate the weights of a run: losses and metrics on its evaluation sets.

    \b
      robo-orchard-lab evaluate runs/spirals
      robo-orchard-lab evaluate runs/spirals --best --set val
      robo-orchard-lab evaluate runs/spirals --weights model --weights EMA
      robo-orchard-lab evaluate runs/spirals/checkpoints/step_00000010

    RUN is the folder of a run, for its newest intact checkpoint, or a checkpoint; FILE the file of
    an experiment that has run. The metrics are those of the run's ValidationHooks; without such a
    hook, the losses alone. Nothing is written.
    """
    config, saved = _load_weights(run_or_file, experiment, best)
    _print_metrics(config, saved, **options)


@click.command("test", cls=ExperimentCommand)
@_run_or_file
@_with(*_set_options, *_weights_options, json_option)
def test(
    run_or_file: str,
    experiment: ExperimentArguments,
    best: bool,
    sets: tuple[str, ...],
    **options: Any,
) -> None:
    """Evaluate the weights of a run on the test sets of the file, data.test.

    \b
      robo-orchard-lab test runs/spirals
      robo-orchard-lab test experiment.yaml --best
      robo-orchard-lab test runs/spirals --weights EMA --json

    Without data.test, the evaluation set named `test` is used. The metrics are those of the first
    ValidationHook; without such a hook, the losses alone. Otherwise as `evaluate`.
    """
    config, saved = _load_weights(run_or_file, experiment, best)
    names = [*(config.data.test or {"test"} & config.data.evaluation.keys())]
    if not (sets or names):
        raise CommandError(
            "the experiment has no test set",
            "add data.test.NAME to the file, or pass --set NAME with an evaluation set",
        )
    _print_metrics(config, saved, sets or tuple(names), **options)


@click.command("predict", cls=ExperimentCommand)
@_run_or_file
@click.option(
    "--data",
    required=True,
    metavar="NAME",
    help="Set of data.evaluation or data.test, or `train`.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write: .jsonl, .npz, .parquet or .safetensors.",
)
@click.option(
    "--weights", metavar="HOOK", help="Hook whose weights to use, such as EMA, not the model's own."
)
@_with(*_weights_options, json_option)
def predict(
    run_or_file: str,
    experiment: ExperimentArguments,
    data: str,
    out: Path,
    weights: str | None,
    best: bool,
    max_batches: int | None,
    as_json: bool,
) -> None:
    """Write the outputs of a run's model for each sample of a data set.

    \b
      robo-orchard-lab predict runs/spirals --data val --out predictions.jsonl
      robo-orchard-lab predict runs/spirals --data train --out predictions.npz --weights EMA

    RUN is the folder of a run or a checkpoint; FILE the file of an experiment that has run. The
    outputs are those of the batch processor's evaluation_forward or forward, with the samples'
    indices, in the order of the dataset; each sample occurs once, also with several processes.
    """
    from robo_orchard_lab.experiment import evaluation
    from robo_orchard_lab.pipeline.predictions import check_suffix

    check_suffix(out)
    config, saved = _load_weights(run_or_file, experiment, best)
    predictions = evaluation.predict(config, saved, data, weights=weights, max_batches=max_batches)
    if not training.is_first_rank():
        return
    predictions.save(out)
    if as_json:
        found = {"path": str(out), "weights": str(saved.path), "samples": len(predictions)}
        print_json({**found, "outputs": [*predictions.outputs]})
    else:
        names = ", ".join(predictions.outputs)
        say(f"{out}: {names} of {count_text(len(predictions), 'sample')} by {saved.path}")


@click.command("export", cls=ExperimentCommand)
@_run_or_file
@click.option(
    "--format",
    "format_",
    type=click.Choice(["torch-export", "onnx"]),
    required=True,
    help="Format of the file.",
)
@click.option(
    "--data",
    required=True,
    metavar="NAME",
    help="Set of data.evaluation or data.test, or `train`, whose first batch has the inputs.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write; model.pt2 or model.onnx by default.",
)
@click.option(
    "--weights", metavar="HOOK", help="Hook whose weights to use, such as EMA, not the model's own."
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=1e-5,
    show_default=True,
    help="Largest absolute and relative difference from the outputs of the live model.",
)
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@_with(_weights_options[0], json_option)
def export(
    run_or_file: str,
    experiment: ExperimentArguments,
    format_: Literal["torch-export", "onnx"],
    data: str,
    out: Path | None,
    weights: str | None,
    tolerance: float,
    force: bool,
    best: bool,
    as_json: bool,
) -> None:
    """Export a run's model without the training code, with a dynamic batch size.

    \b
      robo-orchard-lab export runs/spirals --format torch-export --data val
      robo-orchard-lab export runs/spirals --format onnx --data val --out spirals.onnx --best

    The inputs are those with which the batch processor calls the model for the first batch of the
    set. The outputs are compared with those of the live model, for several batch sizes, before the
    file is written. `torch.export.load` or ONNX Runtime runs the file.
    """
    from robo_orchard_lab.experiment.model_export import SUFFIXES, check_packages, export_model

    check_packages(format_)
    out = out or Path(f"model{SUFFIXES[format_]}")
    if out.suffix != SUFFIXES[format_]:
        raise CommandError(f"expected a name that ends in {SUFFIXES[format_]}, found {str(out)!r}")
    check_target(out, force=force)
    config, saved = _load_weights(run_or_file, experiment, best)
    exported = export_model(
        *(config, saved, out), format=format_, data=data, weights=weights, tolerance=tolerance
    )
    if as_json:
        print_json({**asdict(exported), "path": str(exported.path)})
        return
    shapes = ", ".join(str(shape) for shape in exported.inputs)
    sizes = ", ".join(map(str, exported.batch_sizes))
    say(f"wrote {out}: inputs {shapes}, -1 for the batch")
    say(f"  largest difference from the live model {exported.difference:.2g}, batches of {sizes}")


def _load_weights(
    run_or_file: str, experiment: ExperimentArguments, best: bool
) -> tuple[ExperimentConfig, SavedWeights]:
    """Return the experiment and the weights of a run, or of the run of a file."""
    from robo_orchard_lab.experiment import evaluation
    from robo_orchard_lab.experiment.initial_weights import SavedWeights, exported_weights
    from robo_orchard_lab.experiment.run_checkpoints import find_checkpoints
    from robo_orchard_lab.experiment.run_folder import NoRunError, find_run

    path = Path(run_or_file)
    if path.suffix in FILE_SUFFIXES and path.is_file() and _run_folder_of(path) is None:
        config = experiment.load(path)
        path = folder = config.folder()
    else:
        found = find_run(path)
        folder = found.folder
        config = experiment.within(folder).load(found.config)
    try:
        checkpoints = find_checkpoints(path)
    except NoRunError:
        if best or (exported := exported_weights(folder)) is None:
            raise
        return config, exported
    if best:
        return config, evaluation.best_weights(config, folder, checkpoints)
    return config, SavedWeights.from_checkpoint(checkpoints.pick())


def _print_metrics(
    config: ExperimentConfig,
    saved: SavedWeights,
    sets: tuple[str, ...],
    weights: tuple[str, ...],
    max_batches: int | None,
    as_json: bool,
) -> None:
    from robo_orchard_lab.experiment import evaluation

    metrics = evaluation.evaluate(config, saved, sets, weights=weights, max_batches=max_batches)
    if not training.is_first_rank():
        return
    if as_json:
        print_json({"weights": str(saved.path), "step": saved.step, "metrics": metrics})
        return
    say(str(saved.path))
    print_table(["metric", "value"], [[name, f"{value:.6g}"] for name, value in metrics.items()])


@click.command("prove-resume", cls=ExperimentCommand)
@file_argument
@click.option(
    "--steps",
    type=click.IntRange(min=2),
    default=20,
    show_default=True,
    help="Length of both runs in steps, if FILE does not end them earlier.",
)
@click.option(
    "--stops",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Number of stops of the second run, evenly spread.",
)
@click.option("--kill", is_flag=True, help="Kill processes at random instants instead.")
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="World size of both runs.",
)
@click.option(
    "--file",
    "files",
    multiple=True,
    metavar="NAME",
    help="File in the run folder that must be identical at the end, such as metrics.jsonl; "
    "repeatable.",
)
@json_option
def prove_resume(
    file: Path,
    experiment: ExperimentArguments,
    steps: int,
    stops: int,
    kill: bool,
    processes: int,
    files: tuple[str, ...],
    as_json: bool,
) -> int:
    """Run FILE uninterrupted and with stops in new processes; compare both runs.

    \b
      robo-orchard-lab prove-resume experiment.yaml
      robo-orchard-lab prove-resume experiment.yaml --steps 50 --stops 10 --file metrics.jsonl
      robo-orchard-lab prove-resume experiment.yaml --kill

    Compared step by step, bit for bit: samples, losses, weights, the states of optimizer, LR
    scheduler, hooks and random generators, and events. Both runs use temporary folders. Exits with
    1 if the runs differ, and prints the first difference.
    """
    config = experiment.load(file)
    if kill and config.checkpoint is None:
        raise CommandError(
            "a run that is killed must save, and checkpoint is null", "remove checkpoint: null"
        )
    from robo_orchard_lab.experiment.catalogue import ExperimentTrust
    from robo_orchard_lab.experiment.dry_run import build_for_resume_proof, spread_stops
    from robo_orchard_lab.testing import StraightRunError
    from robo_orchard_lab.testing import prove_resume as prove

    at = spread_stops(steps, stops)
    trust = [*ExperimentTrust.of(experiment.trust).names]
    source = partial(build_for_resume_proof, document=config.to_dict(), trust=trust)
    try:
        proof = prove(source, steps, at, kill=kill, files=files, processes=processes)
    except StraightRunError as error:
        raise CommandError(str(error), exit_code=ExitCode.FAILED) from error
    if proof.steps <= at[-1]:
        note(
            f"the run ends after {proof.steps} steps; pass --steps {proof.steps} to stop it earlier"
        )
    if as_json:
        print_json({"passed": proof.passed, **asdict(proof)})
    else:
        say(str(proof))
    return ExitCode.DONE if proof.passed else ExitCode.FAILED
