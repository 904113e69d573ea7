"""Outputs of a model for each sample of a data set, and their files."""

from __future__ import annotations

import importlib.util
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from operator import index
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors.torch import save

from robo_orchard_lab.pipeline.batch_processor import describe_batch
from robo_orchard_lab.pipeline.errors import BatchProcessorError, PipelineConfigError
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.metrics.exchange import RankData
from robo_orchard_lab.pipeline.run.durable import make_folder, replace_file

logger = job_logger(__name__)

INDEX = "index"
"""Name of the sample's index in files."""
_OUTPUT = "output"

Column: TypeAlias = torch.Tensor | list[Any]
"""Values with one row for each sample: a tensor, or a list of tensors or plain values."""


class Predictions:
    """Outputs for each sample, by name, in the order of the data.

    Tensors, arrays and lists with one entry for each sample are kept, on the host. A tensor that
    the processor returns alone is named ``output``; parts of mappings and tuples are named by their
    keys, such as ``boxes.scores`` or ``output.0``. Other parts, such as a loss, are left out.

    >>> predictions = Predictions()
    >>> predictions.add(predictions.rows_of({"score": torch.ones(2), "loss": torch.ones(())}, 2))
    >>> predictions.indices, predictions.outputs
    ([0, 1], {'score': tensor([1., 1.])})

    Args:
        source: name of the function that returned the outputs, for errors.
    """

    def __init__(self, source: str = "forward") -> None:
        self.indices: list[int] = []
        """Dataset index of each sample, or its position in data without indices."""
        self._source = source
        self._columns: dict[str, list[Column]] = {}
        self._has_warned = False

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def outputs(self) -> dict[str, Column]:
        """Outputs by name; a list where the samples' tensors differ in shape or type."""
        return {name: _joined(parts) for name, parts in self._columns.items()}

    # --- collect -----------------------------------------------------------------------------

    def rows_of(self, outputs: Any, samples: int, indices: Any = None) -> RankData:
        """Return the outputs of a batch as columns for :meth:`add`, on any rank.

        Args:
            outputs: as the batch processor returned them.
            samples: number of samples of the batch.
            indices: their dataset indices; None for positions.

        Raises:
            BatchProcessorError: no part of the outputs has a row for each sample.
        """
        if samples == 0:
            return RankData("", (), ())
        left_out: list[str] = []
        columns = dict(_columns(outputs, samples, "", left_out))
        if not columns:
            raise BatchProcessorError(
                f"{self._source} returned no output with a row for each sample: expected tensors "
                f"or lists with {samples} rows, found {describe_batch(outputs, shapes=True)}; "
                "return (outputs, loss) with the outputs of the batch"
            )
        if INDEX in columns:
            raise BatchProcessorError(
                f"{self._source} returned an output named {INDEX!r}, the name of the sample's "
                "index; rename it"
            )
        if left_out and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "left out %s of %s: not one row for each sample", ", ".join(left_out), self._source
            )
        try:
            indices = indices and [*map(index, indices)]
        except TypeError:  # no numbers
            indices = None
        tensors = {name: value for name, value in columns.items() if torch.is_tensor(value)}
        lists = {name: value for name, value in columns.items() if name not in tensors}
        label = [samples, indices, [*columns], lists]
        return RankData(json.dumps(label), (), [*tensors.values()])

    def add(self, rows: RankData) -> None:
        """Add the rows of a batch; ranks in the order of their batches.

        Raises:
            BatchProcessorError: the names differ from those of earlier batches.
        """
        if not rows.label:
            return
        samples, indices, names, lists = json.loads(rows.label)
        first = len(self.indices)
        self.indices += range(first, first + samples) if indices is None else indices
        if first and {*names} != {*self._columns}:
            raise BatchProcessorError(
                f"{self._source} returned outputs that differ between batches: expected "
                f"{', '.join(self._columns)}, found {', '.join(names)}; return the same outputs "
                "for every batch, each with a row for each sample"
            )
        tensors = iter(rows.tensors)
        for name in names:
            column = lists[name] if name in lists else next(tensors)
            self._columns.setdefault(name, []).append(column)

    # --- files -------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a file by its suffix: ``.jsonl``, ``.npz``, ``.parquet`` or ``.safetensors``.

        The file is replaced atomically. JSON lines have an object for each sample; NaN and
        infinities are texts. Parquet has a column for each output, with lists for arrays; the
        other files have an array for each output. All have the samples' indices as ``index``.
        bfloat16 becomes float32 in ``.npz`` and ``.parquet``.

        Raises:
            PipelineConfigError: an unknown suffix, or an output that is no array, such as text.
        """
        path = Path(path)
        data = check_suffix(path)(self)
        make_folder(path.parent)
        replace_file(path, data)

    def _to_jsonl(self) -> bytes:
        columns = {name: map(_plain, column) for name, column in self.outputs.items()}
        rows = zip(self.indices, *columns.values(), strict=True)
        names = (INDEX, *columns)
        lines = (json.dumps(dict(zip(names, row, strict=True)), allow_nan=False) for row in rows)
        return "".join(f"{line}\n" for line in lines).encode()

    def _to_npz(self) -> bytes:
        arrays: dict[str, Any] = {INDEX: np.array(self.indices, dtype=np.int64)}
        for name, column in self.outputs.items():
            if isinstance(column, torch.Tensor):
                is_unknown = column.dtype is torch.bfloat16
                arrays[name] = (column.float() if is_unknown else column).numpy()
            else:
                arrays[name] = self._array(name, column, "biufU")
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        return buffer.getvalue()

    def _to_parquet(self) -> bytes:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: dict[str, Any] = {INDEX: pa.array(self.indices, pa.int64())}
        for name, column in self.outputs.items():
            if isinstance(column, torch.Tensor):
                is_unknown = column.dtype is torch.bfloat16
                array = (column.float() if is_unknown else column).contiguous().numpy()
                flat = pa.array(array.reshape(-1))
                for size in reversed(array.shape[1:]):
                    flat = pa.FixedSizeListArray.from_arrays(flat, size)
                columns[name] = flat
                continue
            try:
                columns[name] = pa.array([_plain(row, keep_nan=True) for row in column])
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise PipelineConfigError(
                    f"the output {name!r} has rows of different types, which Parquet can't hold: "
                    f"{error}; write a .jsonl file"
                ) from error
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns), buffer)
        return buffer.getvalue()

    def _to_safetensors(self) -> bytes:
        tensors = {INDEX: torch.tensor(self.indices)}
        for name, column in self.outputs.items():
            if isinstance(column, torch.Tensor):
                tensors[name] = column
            else:
                tensors[name] = torch.from_numpy(self._array(name, column, "biuf"))
        return save({name: tensor.contiguous() for name, tensor in tensors.items()})

    def _array(self, name: str, column: list[Any], kinds: str) -> Any:
        """Return an array of plain values of the kinds of NumPy, such as ``"f"`` for floats."""
        found = "rows of different shapes or types"
        if not any(map(torch.is_tensor, column)):
            try:
                array = np.array(column)
            except ValueError:  # lists of different lengths
                array = np.array(None)
            if array.dtype.kind in kinds:
                return array
            found = f"values such as {column[0]!r:.60}"
        raise PipelineConfigError(
            f"the output {name!r} has {found}, which this file can't hold; write a .jsonl file"
        )


_FORMATS: dict[str, Callable[[Predictions], bytes]] = {
    ".jsonl": Predictions._to_jsonl,
    ".npz": Predictions._to_npz,
    ".parquet": Predictions._to_parquet,
    ".safetensors": Predictions._to_safetensors,
}


def check_suffix(path: Path) -> Callable[[Predictions], bytes]:
    """Return the function that encodes a file by its suffix.

    Raises:
        PipelineConfigError: the suffix is unknown, or a package is missing.
    """
    if path.suffix not in _FORMATS:
        raise PipelineConfigError(
            f"expected a file ending in {', '.join(_FORMATS)}, found {str(path)!r}; choose one of "
            "these endings"
        )
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise PipelineConfigError(
            "a .parquet file requires pyarrow, which is not installed; "
            'pip install "robo-orchard-hooks[robotics]"'
        )
    return _FORMATS[path.suffix]


def _columns(
    value: Any, samples: int, name: str, left_out: list[str]
) -> Iterator[tuple[str, Column]]:
    """Yield the parts with a row for each sample, with their names."""
    own_name = name or _OUTPUT
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        value = torch.from_numpy(value)
    if isinstance(value, torch.Tensor):
        if value.dim() and len(value) == samples:
            yield own_name, value.detach()
        else:
            left_out.append(f"{own_name!r} ({describe_batch(value, shapes=True)})")
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _columns(part, samples, f"{name}.{key}" if name else str(key), left_out)
    elif is_dataclass(value) and not isinstance(value, type):
        named = {field.name: getattr(value, field.name) for field in fields(value)}
        yield from _columns(named, samples, name, left_out)
    elif isinstance(value, (list, tuple)):
        if hasattr(value, "_asdict"):
            yield from _columns(value._asdict(), samples, name, left_out)
        elif _are_samples(value, samples):
            yield own_name, [_plain(part, keep_nan=True) for part in value]
        else:
            for number, part in enumerate(value):
                yield from _columns(part, samples, f"{own_name}.{number}", left_out)
    elif value is not None:
        left_out.append(f"{own_name!r} ({type(value).__name__})")


def _are_samples(value: Sequence[Any], samples: int) -> bool:
    """Return True for a list of samples, and False for one of columns."""
    are_columns = all(isinstance(p, torch.Tensor) and p.shape[:1] == (samples,) for p in value)
    return len(value) == samples and not are_columns


_TEXT_OF = {math.inf: "Infinity", -math.inf: "-Infinity"}


def _plain(value: Any, *, keep_nan: bool = False) -> Any:
    """Return plain data for JSON."""
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value) and not keep_nan:
        return _TEXT_OF.get(value, "NaN")
    if isinstance(value, Mapping):
        return {str(key): _plain(part, keep_nan=keep_nan) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part, keep_nan=keep_nan) for part in value]
    if isinstance(value, complex):
        return [value.real, value.imag]
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise PipelineConfigError(
        f"expected outputs of numbers, texts, tensors, lists and mappings, found a "
        f"{type(value).__name__}; convert it in the batch processor"
    )


def _joined(parts: list[Column]) -> Column:
    first = parts[0]
    if isinstance(first, torch.Tensor) and all(
        isinstance(p, torch.Tensor) and (p.dtype, p.shape[1:]) == (first.dtype, first.shape[1:])
        for p in parts
    ):
        return torch.cat(parts)  # type: ignore[arg-type]  # all are tensors
    return [row for part in parts for row in part]
