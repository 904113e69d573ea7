"""Data frames of pandas or Polars; both packages are optional and imported on use."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    import numpy as np

FrameKind: TypeAlias = Literal["pandas", "polars"]
"""Package of a data frame."""

Column: TypeAlias = "tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]"
"""Values, and booleans that are False where a value is missing."""


def frame_package(kind: FrameKind) -> Any:
    """Import and return the package of a data frame.

    Raises:
        ValueError: the package is neither pandas nor polars.
        ImportError: the package is not installed.
    """
    if kind not in ("pandas", "polars"):
        raise ValueError(f"expected frame='pandas' or frame='polars', found {kind!r:.40}")
    try:
        return importlib.import_module(kind)
    except ImportError as error:
        raise ImportError(
            f"frame={kind!r} requires {kind}, which can't be imported: {error}; pip install {kind}"
        ) from error


def make_frame(columns: Mapping[str, Column | Sequence[Any]], kind: FrameKind) -> Any:
    """Return a ``pandas.DataFrame`` or a ``polars.DataFrame`` of columns by name.

    A missing value is null, a NaN stays NaN. With pandas, numbers with missing values have the
    nullable types ``Int64``, ``Float64`` and ``boolean``.

    Args:
        columns: arrays, or plain values of one type and None; see `uniform`.
        kind: package of the frame.
    """
    package = frame_package(kind)
    make = _pandas_column if kind == "pandas" else _polars_column
    return package.DataFrame({name: make(package, column) for name, column in columns.items()})


def uniform(values: Sequence[Any]) -> list[Any]:
    """Return the values of a column in one type: numbers, booleans and dates alone, else text.

    >>> uniform([1, None, 0.5]), uniform([1, "auto", [8, 8], True])
    ([1.0, None, 0.5], ['1', 'auto', '[8, 8]', 'true'])
    """
    kinds = {type(value) for value in values if value is not None}
    is_large = any(type(value) is int and abs(value) >= 2**63 for value in values)
    if kinds <= {int, float} and not is_large:
        return [float(v) if float in kinds and v is not None else v for v in values]
    if len(kinds) == 1 and kinds <= {bool, str, datetime}:
        return [*values]
    return [v if v is None or isinstance(v, str) else plain_text(v) for v in values]


def plain_text(value: Any) -> str:
    """Return a value that is no text as JSON; a date in ISO format."""
    return value.isoformat() if isinstance(value, datetime) else json.dumps(value)


def _masked(values: Sequence[Any]) -> Column | None:
    """Return the arrays of numbers or booleans; None for other values."""
    import numpy as np

    kinds = {type(value) for value in values if value is not None}
    if len(kinds) != 1 or not kinds <= {int, float, bool}:
        return None
    [kind] = kinds
    known = np.array([value is not None for value in values])
    return np.array([kind() if value is None else value for value in values]), known


def _pandas_column(pandas: Any, column: Column | Sequence[Any]) -> Any:
    masked = column if isinstance(column, tuple) else _masked(column)
    if masked is None:
        if any(isinstance(value, datetime) for value in column):
            return pandas.to_datetime([*column], utc=True)
        return pandas.array([*column], "string")
    values, known = masked
    if known.all():
        return values
    kinds = {"f": "FloatingArray", "i": "IntegerArray", "b": "BooleanArray"}
    return getattr(pandas.arrays, kinds[values.dtype.kind])(values, ~known)


def _polars_column(polars: Any, column: Column | Sequence[Any]) -> Any:
    if not isinstance(column, tuple):
        is_text = all(value is None for value in column)
        return polars.Series(column, dtype=polars.String if is_text else None)
    values, known = column
    series = polars.Series(values)
    return series if known.all() else series.set(polars.Series(~known), None)
