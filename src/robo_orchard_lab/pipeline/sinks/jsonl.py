"""Metrics file with a JSON object per line."""

from __future__ import annotations

import json
import logging
import math
import os
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from time import monotonic
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypeVar, overload

import numpy as np
from pydantic import Field

from robo_orchard_lab.frames import Column, FrameKind, frame_package, make_frame
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.job_log import ROUTINE
from robo_orchard_lab.pipeline.metrics import MetricsRecord, MetricValue
from robo_orchard_lab.pipeline.progress import TrainerProgress
from robo_orchard_lab.pipeline.run.durable import (
    flush_folder,
    lock_file,
    make_folder,
    remove_leftovers,
    replace_file,
    write_file,
)
from robo_orchard_lab.pipeline.run.run_path import RunPath
from robo_orchard_lab.pipeline.sinks.sink import SinkConfig

if TYPE_CHECKING:
    import pandas
    import polars

logger = logging.getLogger(__name__)

T = TypeVar("T")
_LOOK_EVERY_S = 1.0
_END_BYTES = 1 << 16
"""Least bytes to read when a file is opened."""


class MetricsFileError(ValueError):
    """Error for a file with other contents; the file is not changed."""

    path: Path | None = None
    """The file; None if another process is writing it."""


class JsonLinesSink:
    """Sink to a file: appends a line of JSON per record. A checkpoint makes the lines durable.

    A line has the counters and the metrics of its step; metrics of earlier steps are listed by
    step. The record of a run that ended between two logging points is marked as partial::

        {"epoch_id": 0, "global_step_id": 50, "optimizer_step_id": 50,
         "metrics": {"loss/total": 0.42}, "earlier": [{"step": 48, "metrics": {"grad_norm": 1.3}}]}
        {"epoch_id": 0, "global_step_id": 60, "optimizer_step_id": 60,
         "metrics": {"loss/total": 0.41}, "partial": true}

    Non-finite values are ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``.

    The file of a resumed run equals the file of an uninterrupted run. When the file is opened,
    records after the resumed step, partial records and a torn last line move to another file, such
    as ``metrics.aside-1.jsonl``. A new run moves all records. If the file is removed during the
    run, it is made again, with all its lines.

    The time to open a file does not grow with the number of records up to the resumed step. Only
    the end of the file is read: the records to move, and at least 64 KiB. Damaged lines there move,
    too, with a warning. Earlier lines are not checked; :func:`read_metrics` checks all lines.

    Args:
        path: path of the file; missing folders are created.
    """

    def __init__(self, path: str | os.PathLike[str] = "metrics.jsonl") -> None:
        self.path = Path(path)
        self.newest_record: MetricsRecord | None = None
        """Last record of the file when it was opened."""
        self._file: IO[bytes] | None = None
        self._target = self.path  # through links
        self._end: int | None = None  # of the last complete line, if an incomplete one follows
        self._look_at = 0.0  # time to look if the path still has the open file
        self._open_files = ExitStack()

    def open(self, args: PipelineHookArgs) -> None:
        """Lock the file, move records after the current step, and open the file to append.

        Raises:
            MetricsFileError: the file is not a metrics file, or another process is writing it.
            OSError: the file can't be read or written.
        """
        path = self._target = Path(os.path.realpath(self.path))  # a link stays a link
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise MetricsFileError(f"{path} is not a regular file; write to another path")
        file = self._lock_and_open(path)
        try:
            remove_leftovers(path)
            end = _read_end(path, args.progress)
            self.newest_record = end.newest
            # Write the rest first: a crash between the two loses nothing.
            if end.rest:
                moved = args.progress.global_step_id, path, _write_aside(path, end.rest)
                logger.info("moved records after step %d of %s to %s", *moved, extra=ROUTINE)
            if end.kept + end.rest == end.data:
                if end.rest:
                    os.ftruncate(file.fileno(), end.begin + len(end.kept))
                    os.fsync(file.fileno())
            else:  # a line in the middle is damaged, or the last newline is missing
                replace_file(path, path.read_bytes()[: end.begin] + end.kept)
                self.close()
                self._lock_and_open(path)  # the new file
        except BaseException:
            self.close()
            raise

    def _lock_and_open(self, path: Path) -> IO[bytes]:
        try:
            lock = lock_file(path)  # None where the file system has no locks
        except BlockingIOError:
            raise MetricsFileError(
                f"another process is writing {path}; wait for it to end, or give each run a path "
                "of its own"
            ) from None
        if lock is not None:
            self._open_files.callback(lock.release)
        self._file = self._open_files.enter_context(path.open("a+b", buffering=0))
        flush_folder(path.parent)
        return self._file

    def write(self, record: MetricsRecord) -> None:
        """Append a record; after an ``OSError`` the file ends with the record before."""
        rest = to_line(record)
        descriptor, size = self._reopened()
        if self._end is not None:
            os.ftruncate(descriptor, self._end)
        else:
            self._end = size
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        self._end = None

    def _reopened(self) -> tuple[int, int]:
        """Return descriptor and size of the file, made again if it was removed or replaced.

        A removed file has no link. The path, which may have another file, costs 10 us, and is
        looked up at most once a second.
        """
        if self._file is not None:
            found, now = os.fstat(self._file.fileno()), monotonic()
            if found.st_nlink and now < self._look_at:
                return self._file.fileno(), found.st_size
            self._look_at = now + _LOOK_EVERY_S
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self._target), found):
                    return self._file.fileno(), found.st_size
            if not self._target.exists():
                self._file.seek(0)
                make_folder(self._target.parent)
                replace_file(self._target, self._file.read(-1 if self._end is None else self._end))
            self.close()
            self._end = None
        descriptor = self._lock_and_open(self._target).fileno()
        return descriptor, os.fstat(descriptor).st_size

    def flush(self) -> None:
        """Make all written records durable."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close and unlock the file."""
        self._file = None
        self._open_files.close()


