"""``train --dry-run`` and ``train --debug-fast``: what is told of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from robo_orchard_lab.cli.amounts import bytes_text, count_text
from robo_orchard_lab.cli.errors import CommandError
from robo_orchard_lab.cli.output import print_json, print_table, say

if TYPE_CHECKING:
    from robo_orchard_lab.cli.training import Beginning
    from robo_orchard_lab.experiment.config import ExperimentConfig
    from robo_orchard_lab.experiment.dry_run import DryRun


def show_dry_run(experiment: ExperimentConfig, begins: Beginning, *, as_json: bool) -> None:
    """Try an experiment with one batch, and tell what it would be.

    Raises:
        CommandError: it is started as a job of several processes.
    """
    from robo_orchard_lab.experiment.dry_run import dry_run

    _check_alone("--dry-run")
    found = dry_run(experiment)
    if as_json:
        print_json({**_plain(found), "begins_at": begins.step})
        return
    for name, text in _lines(begins, found):
        say(f"{name:<12} {text}")
    if found.hooks:
        say()
        rows = [
            [hook.hook, hook.field, hook.schedule, "?" if hook.times is None else f"{hook.times:,}"]
            for hook in found.hooks
        ]
        print_table(["hook", "field", "schedule", "times"], rows)
    say()
    say("nothing was written")


def show_fast_run(experiment: ExperimentConfig, *, as_json: bool) -> None:
    """Run two steps of everything, and tell what was done.

    Raises:
        CommandError: it is started as a job of several processes.
    """
    from robo_orchard_lab.experiment.dry_run import fast_run

    _check_alone("--debug-fast")
    done = fast_run(experiment)
    if as_json:
        print_json({"done": done})
        return
    for line in done:
        say(line)
    say("nothing of it was kept")


def _check_alone(option: str) -> None:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise CommandError(f"{option} is for one process; leave torchrun out")


def _lines(begins: Beginning, found: DryRun) -> Iterator[tuple[str, str]]:
    yield "run folder", str(found.run_folder)
    changes = ", ".join(change.place for change in begins.changes)
    anew = "anew" if begins.step is None else f"at step {begins.step} of the run in there"
    yield "begins", anew + (f", with other {changes}" if changes else "")
    yield "device", found.device
    frozen = found.parameters - found.trained_parameters
    trained = f", {frozen:,} of them frozen" if frozen else ""
    yield "model", count_text(found.parameters, "parameter") + trained
    length = found.length
    if length is None:
        yield "run", "as long as the data is, which has no length"
    else:
        yield "epoch", count_text(length.steps_per_epoch, "step")
        parts = [(length.epochs, "epoch"), (length.steps, "step"), (length.updates, "update")]
        yield "run", ", ".join(count_text(number, thing) for number, thing in parts)
    if found.loss is not None:
        yield "loss", f"{found.loss:.6g} on the first batch"
    for name, loss in found.evaluated.items():
        yield f"  {name}", f"{loss:.6g} on its first batch"
    memory = found.memory
    yield (
        "memory",
        f"parameters {bytes_text(memory.parameters)}, gradients {bytes_text(memory.gradients)}, "
        f"optimizer {bytes_text(memory.optimizer)}; at most {bytes_text(memory.peak)} in use "
        + ("by this process" if memory.peak_on == "process" else f"on {memory.peak_on}"),
    )


def _plain(found: DryRun) -> dict[str, Any]:
    length = found.length
    return {
        **asdict(found),
        "run_folder": str(found.run_folder),
        "evaluated": dict(found.evaluated),
        "length": None
        if length is None
        else {
            "epochs": length.epochs,
            "steps": length.steps,
            "updates": length.updates,
            "steps_per_epoch": length.steps_per_epoch,
        },
    }
