"""Images, videos, text and tables of a run: `Report`, which hooks call, and `Media`, its records.

A record goes to every sink with a method ``write_media(media)``, and to the folder ``media`` in the
run folder, which needs no tracker: as a file, and as a line of ``index.jsonl``.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from robo_orchard_core.utils.config.errors import suggest_name
from robo_orchard_core.utils.hook import RemovableHandle
from robo_orchard_core.utils.untrusted_text import path_problem
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.pixels import (
    MediaError,
    Pixels,
    mp4,
    png,
    render,
    to_frames,
    to_image,
)
from robo_orchard_lab.pipeline.progress import TrainerProgress
from robo_orchard_lab.pipeline.run.durable import (
    RetriedWrite,
    find_leftovers,
    make_folder,
    replace_file,
)

logger = logging.getLogger(__name__)

MediaKind: TypeAlias = Literal["image", "video", "text", "table", "hyperparameters"]
Hyperparameter: TypeAlias = bool | int | float | str


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of plain values under column names."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Media:
    """Record of one image, video, text, table or set of hyperparameters."""

    kind: MediaKind
    name: str
    """Name, with slashes between groups."""
    step: int
    """Number of completed steps, as in records of metrics."""
    content: Any
    """Pixels as uint8, (height, width, channels) of an image, with the frames first of a video;
    a text; a :class:`Table`; a dict of hyperparameters."""
    caption: str | None = None
    fps: float | None = None
    """Frames per second of a video."""


Receiver: TypeAlias = Callable[[Media], None]


class Report:
    """Images, videos, text, tables and hyperparameters of a run; hooks call ``args.report``.

    Only the main process reports, unless ``all_ranks=True``: then the other ranks write files into
    ``media/rank<n>``. Without a run folder and a sink for media, a call does nothing.

    An object is converted at the call. A tensor on a device is copied to the host at once, which
    waits for the device. An object that can't be reported, such as an image with NaN or of a wrong
    shape, and a file or tracker that can't be written, are dropped: the first problem of each name
    or destination is logged as an error, and the training continues.
    """

    def __init__(self, progress: TrainerProgress, folder: Path | None, rank: int = 0) -> None:
        self._progress = progress
        self._rank = rank
        self._files: MediaFolder | None = None
        if folder is not None:
            parts = ("media",) if rank == 0 else ("media", f"rank{rank}")
            self._files = MediaFolder(folder.joinpath(*parts))
        self._receivers: dict[str, Receiver] = {}
        self._trackers: dict[str, Any] = {}
        self._early: list[Media] | None = None  # since the begin of the loop, for later sinks
        self._problems: set[str] = set()
        self.hyperparameters: Mapping[str, Hyperparameter] = {}
        """Hyperparameters that trackers store at their start; those of an experiment file."""

    @property
    def is_wanted(self) -> bool:
        """True if a call has an effect on this rank; check it before costly preparations."""
        return self._rank == 0 and (self._files is not None or bool(self._receivers))

    def add_image(
        self, name: str, image: Any, caption: str | None = None, *, all_ranks: bool = False
    ) -> None:
        """Report an image, or a batch of images as one grid.

        Args:
            name: name, such as ``eval/samples``.
            image: tensor, array or PIL image, of uint8, bool, or floats from 0 to 1. Shapes:
                (H, W), (C, H, W), (H, W, C), or the last two for each image of a batch, with 1, 3
                or 4 channels.
                If both orders fit, a tensor has its channels first, an array last.
            caption: text shown with the image.
            all_ranks: also write the images of the other ranks, to their files.
        """
        self._add("image", name, lambda: to_image(image), caption, all_ranks)

    def add_video(
        self,
        name: str,
        frames: Any,
        caption: str | None = None,
        *,
        fps: float = 10.0,
        all_ranks: bool = False,
    ) -> None:
        """Report frames of shape (T, C, H, W) or (T, H, W, C), with values as of an image.

        The file is an MP4 if PyAV is installed, else an animated PNG, which is many times larger.
        """

        def convert() -> Pixels:
            if not isinstance(fps, int | float) or not 0 < fps < 1000:
                raise MediaError(f"expected 0 < fps < 1000, found {fps!r:.60}")
            return to_frames(frames)

        self._add("video", name, convert, caption, all_ranks, fps)

    def add_figure(
        self, name: str, figure: Any, caption: str | None = None, *, all_ranks: bool = False
    ) -> None:
        """Report a matplotlib figure as an image; the figure stays open."""
        self._add("image", name, lambda: render(figure), caption, all_ranks)

    def add_text(
        self, name: str, text: str, caption: str | None = None, *, all_ranks: bool = False
    ) -> None:
        """Report a text, which trackers may render as Markdown."""

        def convert() -> str:
            if not isinstance(text, str):
                raise MediaError(f"expected a text, found {type(text).__name__}; pass str(...)")
            return text

        self._add("text", name, convert, caption, all_ranks)

    def add_table(
        self,
        name: str,
        rows: Sequence[Mapping[str, Any]] | Sequence[Sequence[Any]],
        columns: Sequence[str] | None = None,
        caption: str | None = None,
        *,
        all_ranks: bool = False,
    ) -> None:
        """Report rows: mappings by column, or sequences of values in the order of ``columns``."""
        self._add("table", name, lambda: to_table(rows, columns), caption, all_ranks)

    def add_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Report hyperparameters: numbers and texts by name, with nested mappings."""

        def convert() -> dict[str, Hyperparameter]:
            if not isinstance(values, Mapping):
                raise MediaError(f"expected a mapping by name, found {type(values).__name__}")
            return flatten(values)

        self._add("hyperparameters", "hyperparameters", convert, None, False)

    def tracker(self, name: str) -> Any:
        """Return the live tracker of a sink, Accelerate's ``GeneralTracker``; None on other ranks.

        ``args.report.tracker("tensorboard").tracker`` is TensorBoard's ``SummaryWriter``, a W&B
        run, and so on. Trackers live from the begin of the loop, in a ``before`` of ``on_loop`` of
        a hook after the ``MetricsLogger``, to its end.

        Raises:
            PipelineConfigError: no sink has a tracker of this name; the message lists them.
        """
        if self._rank:
            return None
        if name not in self._trackers:
            raise PipelineConfigError(
                f"no live tracker is named {name!r}; "
                f"{suggest_name(name, self._trackers, 'live trackers:')}; add "
                "TrackerSinkConfig(trackers=[...]) to the sinks of a MetricsLogger"
            )
        return self._trackers[name]

    def drop(self, name: str, problem: object) -> None:
        """Log that an object is not reported, once for each name, with an error or a text."""
        if name not in self._problems:
            self._problems.add(name)
            if isinstance(problem, Exception) and not isinstance(problem, MediaError):
                problem = f"{type(problem).__name__}: {problem}"
            logger.error(
                "report of %r at step %d is dropped, and the training continues: %s; further "
                "problems of this name are not logged",
                *(name, self._progress.steps_done, problem),
            )

    # --- for the trainer and sinks ---------------------------------------------------------------

    def begin(self) -> None:
        """Begin a loop: drop records after the current step from the index of files."""
        self._early = []
        if self._files is not None:
            self._files.open(self._progress.global_step_id)

    def begun(self) -> None:
        """Note that all sinks are open."""
        self._early = None

    def attach(self, name: str, receiver: Receiver) -> RemovableHandle:
        """Pass all records to a function, those since the begin of the loop included."""
        self._receivers[name] = receiver
        for media in self._early or ():
            self._send(media, name, receiver)
        return _removal(self._receivers, name)

    def attach_tracker(self, name: str, tracker: Any) -> RemovableHandle:
        """Make a live tracker known by its name."""
        self._trackers[name] = tracker
        return _removal(self._trackers, name)

    def _add(
        self,
        kind: MediaKind,
        name: Any,
        convert: Callable[[], Any],
        caption: str | None,
        all_ranks: bool,
        fps: float | None = None,
    ) -> None:
        is_own_file = all_ranks and self._files is not None
        if not (self.is_wanted or is_own_file or (self._rank == 0 and self._early is not None)):
            return
        try:
            if not isinstance(name, str):
                name = type(name).__name__
                raise MediaError(f"expected a name such as 'eval/samples', found a value of {name}")
            if problem := path_problem(name) if PurePath(name).parts else "is empty":
                raise MediaError(
                    f"expected a name such as 'eval/samples', found {name!r:.60}, which {problem}"
                )
            media = Media(kind, name, self._progress.steps_done, convert(), caption, fps)
        except Exception as error:  # of any object; the training continues without the record
            self.drop(f"{name!s:.100}", error)
            return
        if self._files is not None:
            self._send(media, "the run folder", self._files.write)
        if self._early is not None and self._rank == 0:
            self._early.append(media)
        for owner, receiver in self._receivers.items():
            self._send(media, owner, receiver)

    def _send(self, media: Media, owner: str, receiver: Receiver) -> None:
        try:
            receiver(media)
        except Exception as error:  # the training continues without the record
            self.drop(f"{media.name} by {owner}", error)


