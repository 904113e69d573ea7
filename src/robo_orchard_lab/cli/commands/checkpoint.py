"""Commands ``checkpoint`` list, show, verify, export and prune."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robo_orchard_core.utils.logging import one_line
from robo_orchard_lab.cli.commands import CommandGroup
from robo_orchard_lab.cli.errors import CommandError, ExitCode, check_target
from robo_orchard_lab.cli.experiment_arguments import trust_option
from robo_orchard_lab.cli.output import (
    age_text,
    bytes_text,
    count_text,
    json_option,
    note,
    print_json,
    print_table,
    say,
    styled,
)
from robo_orchard_lab.cli.sharing import card_fields, card_options, export_folder

if TYPE_CHECKING:
    from robo_orchard_lab.experiment.run_checkpoints import RunCheckpoints
    from robo_orchard_lab.pipeline.checkpoint.listing import Contents

_COUNT = click.IntRange(min=1)

path_argument = click.argument("path")
best_option = click.option(
    "--best", is_flag=True, help="Use the best checkpoint, by the run's checkpoint.monitor."
)


@click.group("checkpoint", cls=CommandGroup)
def checkpoint() -> None:
    """List, show, verify, export and prune checkpoints.

    \b
      robo-orchard-lab checkpoint list runs/spirals
      robo-orchard-lab checkpoint export runs/spirals weights.safetensors --best

    PATH is the folder of a run, also of a script's run, the folder of its checkpoints, or a
    checkpoint. Checkpoints of a stranger are safe to read: no code that they name is imported.
    """


@checkpoint.command("list")
@path_argument
@json_option
def list_(path: str, as_json: bool) -> None:
    """List the checkpoints of a run, oldest first.

    \b
      robo-orchard-lab checkpoint list runs/spirals

    PATH is the folder of a run, or of its checkpoints. A checkpoint is "complete" if all files
    exist with the right sizes; `checkpoint verify` also compares their digests. "not finite" names
    the first weight or optimizer state with a NaN or infinity, or the losses since the last save.
    """
    from robo_orchard_lab.experiment.run_checkpoints import find_checkpoints
    from robo_orchard_lab.pipeline.checkpoint.listing import RootListing, read_contents
    from robo_orchard_lab.pipeline.checkpoint.manifest import ReadLimits
    from robo_orchard_lab.pipeline.errors import CheckpointError

    root = find_checkpoints(path).root
    links = dict[str, str]()
    for link_name in ("best", "last"):
        if (root / link_name).is_symlink():
            target = (root / link_name).resolve().name
            links[target] = f"{links[target]}, {link_name}" if target in links else link_name
    listing = RootListing(root, ReadLimits()).read()
    found: list[dict[str, Any]] = []
    rows: list[list[str]] = []
    for info in listing.infos:
        problem, epoch, link = None, None, links.get(info.path.name)
        try:
            epoch = read_contents(info.path, tensors=False).progress.get("epoch_id")
        except CheckpointError as error:
            problem = str(error)
        found.append(
            {
                "path": str(info.path),
                "step": info.step,
                "epoch": epoch,
                "size_bytes": info.size_bytes,
                "saved_at": info.saved_at.isoformat(timespec="seconds"),
                "link": link,
                "non_finite": info.non_finite,
                "metrics": dict(info.metrics),
                "problem": problem,
            }
        )
        states = ["complete" if problem is None else f"damaged: {one_line(problem)}"]
        states += [f"not finite: {one_line(name)}" for name in (info.non_finite or ())[:1]]
        metrics = (
            one_line(f"{name} {value:g}")
            for name, value in info.metrics.items()
            if not name.startswith(("perf/", "lr/"))  # --json has them
        )
        rows.append(
            [
                str(info.step),
                "" if epoch is None else one_line(epoch),
                bytes_text(info.size_bytes),
                age_text((datetime.now(UTC) - info.saved_at).total_seconds()),
                ", ".join([*states, *([link] if link else [])]),
                ", ".join(metrics),
            ]
        )
    for broken, problem in listing.broken:
        found.append({"path": str(broken), "step": None, "epoch": None, "problem": problem})
        rows.append(["?", "", "", "", f"damaged: {one_line(problem)}", ""])
    if as_json:
        print_json(found)
    elif not rows:
        say(f"there are no checkpoints in {path}")
    else:
        print_table(["step", "epoch", "size", "saved", "state", "metrics"], rows)


@checkpoint.command("show")
@path_argument
@best_option
@click.option("--tensors", is_flag=True, help="List every tensor.")
@json_option
def show(path: str, best: bool, tensors: bool, as_json: bool) -> None:
    """Show the origin, the files and the tensors of a checkpoint.

    \b
      robo-orchard-lab checkpoint show runs/spirals --best
      robo-orchard-lab checkpoint show runs/spirals/checkpoints/step_00000300

    PATH is a checkpoint, or the folder of a run, for its newest intact checkpoint.
    """
    from robo_orchard_lab.experiment.run_checkpoints import find_checkpoints
    from robo_orchard_lab.pipeline.checkpoint.listing import read_contents

    contents = read_contents(find_checkpoints(path).pick(best=best))
    if as_json:
        info = contents.info
        texts = {"path": str(info.path), "saved_at": info.saved_at.isoformat(timespec="seconds")}
        progress, files = dict(contents.progress), [asdict(file) for file in contents.files]
        print_json({**asdict(info), **texts, "progress": progress, "files": files})
        return
    for name, text in _lines(contents):
        say(one_line(f"{name + ':':<12} {text}"))
    rows = []
    for file in contents.files:
        summary = ""
        if file.tensors is not None:
            elements = sum(math.prod(tensor.shape) for tensor in file.tensors)
            summary = (
                f"{count_text(len(file.tensors), 'tensor')}, {count_text(elements, 'element')}"
            )
        rows.append([file.name, bytes_text(file.size_bytes), summary])
    say()
    print_table(["file", "size", "tensors"], rows)
    if tensors:
        say()
        all_tensors = (
            [file.name, one_line(tensor.name), tensor.dtype, str([*tensor.shape])]
            for file in contents.files
            for tensor in file.tensors or ()
        )
        print_table(["file", "tensor", "type", "shape"], all_tensors)


def _lines(contents: Contents) -> Iterator[tuple[str, str]]:
    info, metadata = contents.info, contents.info.metadata
    yield "checkpoint", str(info.path)
    yield "step", str(info.step)
    if contents.progress:
        yield "progress", ", ".join(f"{name} {n}" for name, n in contents.progress.items())
    yield "saved", info.saved_at.isoformat(sep=" ", timespec="seconds")
    yield "by", "1 process" if info.ranks == 1 else f"{info.ranks} processes"
    if reason := metadata.get("reason"):
        yield "reason", str(reason)
    if info.non_finite is None:
        yield "finite", "unknown: it was not checked"
    else:
        yield "finite", f"not {', '.join(info.non_finite)}" if info.non_finite else "yes"
    for name, value in info.metrics.items():
        yield name, f"{value:g}"
    if command := metadata.get("command"):
        yield "command", str(command)
    if isinstance(versions := metadata.get("versions"), dict):
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    if isinstance(git := metadata.get("git"), dict):
        yield "git", f"{git.get('commit')}{', with changes' if git.get('changed') else ''}"
    yield "size", bytes_text(info.size_bytes)


@checkpoint.command("verify")
@path_argument
@json_option
def verify(path: str, as_json: bool) -> int:
    """Verify the digest of every file of checkpoints.

    \b
      robo-orchard-lab checkpoint verify runs/spirals

    PATH is the folder of a run, of its checkpoints, or a checkpoint. Exits with 1 if a checkpoint
    is damaged, or if there is none.
    """
    from robo_orchard_lab.experiment.run_checkpoints import find_checkpoints
    from robo_orchard_lab.pipeline.checkpoint import CheckpointStore

    checkpoints = find_checkpoints(path)
    found = [*CheckpointStore(checkpoints.root).verify(checkpoints.chosen)]
    if as_json:
        print_json([{"path": str(each.path), "problem": each.problem} for each in found])
    else:
        for each in found:
            is_intact = each.problem is None
            state = styled("intact", "green") if is_intact else styled("damaged", "red")
            problem = "" if each.problem is None else f": {one_line(each.problem)}"
            say(f"{one_line(each.path)}: {state}{problem}")
        if not found:
            say(f"there are no checkpoints in {checkpoints.root}")
    are_intact = found and all(each.problem is None for each in found)
    return ExitCode.DONE if are_intact else ExitCode.FAILED


@checkpoint.command("export")
@path_argument
@click.argument("target", default="model.safetensors", type=click.Path())
@best_option
@card_options
@click.option("--force", is_flag=True, help="Replace TARGET if it exists.")
@trust_option
@json_option
def export(
    path: str,
    target: str,
    best: bool,
    force: bool,
    trust: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Write the model of a checkpoint to a folder, or its weights to one safetensors file.

    \b
      robo-orchard-lab checkpoint export runs/spirals weights.safetensors
      robo-orchard-lab checkpoint export runs/spirals my_model --license apache-2.0

    PATH is a checkpoint, or the folder of a run, for its newest intact checkpoint. TARGET is
    model.safetensors by default; `safetensors.torch.load_file` reads it, with the parameter names
    of the plain model. Sharded weights are merged.

    A folder has the weights, config.json, and the model card README.md. `from_pretrained` reads the
    models of Transformers, Diffusers and LeRobot, `load_policy` a policy. The run's experiment file
    builds the model; code of the file needs --trust. `robo-orchard-lab export` writes the model for
    torch.export or ONNX Runtime.
    """
    from robo_orchard_lab.experiment.run_checkpoints import find_checkpoints
    from robo_orchard_lab.pipeline.checkpoint import export_weights

    file = Path(target)
    is_folder = file.is_dir() or not file.suffix or target.endswith("/")
    if not is_folder and file.suffix != ".safetensors":
        raise CommandError(
            f"expected a name that ends in .safetensors, or a folder, found {target!r}",
            "end the name of a new folder with /",
        )
    card = card_fields(options)
    if card and not is_folder:
        raise CommandError(f"{target} has no model card", "name a folder")
    is_empty = is_folder and file.is_dir() and not any(file.iterdir())
    check_target(file, force=force or is_empty)
    found = find_checkpoints(path).pick(best=best)
    if is_folder:
        export_folder(path, found, file, card, trust)
    else:
        export_weights(found, file)
    if as_json:
        print_json({"checkpoint": str(found), "folder" if is_folder else "file": str(file)})
    else:
        say(f"wrote the {'model' if is_folder else 'weights'} of {found} to {file}")


