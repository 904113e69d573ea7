"""Map-style dataset of the frames of a LeRobotDataset v3.0 folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from robo_orchard_core.utils.config.errors import describe, suggest_name
from robo_orchard_lab.data.lerobot.columns import EncodedImages, Texts, load_frames
from robo_orchard_lab.data.lerobot.format import (
    INDEX_FEATURES,
    Feature,
    LeRobotDatasetError,
    episode_files,
    read_episodes,
    read_info,
    read_table,
    read_tasks,
    require,
)
from robo_orchard_lab.data.lerobot.statistics import (
    ImageStatistics,
    Statistics,
    array_statistics,
    merge_statistics,
)
from robo_orchard_lab.data.lerobot.video import VideoFrames, decode_image

ACTION = "action"
_STATE = "observation.state"
_REPORTED = ("mean", "std", "min", "max")
_SAMPLED_IMAGES = 200
_SENT_AS_BYTES = 1 << 20  # larger tensors would be copied more often than as shared memory


class Sample(dict[str, Any]):
    """Sample, or batch of torch's default collation, with a fast transfer between processes.

    A worker process of a ``DataLoader`` sends small tensors as bytes. Torch's transfer as shared
    memory costs the training process about 0.4 ms for each tensor.
    """

    def __copy__(self) -> Sample:
        return Sample(self)

    def __reduce__(self) -> tuple[Any, ...]:
        packed = {
            name: value.numpy()
            for name, value in self.items()
            if isinstance(value, torch.Tensor) and value.nbytes <= _SENT_AS_BYTES
        }
        return _unpack, ({**self, **packed}, [*packed])


def _unpack(values: dict[str, Any], packed: list[str]) -> Sample:
    return Sample(values, **{name: torch.from_numpy(values[name]) for name in packed})


class LeRobotDataset(Dataset[dict[str, Any]]):
    """Frames of a local LeRobotDataset v3.0, with chunks of future actions.

    A sample is a dict of tensors with lerobot's keys: ``observation.state`` (S,) float32,
    ``observation.images.NAME`` (3, H, W) float32 in [0, 1], ``action`` (T, A) with
    ``action_is_pad`` (T,) bool, ``timestamp``, ``frame_index``, ``episode_index``, ``index``,
    ``task_index``, and the text ``task``. After the end of an episode, a chunk repeats its last
    action, marked in ``action_is_pad``. Floats are float32, integers int64.

    The columns are in memory, shared by worker processes; access costs the same at any index.
    Videos are decoded on access, in the process that loads the sample.

    Args:
        folder: Dataset, relative to the working directory.
        episodes: Indices of the episodes to read; ``train`` or ``validation``: a seeded split by
            episode; None: all.
        validation_fraction: Share of the episodes in the validation split, at least one episode.
        split_seed: Seed of the split.
        chunk_size: T, number of actions in a sample: of this frame and of the next ones.
        delta_timestamps: Offsets in seconds by column, multiples of 1 / fps. Values have a leading
            axis, and ``COLUMN_is_pad`` marks offsets outside of the episode.
        columns: Columns to read; None: all. Without a camera, its video isn't decoded.
        tolerance_s: Largest distance in seconds between a time and a video's frame, and between
            an offset and a multiple of 1 / fps.
        frame_cache_mb: Size of the cache of decoded frames, in MiB, for each worker process.

    Attributes:
        folder: Folder of the dataset.
        fps: Frames per second.
        features: Type and shape of each column that is read, as plain data; cameras have the shape
            (3, H, W).
        cameras: Names of the camera columns that are read.
        state_dim: Size of ``observation.state``.
        action_dim: Size of ``action``.
        episode_indices: Episodes that are read, sorted.
        tasks: Task texts by index.
        robot_type: Name of the robot, or None.

    Raises:
        LeRobotDatasetError: the folder is no complete v3.0 dataset, or an argument does not fit it.
        ModuleNotFoundError: pyarrow is missing, or PyAV for cameras.
    """

    def __init__(
        self,
        folder: str | Path,
        episodes: list[int] | Literal["train", "validation"] | None = None,
        *,
        validation_fraction: float = 0.1,
        split_seed: int = 0,
        chunk_size: int = 1,
        delta_timestamps: dict[str, list[float]] | None = None,
        columns: list[str] | None = None,
        tolerance_s: float = 1e-4,
        frame_cache_mb: float = 64,
    ) -> None:
        self.folder = Path(folder)
        self._info = read_info(self.folder)
        self.fps = self._info.fps
        self.robot_type = self._info.robot_type
        if not 0 <= tolerance_s < 0.5 / self.fps:
            raise LeRobotDatasetError(
                f"tolerance_s: expected seconds from 0 to {0.5 / self.fps:.4f}, half a frame, "
                f"found {tolerance_s!r}"
            )
        self._names = self._selected_columns(columns)
        self._offsets = self._frame_offsets(chunk_size, delta_timestamps, tolerance_s)
        self._episodes = read_episodes(self.folder, self._info)
        count = len(self._episodes)
        train, validation = split_episodes(count, validation_fraction, split_seed)
        if episodes == "validation" and not validation:
            raise LeRobotDatasetError(
                f"{self.folder}: expected at least 2 episodes and validation_fraction > 0 for a "
                f"validation split, found {count} and {validation_fraction}"
            )
        splits = {"train": train, "validation": validation}
        if isinstance(episodes, str) and episodes not in splits:
            raise LeRobotDatasetError(
                f"episodes: expected train, validation or a list of indices, found {episodes!r}"
            )
        self.episode_indices = (
            splits[episodes] if isinstance(episodes, str) else _checked_episodes(episodes, count)
        )
        self._statistics_of = train if isinstance(episodes, str) else self.episode_indices
        self.tasks = read_tasks(self.folder)
        self._frames = load_frames(
            self.folder, self._info, self._episodes, self.episode_indices, self._names
        )
        task_index = self._frames.columns["task_index"]
        if len(self) and not 0 <= int(task_index.min()) <= int(task_index.max()) < len(self.tasks):  # type: ignore[union-attr]  # a tensor
            raise LeRobotDatasetError(
                f"{self.folder}: task_index: expected indices below {len(self.tasks)}, the number "
                "of tasks"
            )
        self._videos = VideoFrames(frame_cache_mb, tolerance_s)
        self._check_videos()

    def _selected_columns(self, columns: Sequence[str] | None) -> list[str]:
        known = self._info.features
        if columns is None:
            return [*known]
        for name in columns:
            if name not in known:
                raise LeRobotDatasetError(
                    f"columns: {self.folder} has no column {name!r}; "
                    f"{suggest_name(name, [*known], 'it has')}"
                )
        return [name for name in known if name in columns]

    def _frame_offsets(
        self,
        chunk_size: int,
        delta_timestamps: Mapping[str, Sequence[float]] | None,
        tolerance_s: float,
    ) -> dict[str, torch.Tensor]:
        """Return the offsets in frames of each column with a leading axis."""
        if chunk_size < 1:
            raise LeRobotDatasetError(f"chunk_size: expected a number >= 1, found {chunk_size}")
        offsets: dict[str, torch.Tensor] = {}
        if ACTION in self._names:
            offsets[ACTION] = torch.arange(chunk_size)
        elif chunk_size > 1:
            raise LeRobotDatasetError(
                f"chunk_size: expected a column 'action' in {self.folder}, found "
                f"{', '.join(self._names)}"
            )
        for name, seconds in (delta_timestamps or {}).items():
            if name not in self._names:
                raise LeRobotDatasetError(
                    f"delta_timestamps: no column {name!r} is read; "
                    f"{suggest_name(name, self._names, 'the columns are')}"
                )
            if name == ACTION and chunk_size > 1:
                raise LeRobotDatasetError(
                    "delta_timestamps: 'action' can't be combined with chunk_size; remove one"
                )
            if not seconds:
                raise LeRobotDatasetError(f"delta_timestamps: {name}: expected at least one offset")
            frames = np.asarray(seconds, dtype=np.float64) * self.fps
            far = np.abs(frames - np.round(frames)) / self.fps > tolerance_s
            if far.any() or not np.isfinite(frames).all():
                raise LeRobotDatasetError(
                    f"delta_timestamps: {name}: expected multiples of 1 / {self.fps} s, found "
                    f"{seconds[int(far.argmax())]!r}"
                )
            offsets[name] = torch.from_numpy(np.round(frames).astype(np.int64))
        return offsets

    def _check_videos(self) -> None:
        """Check that PyAV and all video files exist, before training starts."""
        if self.cameras:
            require("av", "cameras of a LeRobotDataset")
        chosen = np.asarray(self.episode_indices)
        for key in self.cameras:
            if self._info.features[key].dtype != "video":
                continue
            places = self._episodes.videos[key]
            pairs = np.stack([places.chunk_index[chosen], places.file_index[chosen]], axis=1)
            for chunk, file in np.unique(pairs, axis=0).tolist():
                path = self.folder / self._info.video_file(key, chunk, file)
                if not path.is_file():
                    raise LeRobotDatasetError(
                        f"{path}: expected a video, found none; copy the missing file, or leave "
                        "out the camera with columns=[...]"
                    )

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        """Return type and shape of each column that is read."""
        return {name: _plain(self._info.features[name]) for name in self._names}

    @property
    def cameras(self) -> list[str]:
        """Return the names of the camera columns that are read."""
        return [name for name in self._names if self._info.features[name].is_camera]

    @property
    def state_dim(self) -> int:
        """Return the size of ``observation.state``."""
        return self._size_of(_STATE)

    @property
    def action_dim(self) -> int:
        """Return the size of ``action``."""
        return self._size_of(ACTION)

    def _size_of(self, name: str) -> int:
        feature = self._info.features.get(name)
        if feature is None or len(feature.shape) != 1:
            found = "none" if feature is None else f"shape {feature.shape}"
            raise LeRobotDatasetError(
                f"{self.folder}: expected a column {name!r} with one axis, found {found}"
            )
        return feature.shape[0]

    @cached_property
    def statistics(self) -> dict[str, dict[str, Any]]:
        """Statistics of the numeric columns and cameras that are read, as plain data.

        ``mean``, ``std``, ``min`` and ``max`` by column, of the episodes that are read; of the
        train split's for both splits. They are merged from the statistics of each episode in
        ``meta/episodes``; columns without usable ones are computed from the data, cameras from 200
        frames. lerobot 0.4 stores a ``std`` of 0 for images, which isn't usable.
        """
        names = [
            name
            for name in self._names
            if name not in INDEX_FEATURES and self._info.features[name].dtype != "string"
        ]
        stored = self._stored_statistics(names)
        found = {name: stored.get(name) or self._computed_statistics(name) for name in names}
        return {
            name: {key: np.asarray(each[key]).tolist() for key in _REPORTED}
            for name, each in found.items()
        }

    def _stored_statistics(self, names: Sequence[str]) -> dict[str, Statistics]:
        """Return the merged statistics of ``meta/episodes`` that are complete and plausible."""
        keys = (*_REPORTED, "count")
        parts: dict[str, list[Any]] = {f"{name}/{key}": [] for name in names for key in keys}
        number = []
        for path in episode_files(self.folder):
            table = read_table(path)
            number += table["episode_index"].to_pylist()
            for name, values in parts.items():
                column = f"stats/{name}"
                rows = table[column].to_pylist() if column in table.schema.names else []
                values += rows if len(rows) == len(table) else [None] * len(table)
        rows_of = np.argsort(number)[np.asarray(self._statistics_of)]
        found = {}
        for name in names:
            feature = self._info.features[name]
            shape = (3, 1, 1) if feature.is_camera else feature.shape[-1:]
            try:
                stacked = {
                    key: np.array([parts[f"{name}/{key}"][row] for row in rows_of], np.float64)
                    for key in keys
                }
            except (TypeError, ValueError):  # missing, or of different shapes
                continue
            sizes = {values.shape[1:] for key, values in stacked.items() if key != "count"}
            is_valid: Any = sizes == {shape} and all(np.isfinite(v).all() for v in stacked.values())
            is_valid = is_valid and (stacked["count"] > 0).all() and (stacked["std"] >= 0).all()
            if is_valid and feature.is_camera:
                is_valid = not (stacked["std"] == 0)[stacked["max"] > stacked["min"]].any()
            if is_valid:
                found[name] = merge_statistics(stacked)
        return found

    def _computed_statistics(self, name: str) -> Statistics:
        source = self
        if self._statistics_of != self.episode_indices:
            source = LeRobotDataset(self.folder, self._statistics_of, columns=[name])
        feature = source._info.features[name]
        if not feature.is_camera:
            column = source._frames.columns[name]
            assert isinstance(column, torch.Tensor)
            return array_statistics(column.numpy())
        images = ImageStatistics()
        count = min(len(source), _SAMPLED_IMAGES)
        rows = torch.from_numpy(np.linspace(0, len(source) - 1, count).round().astype(np.int64))
        for image in source._images(name, feature, rows):
            images.add(image.permute(1, 2, 0).numpy())
        return images.result()

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = index + len(self) if index < 0 else index
        self._check_rows(index, row, row)
        frames = self._frames
        first, last = int(frames.first[row]), int(frames.last[row])
        sample = Sample()
        for name in self._names:
            column = frames.columns.get(name)
            offsets = self._offsets.get(name)
            if offsets is None and isinstance(column, torch.Tensor):
                sample[name] = column[row].clone()  # else a change would reach the dataset
            elif offsets is None:
                sample[name] = self._values(name, torch.tensor([row]))[0]
            else:
                wanted = offsets + row
                clamped = wanted.clamp(first, last)
                sample[name] = self._values(name, clamped)
                sample[f"{name}_is_pad"] = wanted != clamped
        if "task_index" in sample:
            sample["task"] = self.tasks[int(sample["task_index"])]
        return sample

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return the samples of a batch; columns are gathered, and videos decoded, in one pass."""
        rows = torch.tensor([*indices], dtype=torch.int64)
        rows = torch.where(rows < 0, rows + len(self), rows)
        if len(rows):
            self._check_rows([*indices], int(rows.min()), int(rows.max()))
        first, last = self._frames.first[rows], self._frames.last[rows]
        columns: dict[str, Any] = {}
        for name in self._names:
            if (offsets := self._offsets.get(name)) is None:
                columns[name] = self._values(name, rows)
                continue
            wanted = rows[:, None] + offsets
            clamped = wanted.clamp(first[:, None], last[:, None])
            values = self._values(name, clamped.flatten())
            if isinstance(values, torch.Tensor):
                columns[name] = values.unflatten(0, clamped.shape)
            else:
                size = len(offsets)
                columns[name] = [values[at : at + size] for at in range(0, len(values), size)]
            columns[f"{name}_is_pad"] = wanted != clamped
        if "task_index" in columns:
            columns["task"] = [self.tasks[number] for number in columns["task_index"].tolist()]
        return [
            Sample(zip(columns, values, strict=True))
            for values in zip(*columns.values(), strict=True)
        ]

    def _check_rows(self, indices: Any, least: int, largest: int) -> None:
        if least < 0 or largest >= len(self):
            raise IndexError(f"expected indices below {len(self)}, found {indices!r:.80}")

    def _values(self, name: str, rows: torch.Tensor) -> Any:
        """Return the values of a column at some rows: a tensor, or a list of texts."""
        feature = self._info.features[name]
        if feature.is_camera:
            return torch.stack(self._images(name, feature, rows)).float().div_(255)
        column = self._frames.columns[name]
        if isinstance(column, Texts):
            return [column.at(row) for row in rows.tolist()]
        assert isinstance(column, torch.Tensor)
        return column[rows]

    def _images(self, name: str, feature: Feature, rows: torch.Tensor) -> list[torch.Tensor]:
        """Return the images of a camera at some rows, each of shape (3, H, W), uint8."""
        columns = self._frames.columns
        if feature.dtype == "image":
            encoded = columns[name]
            assert isinstance(encoded, EncodedImages)
            return [self._decoded(name, feature, encoded.at(row), row) for row in rows.tolist()]
        places = self._episodes.videos[name]
        episode, timestamp = columns["episode_index"], columns["timestamp"]
        assert isinstance(episode, torch.Tensor)
        assert isinstance(timestamp, torch.Tensor)
        number = episode[rows].numpy()
        seconds = (places.from_timestamp[number] + timestamp[rows].double().numpy()).tolist()
        chunks, files = places.chunk_index[number].tolist(), places.file_index[number].tolist()
        by_file: dict[tuple[int, int], list[int]] = {}
        for at, place in enumerate(zip(chunks, files, strict=True)):
            by_file.setdefault(place, []).append(at)
        images: dict[int, torch.Tensor] = {}
        for place, inside in by_file.items():
            path = self.folder / self._info.video_file(name, *place)
            found = self._videos.read(path, [seconds[at] for at in inside], feature.image_size)
            images.update({at: found[seconds[at]] for at in inside})
        return [images[at] for at in range(len(rows))]

    def _decoded(self, name: str, feature: Feature, data: bytes, row: int) -> torch.Tensor:
        try:
            image = decode_image(data)
        except LeRobotDatasetError as error:
            raise LeRobotDatasetError(f"{self.folder}: {name}: row {row}: {error}") from error
        if image.shape[1:] != feature.image_size:
            raise LeRobotDatasetError(
                f"{self.folder}: {name}: expected images of {feature.image_size} as in info.json, "
                f"found {tuple(image.shape[1:])} at row {row}"
            )
        return image

    def __repr__(self) -> str:
        return (
            f"LeRobotDataset({str(self.folder)!r}, {len(self.episode_indices)} episodes, "
            f"{len(self)} frames at {self.fps} fps, {', '.join(self._names)})"
        )


