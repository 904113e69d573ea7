"""``checkpoint show``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from robo_orchard_lab.cli.lazy_group import Command
from robo_orchard_lab.cli.output import (
    bytes_text,
    count_text,
    json_option,
    print_json,
    print_table,
    say,
    visible,
)

if TYPE_CHECKING:
    from robo_orchard_lab.pipeline.checkpoint.listing import Contents


@click.command("show", cls=Command)
@click.argument("path")
@click.option("--best", is_flag=True, help="Take the best one, by the run's checkpoint.monitor.")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@json_option
def command(path: str, best: bool, tensors: bool, as_json: bool) -> None:
    """Show what is in a checkpoint: of which run it is, its files and their tensors.

    PATH is a checkpoint, or the folder of a run, for its newest whole one.
    """
    from robo_orchard_lab.experiment.existing_run import find_checkpoints
    from robo_orchard_lab.pipeline.checkpoint.listing import read_contents

    contents = read_contents(find_checkpoints(path).pick(best=best))
    if as_json:
        print_json(_plain(contents))
        return
    for name, text in _lines(contents):
        say(visible(f"{name + ':':<12} {text}"))
    say()
    rows = [
        [file.name, bytes_text(file.size_bytes), _tensors_text(file.tensors)]
        for file in contents.files
    ]
    print_table(["file", "size", "tensors"], rows)
    if tensors:
        say()
        listed = [
            [file.name, tensor.name, tensor.dtype, str([*tensor.shape])]
            for file in contents.files
            for tensor in file.tensors or ()
        ]
        print_table(["file", "tensor", "type", "shape"], listed)


def _lines(contents: Contents) -> Iterator[tuple[str, str]]:
    info, about = contents.info, contents.info.metadata
    yield "checkpoint", str(info.path)
    yield "step", str(info.step)
    if contents.progress:
        yield "progress", ", ".join(f"{name} {n}" for name, n in contents.progress.items())
    yield "saved", info.saved_at.isoformat(sep=" ", timespec="seconds")
    yield "by", "1 process" if info.ranks == 1 else f"{info.ranks} processes"
    if reason := about.get("reason"):
        yield "because of", str(reason)
    for name, value in info.metrics.items():
        yield name, f"{value:g}"
    if command := about.get("command"):
        yield "command", str(command)
    if isinstance(versions := about.get("versions"), dict):
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    if isinstance(git := about.get("git"), dict):
        yield "git", f"{git.get('commit')}{', with changes' if git.get('changed') else ''}"
    yield "size", bytes_text(info.size_bytes)


def _tensors_text(tensors: Any) -> str:
    if tensors is None:
        return ""
    numbers = sum(math.prod(tensor.shape) for tensor in tensors)
    return f"{count_text(len(tensors), 'tensor')}, {count_text(numbers, 'number')}"


def _plain(contents: Contents) -> dict[str, Any]:
    info = contents.info
    return {
        "path": str(info.path),
        "step": info.step,
        "progress": dict(contents.progress),
        "saved_at": info.saved_at.isoformat(timespec="seconds"),
        "ranks": info.ranks,
        "digest": info.digest,
        "size_bytes": info.size_bytes,
        "metrics": dict(info.metrics),
        "metadata": info.metadata,
        "files": [
            {
                "name": file.name,
                "size_bytes": file.size_bytes,
                "part": file.part,
                "rank": file.rank,
                "tensors": None
                if file.tensors is None
                else [
                    {"name": t.name, "dtype": t.dtype, "shape": [*t.shape]} for t in file.tensors
                ],
            }
            for file in contents.files
        ],
    }