class JsonLinesSinkConfig(SinkConfig[JsonLinesSink]):
    """Configuration of a :class:`JsonLinesSink`.

    >>> JsonLinesSinkConfig(path="runs/1/metrics.jsonl")().path.name
    'metrics.jsonl'
    """

    class_type: type[JsonLinesSink] = JsonLinesSink
    path: Annotated[str, RunPath()] = Field(
        default="metrics.jsonl",
        min_length=1,
        description="Path of the file, relative to the working directory; missing folders are "
        "created.",
    )


@overload
def read_metrics(path: str | os.PathLike[str], *, frame: None = None) -> list[MetricsRecord]: ...


@overload
def read_metrics(path: str | os.PathLike[str], *, frame: Literal["pandas"]) -> pandas.DataFrame: ...


@overload
def read_metrics(path: str | os.PathLike[str], *, frame: Literal["polars"]) -> polars.DataFrame: ...


def read_metrics(path: str | os.PathLike[str], *, frame: FrameKind | None = None) -> Any:
    """Read a metrics file, also during the run.

    A frame of 100,000 records takes half of the time of their list: it needs no object for each
    value, which the interpreter's garbage collector would go through.

    Args:
        path: metrics file of a `JsonLinesSink`.
        frame: None for a list of records; ``"pandas"`` or ``"polars"`` for a data frame. Its rows
            are the steps with metrics, in order; its columns ``global_step_id``, ``epoch_id``,
            ``optimizer_step_id``, ``partial``, and the metrics by name, sorted. A metric without
            a value at a step is null; NaN and infinities are values. The counters of a step
            between two records are null. Of several values of a step, the last counts.

    Raises:
        MetricsFileError: the file is not a metrics file; for a frame, also a metric named like a
            counter.
        OSError: the file can't be read.
        ImportError: the package of the frame is not installed.
    """
    if frame is None:
        return [*_read_lines(Path(path), from_line)]
    frame_package(frame)
    return make_frame(_columns(Path(path)), frame)