def split_episodes(
    count: int, validation_fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Return the episodes of the train and of the validation split, sorted.

    >>> split_episodes(5, 0.4, seed=0)
    ([1, 2, 3], [0, 4])

    The split depends only on the arguments. Both splits have at least one episode if there are two
    and the fraction is positive.

    Raises:
        LeRobotDatasetError: the fraction isn't in [0, 1).
    """
    if not 0 <= validation_fraction < 1:
        raise LeRobotDatasetError(
            f"validation_fraction: expected a number in [0, 1), found {validation_fraction!r}"
        )
    size = round(count * validation_fraction)
    size = min(max(size, int(validation_fraction > 0)), max(count - 1, 0))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[size:]), sorted(order[:size])


def _checked_episodes(episodes: Sequence[int] | None, count: int) -> list[int]:
    if episodes is None:
        chosen = [*range(count)]
    else:
        chosen = sorted(set(episodes))
        if len(chosen) != len(episodes):
            raise LeRobotDatasetError(
                f"episodes: expected each index once, found {describe(episodes)}"
            )
    if not chosen:
        raise LeRobotDatasetError("episodes: expected at least one episode, found none")
    if not 0 <= chosen[0] <= chosen[-1] < count:
        raise LeRobotDatasetError(
            f"episodes: expected indices from 0 to {count - 1}, found {chosen[0]} to {chosen[-1]}"
        )
    return chosen


def _plain(feature: Feature) -> dict[str, Any]:
    shape = (3, *feature.image_size) if feature.is_camera else feature.shape
    return {"dtype": feature.dtype, "shape": [*shape]}
