"""``checkpoint list``."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click

from robo_orchard_lab.cli.lazy_group import Command
from robo_orchard_lab.cli.output import (
    age_text,
    bytes_text,
    json_option,
    print_json,
    print_table,
    say,
)


@click.command("list", cls=Command)
@click.argument("path")
@json_option
def command(path: str, as_json: bool) -> None:
    """List the checkpoints of a run, in the order in which they were saved.

    PATH is the folder of a run, or of its checkpoints. A checkpoint is "complete" where all files
    are there with their sizes; `checkpoint verify` reads them as well.
    """
    found = _found(path)
    if as_json:
        print_json(found)
    elif not found:
        say(f"there are no checkpoints in {path}")
    else:
        print_table(["step", "epoch", "size", "saved", "state", "metrics"], map(_row, found))


def _found(path: str) -> list[dict[str, Any]]:
    from robo_orchard_lab.experiment.existing_run import find_checkpoints
    from robo_orchard_lab.pipeline.checkpoint import ReadLimits
    from robo_orchard_lab.pipeline.checkpoint.listing import RootListing, read_contents
    from robo_orchard_lab.pipeline.errors import CheckpointError

    root = find_checkpoints(path).root
    links = {
        (root / name).resolve().name: name
        for name in ("best", "last")
        if (root / name).is_symlink()
    }
    listing = RootListing(root, ReadLimits()).read()
    found: list[dict[str, Any]] = []
    for info in listing.infos:
        problem, progress = None, {}
        try:
            progress = dict(read_contents(info.path, tensors=False).progress)
        except CheckpointError as error:
            problem = str(error)
        found.append(
            {
                "path": str(info.path),
                "step": info.step,
                "epoch": progress.get("epoch_id"),
                "size_bytes": info.size_bytes,
                "saved_at": info.saved_at.isoformat(timespec="seconds"),
                "link": links.get(info.path.name),
                "metrics": dict(info.metrics),
                "problem": problem,
            }
        )
    for broken, problem in listing.broken:
        found.append({"path": str(broken), "step": None, "epoch": None, "problem": problem})
    return found


def _row(found: dict[str, Any]) -> list[str]:
    if found["step"] is None:
        return ["?", "", "", "", f"damaged: {found['problem']}", ""]
    state = "complete" if found["problem"] is None else f"damaged: {found['problem']}"
    saved_at = datetime.fromisoformat(found["saved_at"])
    return [
        str(found["step"]),
        "" if found["epoch"] is None else str(found["epoch"]),
        bytes_text(found["size_bytes"]),
        age_text((datetime.now(UTC) - saved_at).total_seconds()),
        state + (f", {found['link']}" if found["link"] else ""),
        ", ".join(
            f"{name} {value:g}"
            for name, value in found["metrics"].items()
            if not name.startswith(("perf/", "lr/"))  # which --json has
        ),
    ]
