"""Frames of selected episodes as tensors in memory, read from the tables of a dataset.

Columns are tensors, whose memory worker processes share: after a fork, or as torch's shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from robo_orchard_lab.data.lerobot.format import (
    INDEX_FEATURES,
    DatasetInfo,
    Episodes,
    Feature,
    LeRobotDatasetError,
    read_table,
    require,
)

_VECTORS = ("action", "observation.")
"""Columns that keep an axis of size 1, which policies expect; lerobot drops it."""


@dataclass(frozen=True)
class Texts:
    """Column of texts, each distinct text stored once."""

    distinct: list[str]
    codes: torch.Tensor

    def at(self, row: int) -> str:
        """Return the text of a row."""
        return self.distinct[int(self.codes[row])]


@dataclass(frozen=True)
class EncodedImages:
    """Column of PNG or JPEG files, one after another."""

    data: torch.Tensor
    """Bytes of all files, uint8."""
    ends: torch.Tensor
    """End of each file in `data`."""

    def at(self, row: int) -> bytes:
        """Return the encoded image of a row."""
        start = int(self.ends[row - 1]) if row else 0
        return self.data[start : int(self.ends[row])].numpy().tobytes()


Column = torch.Tensor | Texts | EncodedImages


@dataclass(frozen=True)
class Frames:
    """All frames of the selected episodes, ordered by episode and frame.

    Attributes:
        columns: Values by feature; a tensor has shape (frames, ...).
        first: Row of the first frame of each frame's episode.
        last: Row of the last frame of each frame's episode.
    """

    columns: dict[str, Column]
    first: torch.Tensor
    last: torch.Tensor

    def __len__(self) -> int:
        return len(self.first)


def load_frames(
    folder: Path,
    info: DatasetInfo,
    episodes: Episodes,
    selected: Sequence[int],
    names: Sequence[str],
) -> Frames:
    """Read the columns ``names`` and the index columns of the ``selected``, sorted episodes.

    Floats become float32, integers int64. A column of shape (1,) becomes numbers, except actions
    and observations. Videos have no column.

    Raises:
        LeRobotDatasetError: a table is missing or truncated, contradicts ``info.json`` or the
            table of episodes, or has values that are not finite.
    """
    stored = [n for n in (*INDEX_FEATURES, *names) if info.features[n].dtype != "video"]
    stored = [*dict.fromkeys(stored)]
    chosen = np.asarray(selected, dtype=np.int64)
    places = np.stack([episodes.chunk_index[chosen], episodes.file_index[chosen]], axis=1)
    parts: dict[str, list[Any]] = {name: [] for name in stored}
    for chunk_index, file_index in np.unique(places, axis=0).tolist():
        path = folder / info.data_file(chunk_index, file_index)
        inside = chosen[(places == (chunk_index, file_index)).all(axis=1)]
        table = _read_episodes_of(path, stored, inside)
        own = _check_rows(path, table, inside, episodes, info)
        for name in stored:
            value = _convert(path, name, info.features[name], table[name])
            if isinstance(value, np.ndarray) and value.dtype.kind == "f":
                _check_finite(path, name, value, *own)
            parts[name].append(value)
    lengths = torch.from_numpy(episodes.length[chosen])
    ends = lengths.cumsum(0)
    return Frames(
        columns={name: _join(values) for name, values in parts.items()},
        first=(ends - lengths).repeat_interleave(lengths),
        last=(ends - 1).repeat_interleave(lengths),
    )


def _read_episodes_of(path: Path, names: Sequence[str], inside: NDArray[np.int64]) -> Any:
    """Read the rows of some episodes; only the row groups with such rows are read."""
    compute = require("pyarrow.compute", "reading a LeRobotDataset")
    is_inside = compute.field("episode_index").isin(inside.tolist())
    return read_table(path, names, filters=is_inside)


def _check_rows(
    path: Path, table: Any, inside: NDArray[np.int64], episodes: Episodes, info: DatasetInfo
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return episode and frame index of each row, after a comparison with the table of episodes."""
    episode = _convert(
        path, "episode_index", info.features["episode_index"], table["episode_index"]
    )
    frame = _convert(path, "frame_index", info.features["frame_index"], table["frame_index"])
    lengths = episodes.length[inside]
    found = np.bincount(np.searchsorted(inside, episode), minlength=len(inside))
    if not np.array_equal(found, lengths):
        wrong = int((found != lengths).argmax())
        raise LeRobotDatasetError(
            f"{path}: expected {lengths[wrong]} frames of episode {inside[wrong]}, as in "
            f"meta/episodes, found {found[wrong]}"
        )
    starts = np.cumsum(lengths) - lengths
    is_ordered = np.array_equal(episode, np.repeat(inside, lengths)) and np.array_equal(
        frame, np.arange(len(episode)) - np.repeat(starts, lengths)
    )
    if not is_ordered:
        raise LeRobotDatasetError(
            f"{path}: expected rows ordered by episode_index and frame_index, frames from 0"
        )
    return episode, frame