@checkpoint.command("prune")
@path_argument
@click.option("--keep-last", type=_COUNT, help="Keep this many of the newest.")
@click.option("--keep-every", type=_COUNT, help="Keep each multiple of this many steps.")
@click.option("--keep-best", type=_COUNT, help="Keep this many of the best by --monitor.")
@click.option("--monitor", help="Metric for --keep-best, such as eval/val/loss.")
@click.option("--mode", type=click.Choice(["min", "max"]), help="Best value of --monitor.")
@click.option("--dry-run", is_flag=True, help="List the checkpoints to remove; remove nothing.")
@click.option("--yes", is_flag=True, help="Remove the checkpoints, also in a terminal.")
@json_option
def prune(path: str, dry_run: bool, yes: bool, as_json: bool, **rules: Any) -> None:
    """Remove the checkpoints that no rule keeps, but never the newest intact and healthy one.

    \b
      robo-orchard-lab checkpoint prune runs/spirals --keep-last 2
      robo-orchard-lab checkpoint prune runs/spirals --keep-last 2 --yes

    In a terminal, the command lists the checkpoints and removes them only with --yes. With its
    output in a file or a pipe, as in a script, it removes them without --yes.

    PATH is the folder of a run, or of its checkpoints. A rule without an option is that of
    `checkpoint` in the run's file; so is --mode, for the same metric. Refused while the run is
    running.
    """
    from robo_orchard_lab.experiment.run_checkpoints import find_checkpoints
    from robo_orchard_lab.pipeline.checkpoint import CheckpointStore

    checkpoints = find_checkpoints(path)
    options = {name: value for name, value in rules.items() if value is not None}
    _check_metric(options, checkpoints)
    retention = checkpoints.retention(**options)
    if retention.keep_last is None:
        raise CommandError(
            f"no rule says how many checkpoints in {checkpoints.root} to keep", "pass --keep-last N"
        )
    store = CheckpointStore(checkpoints.root, retention=retention)
    is_preview = not (yes or dry_run) and sys.stdout.isatty()
    dry_run = dry_run or is_preview
    if dry_run:
        decisions = store.prune(dry_run=True)
    else:
        with store:
            decisions = store.prune()
    if as_json:
        print_json([{"path": str(d.path), "removed": d.removed, "why": d.why} for d in decisions])
    else:
        removed = "would be removed" if dry_run else "removed"
        rows = [[d.path.name, removed if d.removed else "kept", one_line(d.why)] for d in decisions]
        print_table(["checkpoint", "", "why"], rows)
    if is_preview and any(decision.removed for decision in decisions):
        note("nothing was removed; pass --yes to remove these checkpoints")


