"""A file of metrics with one JSON object a line."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Annotated, Any, TypeAlias

from pydantic import Field

from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.metrics import MetricsRecord, MetricValue
from robo_orchard_lab.pipeline.progress import TrainerProgress
from robo_orchard_lab.pipeline.run.durable import remove_leftovers, replace_file, write_file
from robo_orchard_lab.pipeline.run.run_path import RunPath
from robo_orchard_lab.pipeline.sinks.sink import SinkConfig

# --- json line -------------------------------------------------------------------------------
# A record of metrics as a line of JSON, and back.


JsonNumber: TypeAlias = float | str
"""Strict JSON has no words for what is not finite."""

_BEGIN = b'{"epoch_id": '
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_COUNTERS = ("epoch_id", "global_step_id", "optimizer_step_id")


def line_of(record: MetricsRecord) -> bytes:
    """The line of a record; the names of each step in alphabetical order."""
    steps = record.by_step()
    document: dict[str, Any] = {name: getattr(record, name) for name in _COUNTERS}
    document["metrics"] = _plain(steps.pop(record.global_step_id, {}))
    if steps:
        document["earlier"] = [{"step": s, "metrics": _plain(steps[s])} for s in steps]
    if record.partial:
        document["partial"] = True
    return json.dumps(document, allow_nan=False).encode() + b"\n"


def record_of(line: bytes) -> MetricsRecord | None:
    """The record of a line, or None if it is none."""
    try:
        document = json.loads(line, parse_constant=_refuse)
        epoch, step, updates = (_count(document.pop(name)) for name in _COUNTERS)
        steps = [*document.pop("earlier", []), {"step": step, "metrics": document.pop("metrics")}]
        partial = document.pop("partial", False)
        if document or type(partial) is not bool:
            return None
        values = tuple(
            MetricValue(name, _number(value), _count(entry["step"]))
            for entry in steps
            for name, value in entry["metrics"].items()
        )
        return MetricsRecord(epoch, step, updates, values, partial)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None


def is_torn(line: bytes) -> bool:
    """Whether a line that is no record is the begin of one, as a crash leaves it."""
    written = line.rstrip(b"\0")  # some file systems fill up what had no time to be written
    return written.startswith(_BEGIN) or _BEGIN.startswith(written)


def _plain(metrics: Mapping[str, float]) -> dict[str, JsonNumber]:
    return {name: _json_number(metrics[name]) for name in sorted(metrics)}


def _json_number(value: float) -> JsonNumber:
    if math.isfinite(value):
        return value
    return next(text for text, known in _NOT_FINITE.items() if str(known) == str(value))


def _number(value: JsonNumber) -> float:
    return _NOT_FINITE[value] if isinstance(value, str) else float(value)


def _count(value: Any) -> int:
    if type(value) is not int:
        raise TypeError("a counter is an int")
    return value


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


# --- locked file -----------------------------------------------------------------------------
# A file that only one process appends to.


def open_to_append(path: Path) -> IO[bytes] | None:
    """The file, locked until it is closed or the process ends; None if another process has it.

    Processes that this one has started don't hold the lock. This one gives it up when it closes
    the file, also when it opens it a second time and closes that. Where the file system has no
    locks, and on Windows, nothing is locked.
    """
    file = path.open("a+b")
    if sys.platform != "win32":
        import fcntl

        try:
            with suppress(NotImplementedError):
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            return None
        except OSError:
            pass
    return file


logger = logging.getLogger(__name__)


class MetricsFileError(ValueError):
    """A file is no file of metrics; it is left as it is."""


class JsonLinesSink:
    """Appends a line of JSON to a file for each record, which is at once there to read.

    A line holds the counters and the metrics of its step. Those that belong to earlier steps stand
    apart, and the record of a run that ended between two logging points says so::

        {"epoch_id": 0, "global_step_id": 50, "optimizer_step_id": 50,
         "metrics": {"loss/total": 0.42}, "earlier": [{"step": 48, "metrics": {"grad_norm": 1.3}}]}
        {"epoch_id": 0, "global_step_id": 60, "optimizer_step_id": 60,
         "metrics": {"loss/total": 0.41}, "partial": true}

    What is no finite number is ``"NaN"``, ``"Infinity"`` or ``"-Infinity"``. The file of a run that
    was stopped or killed, and resumed, is that of an uninterrupted one: what was written after the
    step that a run begins at, partial records, and a last line that is torn are set aside when it
    is opened, in a file beside it, such as ``metrics.aside-1.jsonl``. A new run sets all aside.

    Args:
        path: of the file; missing folders are made.
    """

    def __init__(self, path: str | os.PathLike[str] = "metrics.jsonl") -> None:
        self.path = Path(path)
        self._file: IO[bytes] | None = None

    def open(self, args: PipelineHookArgs) -> None:
        """Set aside what the run does again, and open the file to append.

        Raises:
            MetricsFileError: it is no file of metrics, or another process is writing it.
            OSError: it can't be read or written.
        """
        path = Path(os.path.realpath(self.path))  # a link stays one
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise MetricsFileError(f"{path} is no regular file; write to another path")
        self._file = _open(path)
        try:
            remove_leftovers(path)
            self._file.seek(0)
            data = self._file.read()
            kept, rest = _split(path, data, args.progress)
            if kept != data:
                _replace(path, kept, rest, args.progress.global_step_id)
                self._file.close()
                self._file = _open(path)
        except BaseException:
            self.close()
            raise

    def write(self, record: MetricsRecord) -> None:
        """Append a record; raises ``OSError`` when it can't be written."""
        assert self._file is not None  # since it was opened
        self._file.write(line_of(record))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