def _convert(path: Path, name: str, feature: Feature, column: Any) -> Any:
    """Return a column as an array of shape (rows, ...), or as texts or encoded images."""
    where = f"{path}: {name}"
    if column.null_count:
        raise LeRobotDatasetError(f"{where}: expected a value in each row, found missing ones")
    values = column.combine_chunks()
    rows = len(values)
    kind = str(values.type)
    if feature.dtype == "string":
        if kind not in ("string", "large_string"):
            raise LeRobotDatasetError(f"{where}: expected texts, found {kind}")
        coded = values.dictionary_encode()
        codes = coded.indices.to_numpy().astype(np.int64)
        return Texts(coded.dictionary.to_pylist(), torch.from_numpy(codes))
    if feature.dtype == "image":
        return _encoded_images(where, values)
    depth = 0
    while "list" in str(values.type).partition("<")[0] or hasattr(values, "storage"):
        if hasattr(values, "storage"):  # an extension type, such as Array2D of datasets
            values = values.storage
            continue
        _check_lists(where, feature, values, depth)
        values = values.flatten()
        depth += 1
    shape = () if depth == 0 and feature.shape == (1,) else feature.shape
    if depth != len(shape) or values.null_count:
        raise LeRobotDatasetError(
            f"{where}: expected values of shape {feature.shape} as in info.json, found {kind}"
        )
    array = values.to_numpy(zero_copy_only=False)
    kinds = {"f": np.float32, "i": np.int64, "u": np.int64, "b": np.bool_}
    if array.dtype.kind not in kinds:
        raise LeRobotDatasetError(f"{where}: expected {feature.dtype}, found {kind}")
    if name.startswith(_VECTORS):
        shape = feature.shape
    return np.array(array.reshape(rows, *shape), dtype=kinds[array.dtype.kind])


def _check_lists(where: str, feature: Feature, values: Any, depth: int) -> None:
    compute = require("pyarrow.compute", "reading a LeRobotDataset")
    expected = feature.shape[depth] if depth < len(feature.shape) else None
    lengths = compute.list_value_length(values).unique().to_pylist()
    if lengths not in ([], [expected]):
        raise LeRobotDatasetError(
            f"{where}: expected values of shape {feature.shape} as in info.json, found lists of "
            f"{', '.join(map(str, lengths[:3]))}"
        )


def _encoded_images(where: str, values: Any) -> EncodedImages:
    compute = require("pyarrow.compute", "reading a LeRobotDataset")
    try:
        files = values.field("bytes")
    except (KeyError, AttributeError) as error:
        raise LeRobotDatasetError(
            f"{where}: expected encoded images with a field 'bytes', found {values.type}"
        ) from error
    if files.null_count:
        raise LeRobotDatasetError(
            f"{where}: expected images within the table, found paths of other files"
        )
    sizes = compute.binary_length(files).to_numpy(zero_copy_only=False).astype(np.int64)
    data = np.concatenate([np.frombuffer(file, np.uint8) for file in files.to_pylist()])
    return EncodedImages(torch.from_numpy(data), torch.from_numpy(np.cumsum(sizes)))


def _check_finite(
    path: Path,
    name: str,
    values: NDArray[Any],
    episode: NDArray[np.int64],
    frame: NDArray[np.int64],
) -> None:
    is_finite = np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    if not is_finite.all():
        row = int(np.argmin(is_finite))
        raise LeRobotDatasetError(
            f"{path}: {name}: expected finite values, found {values[row].tolist()} at frame "
            f"{frame[row]} of episode {episode[row]}; leave out the episode with episodes=[...], "
            "or the column with columns=[...]"
        )


def _join(parts: list[Any]) -> Column:
    if isinstance(parts[0], Texts):
        distinct: dict[str, int] = {}
        codes = []
        for part in parts:
            new = [distinct.setdefault(text, len(distinct)) for text in part.distinct]
            codes.append(torch.tensor(new)[part.codes])
        return Texts([*distinct], torch.cat(codes))
    if isinstance(parts[0], EncodedImages):
        starts = np.cumsum([0, *(len(part.data) for part in parts[:-1])]).tolist()
        ends = [part.ends + start for part, start in zip(parts, starts, strict=True)]
        return EncodedImages(torch.cat([part.data for part in parts]), torch.cat(ends))
    return torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts))
