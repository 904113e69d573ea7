"""Queries over runs: conditions, order and columns; results as rows, files or data frames."""

from __future__ import annotations

import csv
import io
import json
import math
import operator
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, overload

from robo_orchard_core.utils.config.errors import ConfigError
from robo_orchard_lab.experiment.overrides import parse_value
from robo_orchard_lab.frames import FrameKind, frame_package, make_frame, plain_text, uniform
from robo_orchard_lab.report.fields import MISSING, Field, Run, find_field, read_runs_of
from robo_orchard_lab.report.page import write

DEFAULT_COLUMNS = (
    *("run", "state", "steps", "epochs", "time", "metric", "best", "best_step"),
    *("commit", "started", "updated"),
)
"""Columns of files and data frames."""

_CONDITION = re.compile(r"\s*([^=!<>~]+?)\s*(<=|>=|!=|==|=|<|>|~|\s(?:in)\s)\s*(.*?)\s*", re.S)
_ORDERS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Condition:
    """Comparison of a field of runs with a value.

    Attributes:
        text: as the user wrote it.
        field: name of the field.
        operator: ``=``, ``!=``, ``<``, ``<=``, ``>``, ``>=``, ``~`` (contains) or ``in``.
        value: value as text.
    """

    text: str
    field: str
    operator: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Parse a condition such as ``lr>1e-3``, ``state = failed`` or ``lr in 0.1, 0.2``.

        >>> condition = Condition.parse("eval/val/acc:best >= 0.9")
        >>> condition.field, condition.operator, condition.value
        ('eval/val/acc:best', '>=', '0.9')

        Raises:
            ConfigError: the text is no condition.
        """
        found = _CONDITION.fullmatch(text)
        if found is None or not found[3] or found[3][0] in "=!<>~":
            raise ConfigError(
                f"expected FIELD OPERATOR VALUE with one of = != < <= > >= ~ in, found {text!r}; "
                "for example --where 'lr>1e-3'"
            )
        return cls(text, found[1], found[2].strip().replace("==", "="), found[3])

    def holds(self, value: Any) -> bool | None:
        """Return True if a value of the field meets the condition; None if it can't be compared."""
        if value is MISSING:
            return None
        if self.operator == "in":
            listed = self.value if self.value.startswith("[") else f"[{self.value}]"
            found = parse_value(listed)
            values = found if isinstance(found, list) else [found]
            texts = [each if isinstance(each, str) else plain_text(each) for each in values]
            return any(map(_equal, [value] * len(values), values, texts))
        if self.operator == "~":
            shown = value if isinstance(value, str) else plain_text(value)
            return _unquoted(self.value).casefold() in shown.casefold()
        wanted: Any
        if isinstance(value, datetime):
            value, wanted = _dates(value, self)
            is_equal = value == wanted
        else:
            wanted = parse_value(self.value)
            is_equal = _equal(value, wanted, _unquoted(self.value))
        if self.operator in ("=", "!="):
            return is_equal is (self.operator == "=")
        is_text = isinstance(value, str) and isinstance(wanted, str)
        is_number = _is_number(value) and _is_number(wanted)
        if not (is_text or is_number or isinstance(value, date)):
            return None
        return _ORDERS[self.operator](value, wanted)


def _equal(value: Any, wanted: Any, text: str) -> bool:
    """Compare a value with one of a condition: text with text, else by value and kind."""
    if isinstance(value, str):
        return value == text
    if isinstance(value, float) and math.isnan(value):
        return text.casefold() == "nan"
    if _is_number(value) and isinstance(wanted, str):
        return bool(value == _infinity(text))
    return bool(value == wanted) and isinstance(value, bool) is isinstance(wanted, bool)


def _infinity(text: str) -> float | None:
    return float(text) if text.casefold() in ("inf", "-inf", "infinity", "-infinity") else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _unquoted(text: str) -> str:
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1] if is_quoted else text


def _dates(value: datetime, condition: Condition) -> tuple[date, date]:
    """Return a time and that of the condition; both as days if the condition has no time."""
    try:
        wanted = datetime.fromisoformat(_unquoted(condition.value))
    except ValueError:
        raise ConfigError(
            f"{condition.text}: expected a date such as 2026-12-01 or 2026-12-01T09:30 (UTC), "
            f"found {condition.value!r}"
        ) from None
    if len(_unquoted(condition.value)) == len("2026-12-01"):
        return value.astimezone(UTC).date(), wanted.date()
    return value, wanted if wanted.tzinfo else wanted.replace(tzinfo=UTC)


# --- selection -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """Runs that meet conditions.

    Attributes:
        runs: selected runs, in order.
        columns: fields to show.
        left_out: descriptions of runs without a field of a condition, for people.
    """

    runs: list[Run]
    columns: list[Field]
    left_out: list[str]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the values of each run by column; None where a run has none."""
        for run in self.runs:
            values = ((field.name, field.value(run)) for field in self.columns)
            yield {name: None if value is MISSING else value for name, value in values}

    def table(self) -> dict[str, list[Any]]:
        """Return the columns, each with values of one type; see `uniform`."""
        rows = [*self.rows()]
        return {f.name: uniform([row[f.name] for row in rows]) for f in self.columns}

    def write(self, path: Path) -> None:
        """Write a ``.csv``, ``.jsonl`` or ``.parquet`` file, atomically; see `check_suffix`.

        In CSV a missing value is empty. In JSON lines, non-finite numbers are texts.

        Raises:
            OSError: the file can't be written.
        """
        encode = {".csv": _to_csv, ".jsonl": _to_jsonl, ".parquet": _to_parquet}[path.suffix]
        write(path, encode(self))