def _read_lines(path: Path, parse: Callable[[bytes], T | None]) -> Iterator[T]:
    """Iterate over the parsed lines, one at a time; a torn last line is left out.

    Raises:
        MetricsFileError: a line is no record: ``parse`` returned None.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            record = parse(line)
            if record is not None:
                yield record
            elif file.read(1) or not _is_torn(line):
                damage = _describe_damage(number, path, line)
                raise MetricsFileError(f"{damage}; move the file away, or write to another path")


def _columns(path: Path) -> dict[str, Column]:
    """Return the columns of a data frame, read into arrays, without an object for each value."""
    own = array("q")  # steps of the records
    counters = {name: array("q") for name in _COUNTERS}
    are_partial = array("b")
    metrics: dict[str, tuple[array[int], array[float]]] = {}

    def add(line: bytes) -> bool | None:
        try:
            counts, is_partial, found = _parse(line)
            values = [
                (name, step, _from_json(value))
                for step, named in found
                for name, value in named.items()
            ]
        except _NO_RECORD:
            return None
        own.append(counts[1])
        for column, count in zip(counters.values(), counts, strict=True):
            column.append(count)
        are_partial.append(is_partial)
        for name, step, value in values:
            if name not in metrics:
                metrics[name] = array("q"), array("d")
            metrics[name][0].append(step)
            metrics[name][1].append(value)
        return True

    for _ in _read_lines(path, add):
        pass
    columns: dict[str, tuple[array[int], array[Any]]]
    columns = {name: (own, column) for name, column in counters.items()}
    columns["partial"] = own, are_partial
    if taken := columns.keys() & metrics.keys():
        raise MetricsFileError(
            f"{path} has a metric named {min(taken)!r}, as a counter of its records; read it "
            "without frame="
        )
    steps = np.unique(np.concatenate([own, *(at for at, _ in metrics.values())]))
    aligned = {
        name: _align(steps, *column)
        for name, column in {**columns, **dict(sorted(metrics.items()))}.items()
    }
    aligned["global_step_id"] = steps, np.ones(len(steps), bool)
    aligned["partial"] = aligned["partial"][0].astype(bool), aligned["partial"][1]
    return aligned


def _align(steps: np.ndarray[Any, Any], own: array[int], values: array[Any]) -> Column:
    """Return an array with a value for each of the sorted steps, and where one is known."""
    rows = np.searchsorted(steps, own)
    known = np.zeros(len(steps), bool)
    known[rows] = True
    found = np.zeros(len(steps), values.typecode)
    found[rows] = values  # of several values of a step, the last counts
    return found, known


def _describe_damage(number: int, path: Path, line: bytes) -> str:
    return f"line {number} of {path} is no record of metrics: {line[:60]!r}"


@dataclass(frozen=True, slots=True)
class _End:
    """End of a metrics file, split into an uninterrupted run's lines and the rest."""

    begin: int
    """Offset in the file."""
    data: bytes
    newest: MetricsRecord | None
    """Last record to keep."""
    kept: bytes
    rest: bytes


def _read_end(path: Path, progress: TrainerProgress) -> _End:
    """Read the end of a file, back to a record to keep: one that is not after ``progress``.

    Raises:
        MetricsFileError: no line is a record: the file belongs to another program.
    """
    length = _END_BYTES
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        while True:
            begin = _seek_line(file, size - length)
            data = file.read()
            lines = data.splitlines(keepends=True)
            records = [from_line(line) for line in lines]
            if not progress.global_step_id and any(records):  # a new run keeps no line
                file.seek(0)
                data = file.read()
                return _End(0, data, None, b"", data)
            if not begin or any(_is_before(record, progress) for record in filter(None, records)):
                break
            length *= 2
        _check_lines(path, file, begin, [*zip(lines, records, strict=True)])
    kept, rest, newest = [], [], None
    for record, line in zip(records, lines, strict=True):
        if record is not None and _is_before(record, progress):
            kept.append(line if line.endswith(b"\n") else line + b"\n")
            newest = record
        else:
            rest.append(line)
    return _End(begin, data, newest, b"".join(kept), b"".join(rest))


def _seek_line(file: IO[bytes], offset: int) -> int:
    """Move to the first line that begins at an offset or later, and return its offset."""
    file.seek(max(0, offset - 1))
    if offset > 0:
        file.readline()
    return file.tell()


