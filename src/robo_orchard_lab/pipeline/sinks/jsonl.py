"""Metrics file with a JSON object per line."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Annotated, Any, TypeAlias

from pydantic import Field

from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.metrics import MetricsRecord, MetricValue
from robo_orchard_lab.pipeline.progress import TrainerProgress
from robo_orchard_lab.pipeline.run.durable import (
    lock_file,
    remove_leftovers,
    replace_file,
    write_file,
)
from robo_orchard_lab.pipeline.run.run_path import RunPath
from robo_orchard_lab.pipeline.sinks.sink import SinkConfig

logger = logging.getLogger(__name__)


class MetricsFileError(ValueError):
    """Error for a file with other contents; the file is not changed."""


class JsonLinesSink:
    """Sink to a file: appends a line of JSON per record, and flushes.

    A line has the counters and the metrics of its step; metrics of earlier steps are listed by
    step. The record of a run that ended between two logging points is marked as partial::

        {"epoch_id": 0, "global_step_id": 50, "optimizer_step_id": 50,
         "metrics": {"loss/total": 0.42}, "earlier": [{"step": 48, "metrics": {"grad_norm": 1.3}}]}
        {"epoch_id": 0, "global_step_id": 60, "optimizer_step_id": 60,
         "metrics": {"loss/total": 0.41}, "partial": true}

    Non-finite values are ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``.

    The file of a resumed run equals the file of an uninterrupted run. When the file is opened,
    records after the resumed step, partial records and a torn last line move to another file, such
    as ``metrics.aside-1.jsonl``. A new run moves all records.

    Args:
        path: path of the file; missing folders are created.
    """

    def __init__(self, path: str | os.PathLike[str] = "metrics.jsonl") -> None:
        self.path = Path(path)
        self._file: IO[bytes] | None = None
        self._open_files = ExitStack()

    def open(self, args: PipelineHookArgs) -> None:
        """Lock the file, move records after the current step, and open the file to append.

        Raises:
            MetricsFileError: the file is not a metrics file, or another process is writing it.
            OSError: the file can't be read or written.
        """
        path = Path(os.path.realpath(self.path))  # a link stays a link
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise MetricsFileError(f"{path} is not a regular file; write to another path")
        self._lock_and_open(path)
        try:
            remove_leftovers(path)
            data = path.read_bytes()
            kept, rest = _split(path, data, args.progress)
            if kept != data:
                # Write the rest first: a crash between the two loses nothing.
                if rest:
                    step, aside = args.progress.global_step_id, _write_aside(path, rest)
                    logger.info("moved records after step %d of %s to %s", step, path, aside)
                replace_file(path, kept)
                self.close()
                self._lock_and_open(path)  # the new file
        except BaseException:
            self.close()
            raise

    def _lock_and_open(self, path: Path) -> None:
        try:
            lock = lock_file(path)  # None where the file system has no locks
        except BlockingIOError:
            raise MetricsFileError(
                f"another process is writing {path}; wait for it to end, or give each run a path "
                "of its own"
            ) from None
        if lock is not None:
            self._open_files.callback(lock.release)
        self._file = self._open_files.enter_context(path.open("ab"))

    def write(self, record: MetricsRecord) -> None:
        """Append a record; raise ``OSError`` on failure."""
        assert self._file is not None, "open() comes first"
        self._file.write(to_line(record))
        self._file.flush()

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


def read_metrics(path: str | os.PathLike[str]) -> list[MetricsRecord]:
    """Read the records of a metrics file, also during the run.

    Raises:
        MetricsFileError: the file is not a metrics file.
        OSError: the file can't be read.
    """
    path = Path(path)
    return [record for record, _ in _records(path, path.read_bytes()) if record is not None]


def _records(path: Path, data: bytes) -> list[tuple[MetricsRecord | None, bytes]]:
    """Return the records with their lines; None for a torn last line."""
    found: list[tuple[MetricsRecord | None, bytes]] = []
    lines = data.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        record = from_line(line)
        if record is None and not (number == len(lines) and _is_torn(line)):
            raise MetricsFileError(
                f"line {number} of {path} is no record of metrics: {line[:60]!r}; move the file "
                "away, or write to another path"
            )
        found.append((record, line))
    return found


def _split(path: Path, data: bytes, progress: TrainerProgress) -> tuple[bytes, bytes]:
    """Split the lines into an uninterrupted run's lines up to ``progress``, and the rest."""
    kept, rest = [], []
    for record, line in _records(path, data):
        if record is not None and _is_before(record, progress):
            kept.append(line if line.endswith(b"\n") else line + b"\n")
        else:
            rest.append(line)
    return b"".join(kept), b"".join(rest)


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
    steps = record.by_step()
    document: dict[str, Any] = {name: getattr(record, name) for name in _COUNTERS}
    document["metrics"] = _to_json(steps.pop(record.global_step_id, {}))
    if steps:
        document["earlier"] = [{"step": s, "metrics": _to_json(steps[s])} for s in steps]
    if record.partial:
        document["partial"] = True
    return json.dumps(document, allow_nan=False).encode() + b"\n"


def from_line(line: bytes) -> MetricsRecord | None:
    """Parse a line; return None if the line is not a record."""
    try:
        document = json.loads(line, parse_constant=_refuse)
        epoch, step, updates = (_count(document.pop(name)) for name in _COUNTERS)
        steps = [*document.pop("earlier", []), {"step": step, "metrics": document.pop("metrics")}]
        partial = document.pop("partial", False)
        if document or type(partial) is not bool:
            return None
        values = tuple(
            MetricValue(name, _from_json(value), _count(entry["step"]))
            for entry in steps
            for name, value in entry["metrics"].items()
        )
        return MetricsRecord(epoch, step, updates, values, partial)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None


def _is_torn(line: bytes) -> bool:
    """Return True if a line is the beginning of a record, as a crash leaves it."""
    written = line.rstrip(b"\0")  # some file systems fill unwritten space with zeros
    return written.startswith(_BEGIN) or _BEGIN.startswith(written)


def _to_json(metrics: Mapping[str, float]) -> dict[str, JsonNumber]:
    return {
        name: value if math.isfinite(value) else json.dumps(value)
        for name, value in sorted(metrics.items())
    }


def _from_json(value: JsonNumber) -> float:
    return _NON_FINITE[value] if isinstance(value, str) else float(value)


def _count(value: Any) -> int:
    if type(value) is not int:
        raise TypeError("a counter is an int")
    return value


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")
