"""Which checkpoint of a root is meant."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from robo_orchard_lab.pipeline.checkpoint.checkpoint_info import CheckpointInfo
from robo_orchard_lab.pipeline.checkpoint.folder_names import BEST, LAST, step_folder, step_of
from robo_orchard_lab.pipeline.checkpoint.listing import Listing
from robo_orchard_lab.pipeline.checkpoint.retention import Retention
from robo_orchard_lab.pipeline.errors import CheckpointError


def find_checkpoint(
    which: int | str | os.PathLike[str], root: Path, listing: Listing, retention: Retention
) -> Path:
    """The path of "last", "best", a step, or what is a path already.

    What is damaged is found as well, since no other may be taken in its place.

    Raises:
        CheckpointError: there is no such one in the root.
    """
    if isinstance(which, int):
        return _of_step(which, root, listing.infos)
    if which == LAST:
        return _last(root, listing)
    if which == BEST:
        return _best(root, listing.infos, retention)
    return Path(which)


def _of_step(step: int, root: Path, infos: Sequence[CheckpointInfo]) -> Path:
    path = root / step_folder(step)
    if not os.path.lexists(path):
        steps = ", ".join(str(info.step) for info in infos) or "none"
        raise CheckpointError(f"{root} has no step {step}; it has: {steps}")
    return path


def _last(root: Path, listing: Listing) -> Path:
    """By the serial, unless the link or, without one, the highest step leads to a damaged one."""
    linked = _linked(root / LAST)
    broken = [path for path, _ in listing.broken]
    if linked in broken:
        return linked
    if not listing.infos:
        if broken:
            return broken[-1]
        raise CheckpointError(f"there is no checkpoint in {root}")
    newest = listing.infos[-1].path
    if linked is None:
        return max([newest, *broken], key=lambda path: path.name.zfill(32))
    return newest


def _best(root: Path, infos: Sequence[CheckpointInfo], retention: Retention) -> Path:
    if retention.monitor is not None:
        best = retention.best(infos)
        if not best:
            raise CheckpointError(f"no checkpoint in {root} has the metric {retention.monitor!r}")
        return best[0].path
    linked = _linked(root / BEST)
    if linked is None:
        raise CheckpointError(
            f"{root} does not say which checkpoint is best; give the store a Retention(monitor=...)"
        )
    return linked


def _linked(link: Path) -> Path | None:
    """The checkpoint beside a link that it leads to."""
    with suppress(OSError):
        target = os.readlink(link)
        if step_of(target) is not None:
            return link.with_name(target)
    return None