def _removal(registry: dict[str, Any], name: str) -> RemovableHandle:
    def remove() -> None:
        registry.pop(name, None)

    return RemovableHandle(remove)


class MediaFolder:
    """Files of media, and their index.

    A file is on the disk before its line is in the index. A file that can't be written, as on a
    full disk, is lost: the first failure is logged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index = folder / "index.jsonl"
        self._lines: dict[str, bytes] = {}  # by file
        self._counts = Counter[str]()  # of this step's records by name, in this process
        self._counted_step = 0
        self._writes = RetriedWrite("report", logger)

    def open(self, step: int) -> None:
        """Keep the records up to a step; a new run moves the folder of another run aside."""
        self._counts.clear()
        try:
            for left in find_leftovers(self._folder, within="**/"):
                if self._of_this_rank(left):
                    left.unlink(missing_ok=True)
            found = read_index(self._index)
            if found and step == 0 and self._folder.name == "media":  # with those of all ranks
                number = 1
                while (aside := self._folder.with_name(f"media.aside-{number}")).exists():
                    number += 1
                self._folder.rename(aside)
                logger.info("moved the media of another run to %s", aside)
                found = []
            kept = [entry for entry in found if 0 < step >= entry["step"]]
            self._lines = {entry["file"]: _to_line(entry) for entry in kept}
            lines = b"".join(self._lines.values())
            if self._index.exists() and self._index.read_bytes() != lines:
                replace_file(self._index, lines)
        except OSError as error:
            self._writes.failed(f"reading {self._index}", error, "the run continues")

    def _of_this_rank(self, path: Path) -> bool:
        """Return False for a path in another rank's folder, ``media/rank<n>``."""
        return re.match(r"rank\d+/", path.relative_to(self._folder).as_posix()) is None

    def write(self, media: Media) -> None:
        """Write a file, and then its line, except for a line that a resumed run has already."""
        if media.step != self._counted_step:
            self._counts.clear()
            self._counted_step = media.step
        self._counts[media.name] += 1
        number = self._counts[media.name]
        suffix = f"-{number}" if number > 1 else ""
        kind, content = encode(media)
        file = f"{media.name}/{media.step:08d}{suffix}.{kind}"
        entry: dict[str, Any] = {"step": media.step, "kind": media.kind, "name": media.name}
        entry["file"] = file
        for name in ("caption", "fps"):
            if (value := getattr(media, name)) is not None:
                entry[name] = value
        path, line = self._folder / file, _to_line(entry)
        try:
            make_folder(path.parent)
            replace_file(path, content)
            if self._lines.get(file) != line:
                self._append(line)
                self._lines[file] = line
            self._writes.succeeded(path)
        except OSError as error:
            self._writes.failed(f"writing {path}", error, "the run continues without the file")

    def _append(self, line: bytes) -> None:
        with open(self._index, "ab", buffering=0) as index:
            end = index.tell()
            try:
                rest = memoryview(line)
                while rest.nbytes:
                    rest = rest[index.write(rest) :]
                os.fsync(index.fileno())
            except OSError:
                index.truncate(end)
                raise