def select(
    runs: Sequence[Run],
    where: Sequence[str] = (),
    columns: Sequence[str] = DEFAULT_COLUMNS,
    sort: str = "started",
    *,
    reverse: bool = False,
) -> Selection:
    """Select runs by conditions, and sort them: unknown values first, the best metric last.

    Raises:
        ConfigError: a condition is malformed, or a field is unknown or ambiguous.
    """
    conditions = [Condition.parse(text) for text in where]
    if not runs:
        return Selection([], [Field(name, lambda run: MISSING) for name in columns], [])
    left_out, kept = [], [*runs]
    for condition in conditions:
        field = find_field(condition.field, runs)
        found = {run: condition.holds(field.value(run)) for run in runs}
        if lacking := sum(holds is None for holds in found.values()):
            left_out.append(
                f"{lacking:,} of {len(runs):,} runs left out: no {condition.field} to compare with "
                f"{condition.value}"
            )
        kept = [run for run in kept if found[run]]
    order = find_field(sort, runs)
    keys = {run: order.sort_key(run) for run in kept}
    known = sorted((run for run in kept if keys[run]), key=keys.__getitem__, reverse=reverse)
    ordered = [run for run in kept if not keys[run]] + known
    return Selection(ordered, [find_field(name, runs) for name in columns], left_out)


@overload
def read_runs(
    folder: str | os.PathLike[str],
    *,
    where: str | Sequence[str] = (),
    columns: Sequence[str] = DEFAULT_COLUMNS,
    sort: str = "started",
    reverse: bool = False,
    metric: str | None = None,
    frame: None = None,
) -> list[dict[str, Any]]: ...


@overload
def read_runs(
    folder: str | os.PathLike[str],
    *,
    where: str | Sequence[str] = (),
    columns: Sequence[str] = DEFAULT_COLUMNS,
    sort: str = "started",
    reverse: bool = False,
    metric: str | None = None,
    frame: FrameKind,
) -> Any: ...


def read_runs(
    folder: str | os.PathLike[str],
    *,
    where: str | Sequence[str] = (),
    columns: Sequence[str] = DEFAULT_COLUMNS,
    sort: str = "started",
    reverse: bool = False,
    metric: str | None = None,
    frame: FrameKind | None = None,
) -> Any:
    """Return the runs in a folder and below, as ``robo-orchard-lab runs`` lists them.

    Args:
        folder: folder of runs, such as ``runs`` or that of a sweep.
        where: conditions, all of which a run meets, such as ``"lr>1e-3"``.
        columns: fields, such as ``"optimizer.lr"`` or ``"eval/val/loss:best"``.
        sort: field to sort by.
        reverse: reverse the order.
        metric: metric of the field ``best``; by default that of the best checkpoint.
        frame: ``"pandas"`` or ``"polars"`` for a data frame; None for a list of mappings.

    Raises:
        ConfigError: a condition is malformed, or a field is unknown or ambiguous.
        FileNotFoundError: there is no such folder.
        ImportError: the package of the frame is not installed.
    """
    if frame is not None:
        frame_package(frame)
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    texts = [where] if isinstance(where, str) else where
    found = select(read_runs_of(folder, metric), texts, columns, sort, reverse=reverse)
    return [*found.rows()] if frame is None else make_frame(found.table(), frame)


# --- files -----------------------------------------------------------------------------------


def check_suffix(path: Path) -> None:
    """Refuse a file to write whose suffix is unknown, or whose package is missing.

    Raises:
        ConfigError: with the remedy.
    """
    if path.suffix not in (".csv", ".jsonl", ".parquet"):
        raise ConfigError(
            f"expected a file ending in .csv, .jsonl or .parquet, found {str(path)!r}; choose one "
            "of these endings"
        )
    if path.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise ConfigError(
                "a .parquet file requires pyarrow, which is not installed; "
                'pip install "robo-orchard-hooks[robotics]"'
            ) from None


def strict(value: Any) -> Any:
    """Return a value for strict JSON: non-finite numbers and dates as text."""
    if isinstance(value, datetime) or (isinstance(value, float) and not math.isfinite(value)):
        return plain_text(value)
    return value


def _to_jsonl(found: Selection) -> bytes:
    rows = ({name: strict(value) for name, value in row.items()} for row in found.rows())
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()


def _to_csv(found: Selection) -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([field.name for field in found.columns])
    for row in found.rows():
        writer.writerow([_cell(value) for value in row.values()])
    return buffer.getvalue().encode("utf-8", "replace")


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return value if isinstance(value, str) or _is_number(value) else plain_text(value)


def _to_parquet(found: Selection) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table(found.table()), buffer)
    return buffer.getvalue()