def _check_metric(options: dict[str, Any], checkpoints: RunCheckpoints) -> None:
    """Refuse options for the best checkpoints that would keep other ones."""
    from robo_orchard_core.utils.config.errors import suggest_name
    from robo_orchard_lab.pipeline.checkpoint import CheckpointStore

    if options.keys().isdisjoint({"keep_best", "monitor", "mode"}):
        return  # the rules of the run, which it validated
    policy = checkpoints.policy
    monitor = options.get("monitor", policy.get("monitor"))
    infos = CheckpointStore(checkpoints.root).list()
    names = sorted({name for info in infos for name in info.metrics})
    if monitor is None:
        known = ", ".join(names) or "none"
        raise CommandError(
            "--keep-best and --mode need a metric",
            f"pass --monitor NAME; metrics of the checkpoints: {known}",
        )
    if not (options.get("keep_best") or policy.get("keep_best")):
        raise CommandError("--monitor and --mode only decide what --keep-best keeps; pass both")
    if monitor not in names:
        raise CommandError(
            f"no checkpoint in {checkpoints.root} has the metric {monitor!r}",
            suggest_name(str(monitor), names, "metrics of the checkpoints:"),
        )
    saved = policy.get("mode") if monitor == policy.get("monitor") else None
    if options.get("mode", saved) is None:
        raise CommandError(
            f"nothing says if the smallest or the largest {monitor} is the best",
            "pass --mode min or --mode max",
        )
