"""Shared steps of the commands that export a model: ``checkpoint export`` and ``hub push``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robo_orchard_lab.cli.experiment_arguments import ExperimentArguments

if TYPE_CHECKING:
    from robo_orchard_lab.pipeline.model_card import ModelCardConfig

_CARD = (
    click.option("--name", metavar="TEXT", help="Name in the model card; by default the run's."),
    click.option("--license", metavar="ID", help="License of the weights, such as apache-2.0."),
    click.option(
        "--tag", "tags", multiple=True, metavar="TAG", help="Tag of the card; repeatable."
    ),
    click.option("--language", metavar="CODE", help="Language of the data, such as en."),
)


def card_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of the model card to a command: name, license, tags, language."""
    return reduce(lambda made, add: add(made), reversed(_CARD), command)


def card_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the card that the command line sets."""
    given = {name: value for name, value in options.items() if value}
    return {**given, "tags": [*given["tags"]]} if "tags" in given else given


def export_folder(
    path: str | Path,
    checkpoint: Path,
    folder: Path,
    card: Mapping[str, Any],
    trust: tuple[str, ...],
) -> None:
    """Write the model of a checkpoint of the run of a path to a folder, with its card."""
    from robo_orchard_lab.experiment.run_folder import NoRunError, find_run
    from robo_orchard_lab.sharing.export import card_of, export_checkpoint

    try:
        run = find_run(path)
    except NoRunError:  # the run of a script, whose model only the script builds
        fields = _card_config(card)
        export_checkpoint(checkpoint, folder, card=fields)
        return
    experiment = ExperimentArguments(trust).within(run.folder).load(run.config)
    export_checkpoint(
        checkpoint,
        folder,
        run_folder=run.folder,
        experiment=experiment,
        card=_card_config({**card_of(experiment).to_dict(), **card}),
    )


def _card_config(fields: Mapping[str, Any]) -> ModelCardConfig:
    from robo_orchard_lab.pipeline.model_card import ModelCardConfig

    return ModelCardConfig.from_dict(dict(fields))
