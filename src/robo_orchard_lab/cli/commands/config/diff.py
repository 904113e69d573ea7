"""``config diff``: what two files differ in."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from robo_orchard_core.utils.config.parts import PART_KEYS
from robo_orchard_lab.cli.experiment_arguments import ExperimentArguments, ExperimentCommand
from robo_orchard_lab.cli.output import json_option, print_json, print_table, say

_LONGEST = 48  # characters of a value; JSON has them whole


@click.command("diff", cls=ExperimentCommand)
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@json_option
def command(before: Path, after: Path, as_json: bool, experiment: ExperimentArguments) -> None:
    """Show what BEFORE and AFTER differ in, and what that means for a run that goes on.

    A run of BEFORE that goes on as AFTER: harmless differences leave its weights as they would
    have been, others change the trajectory, and some are impossible. Fields that are typed go over
    AFTER alone.
    """
    from robo_orchard_lab.experiment.resume_diff import differences

    plain = replace(experiment, overrides=())
    found = differences(plain.load(before).to_dict(), experiment.load(after).to_dict())
    if as_json:
        print_json([{"field": each.field, **_plain(each)} for each in found])
    elif not found:
        say("no difference")
    else:
        rows = [
            (each.field, _written(each.before), _written(each.after), each.resume, each.why)
            for each in found
        ]
        print_table(["field", "before", "after", "resume", "because"], rows)


def _plain(difference: Any) -> dict[str, Any]:
    return {key: value for key, value in asdict(difference).items() if key != "path"}


def _written(value: Any) -> str:
    """In a few words; of a part, its class."""
    if isinstance(value, dict):
        for key in PART_KEYS:
            if isinstance(value.get(key), str):
                return f"{value[key].rpartition(':')[2]} ..."
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