def _check_lines(
    path: Path, file: IO[bytes], begin: int, lines: list[tuple[bytes, MetricsRecord | None]]
) -> None:
    """Warn of the first damaged line; raise a MetricsFileError if no line is a record."""
    for index, (line, record) in enumerate(lines):
        if record is None and not (index == len(lines) - 1 and _is_torn(line)):
            break
    else:
        return
    file.seek(0)
    damage = _describe_damage(file.read(begin).count(b"\n") + index + 1, path, line)
    if all(record is None for _, record in lines):
        error = MetricsFileError(f"{damage}; move the file away, or write to another path")
        error.path = path
        raise error
    logger.warning("%s; the file is damaged, and such lines move to another file", damage)


def _is_before(record: MetricsRecord, progress: TrainerProgress) -> bool:
    return (
        0 < progress.global_step_id >= record.global_step_id
        # An epoch of unknown length can end at a step that has a record already.
        and record.epoch_id <= progress.epoch_id
        and not record.partial
    )


def _write_aside(path: Path, data: bytes) -> Path:
    """Write a new file next to ``path``, under the first free name."""
    number = 1
    while True:
        aside = path.with_name(f"{path.stem}.aside-{number}{path.suffix}")
        try:
            write_file(aside, data)
        except FileExistsError:
            number += 1
        else:
            return aside


# --- line format -----------------------------------------------------------------------------

JsonNumber: TypeAlias = float | str
"""Number, or the name of a non-finite value, which strict JSON lacks."""

_BEGIN = b'{"epoch_id": '
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_COUNTERS = ("epoch_id", "global_step_id", "optimizer_step_id")


def to_line(record: MetricsRecord) -> bytes:
    """Serialize a record; the names of each step are sorted."""
    steps: dict[int, dict[str, JsonNumber]] = {record.global_step_id: {}}
    for value in sorted(record.values, key=_name_of):
        number = value.value
        metrics = steps.setdefault(value.step, {})
        metrics[value.name] = number if math.isfinite(number) else json.dumps(number)
    document: dict[str, Any] = {
        "epoch_id": record.epoch_id,
        "global_step_id": record.global_step_id,
        "optimizer_step_id": record.optimizer_step_id,
        "metrics": steps.pop(record.global_step_id),
    }
    if steps:
        document["earlier"] = [{"step": s, "metrics": steps[s]} for s in sorted(steps)]
    if record.partial:
        document["partial"] = True
    return _encode(document).encode() + b"\n"


def from_line(line: bytes) -> MetricsRecord | None:
    """Parse a line; return None if the line is not a record."""
    try:
        counters, partial, steps = _parse(line)
        values = tuple(
            MetricValue(name, _from_json(value), step)
            for step, metrics in steps
            for name, value in metrics.items()
        )
        epoch, step, updates = counters
        return MetricsRecord(epoch, step, updates, values, partial)
    except _NO_RECORD:
        return None


_NO_RECORD = (ValueError, OverflowError, RecursionError, KeyError, TypeError, AttributeError)


def _parse(line: bytes) -> tuple[list[int], bool, list[tuple[int, dict[str, JsonNumber]]]]:
    """Return the counters, ``partial``, and the metrics of each step.

    Raises:
        Exception: one of `_NO_RECORD`: the line is not a record.
    """
    document = _decode(line.decode())
    counters = [_count(document.pop(name)) for name in _COUNTERS]
    steps = [(_count(e["step"]), e["metrics"]) for e in document.pop("earlier", ())]
    steps.append((counters[1], document.pop("metrics")))
    partial = document.pop("partial", False)
    if document or type(partial) is not bool:
        raise ValueError("other fields")
    return counters, partial, steps


def _is_torn(line: bytes) -> bool:
    """Return True if a line is the beginning of a record, as a crash leaves it."""
    written = line.rstrip(b"\0")  # some file systems fill unwritten space with zeros
    return written.startswith(_BEGIN) or _BEGIN.startswith(written)


def _from_json(value: JsonNumber) -> float:
    if type(value) is float:
        return value
    return _NON_FINITE[value] if isinstance(value, str) else float(value)


def _count(value: Any) -> int:
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise TypeError("a counter is an int of 64 bits")
    return value


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


_decode = json.JSONDecoder(parse_constant=_refuse).decode
_encode = json.JSONEncoder(allow_nan=False).encode
_name_of = attrgetter("name")