class JsonLinesSinkConfig(SinkConfig[JsonLinesSink]):
    """Where the file is.

    >>> JsonLinesSinkConfig(path="runs/1/metrics.jsonl")().path.name
    'metrics.jsonl'
    """

    class_type: type[JsonLinesSink] = JsonLinesSink
    path: Annotated[str, RunPath()] = Field(
        default="metrics.jsonl",
        min_length=1,
        description="The file, from the working directory; missing folders are made.",
    )


def read_metrics(path: str | os.PathLike[str]) -> list[MetricsRecord]:
    """The records of a file that a :class:`JsonLinesSink` has written, also while it does.

    Raises:
        MetricsFileError: it is no such file.
        OSError: it can't be read.
    """
    path = Path(path)
    return [record for record, _ in _records(path, path.read_bytes()) if record is not None]


def _open(path: Path) -> IO[bytes]:
    file = open_to_append(path)
    if file is None:
        raise MetricsFileError(
            f"another process is writing {path}; wait for it to end, or give each run a path of "
            "its own"
        )
    return file


def _records(path: Path, data: bytes) -> list[tuple[MetricsRecord | None, bytes]]:
    """The records with their lines; None for a last line that is torn."""
    found: list[tuple[MetricsRecord | None, bytes]] = []
    lines = data.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        record = record_of(line)
        if record is None and not (number == len(lines) and is_torn(line)):
            raise MetricsFileError(
                f"line {number} of {path} is no record of metrics: {line[:60]!r}; move the file "
                "away, or write to another path"
            )
        found.append((record, line))
    return found


def _split(path: Path, data: bytes, progress: TrainerProgress) -> tuple[bytes, bytes]:
    """What the file of an uninterrupted run has when it has come this far, and the rest."""
    kept, rest = [], []
    for record, line in _records(path, data):
        if record is not None and _belongs(record, progress):
            kept.append(line if line.endswith(b"\n") else line + b"\n")
        else:
            rest.append(line)
    return b"".join(kept), b"".join(rest)


def _belongs(record: MetricsRecord, progress: TrainerProgress) -> bool:
    return (
        0 < progress.global_step_id >= record.global_step_id
        # Without a length, an epoch can end at a step that has a record already.
        and record.epoch_id <= progress.epoch_id
        and not record.partial
    )


def _replace(path: Path, kept: bytes, rest: bytes, step: int) -> None:
    """Have the file hold what is kept, and one beside it the rest; at no time is any of it lost."""
    if rest:
        aside = _set_aside(path, rest)
        logger.info("moved what is after step %d of %s to %s", step, path, aside)
    replace_file(path, kept)


def _set_aside(path: Path, data: bytes) -> Path:
    """Write a file beside another one, by a name that is free."""
    number = 1
    while True:
        aside = path.with_name(f"{path.stem}.aside-{number}{path.suffix}")
        try:
            write_file(aside, data)
        except FileExistsError:
            number += 1
        else:
            return aside