def read_index(path: Path) -> list[dict[str, Any]]:
    """Return the entries of an index, the last one of each file; incomplete lines are ignored.

    Raises:
        OSError: the index exists and can't be read.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        try:
            entry = json.loads(line)
            found[str(entry["file"])] = {**entry, "step": int(entry["step"])}
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return [*found.values()]


def _to_line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode() + b"\n"


# --- conversion and encoding ---------------------------------------------------------------------


def to_table(rows: Any, columns: Sequence[str] | None) -> Table:
    """Return a table of plain values; a tensor of one element becomes a number."""
    rows = list(rows)
    if columns is None:
        if not rows or not all(isinstance(row, Mapping) for row in rows):
            raise MediaError(
                "expected rows that are mappings, or the names of columns; pass columns=[...]"
            )
        columns = [*dict.fromkeys(str(name) for row in rows for name in row)]
    cells = []
    for row in rows:
        values = [row.get(name) for name in columns] if isinstance(row, Mapping) else [*row]
        if len(values) != len(columns):
            raise MediaError(f"expected {len(columns)} values in each row, found {len(values)}")
        cells.append(tuple(map(_to_cell, values)))
    return Table(tuple(map(str, columns)), tuple(cells))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Hyperparameter]:
    """Flatten nested mappings to dotted names; other values become text, and None is omitted.

    >>> flatten({"lr": 0.1, "model": {"width": 8, "kind": None}, "betas": [0.9, 0.95]})
    {'lr': 0.1, 'model.width': 8, 'betas': '[0.9, 0.95]'}
    """
    found: dict[str, Hyperparameter] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{name}.")
        elif value is not None:
            cell = _to_cell(value)
            found[f"{prefix}{name}"] = cell if cell is not None else ""
    return found


def _to_cell(value: Any) -> Hyperparameter | None:
    if isinstance(value, torch.Tensor | np.ndarray | np.generic) and math.prod(value.shape) == 1:
        value = value.item()
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def encode(media: Media) -> tuple[str, bytes]:
    """Return the suffix and the contents of a record's file."""
    content = media.content
    if media.kind == "image":
        return "png", png(content[None])
    if media.kind == "video":
        found = mp4(content, media.fps or 10.0)
        return ("png", png(content, media.fps or 10.0)) if found is None else ("mp4", found)
    if media.kind == "table":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([content.columns, *content.rows])
        return "csv", text.getvalue().encode()
    if media.kind == "hyperparameters":
        return "json", json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"
    return "md", str(content).encode()
