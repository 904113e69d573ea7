"""Layout of a LeRobotDataset v3.0 folder: ``info.json``, tasks, episodes and file paths.

::

    meta/info.json                              features, fps, totals, path templates
    meta/stats.json                             statistics of all episodes
    meta/tasks.parquet                          task texts and their indices
    meta/episodes/chunk-000/file-000.parquet    one row for each episode: length, files, statistics
    data/chunk-000/file-000.parquet             one row for each frame
    videos/KEY/chunk-000/file-000.mp4           frames of many episodes, one after another
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robo_orchard_core.utils.config.errors import describe, shorten, suggest_name
from robo_orchard_core.utils.strict_json import JsonError, parse_json
from robo_orchard_core.utils.untrusted_text import path_problem

VERSION = "v3.0"
INFO_PATH = "meta/info.json"
STATS_PATH = "meta/stats.json"
TASKS_PATH = "meta/tasks.parquet"
EPISODES_FOLDER = "meta/episodes"
_CHUNK_FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
EPISODES_PATH = f"{EPISODES_FOLDER}/{_CHUNK_FILE}.parquet"
DATA_PATH = f"data/{_CHUNK_FILE}.parquet"
VIDEO_PATH = f"videos/{{video_key}}/{_CHUNK_FILE}.mp4"
FILES_PER_CHUNK = 1000
DATA_FILE_MB = 100
VIDEO_FILE_MB = 200

INDEX_FEATURES = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
"""Columns that each dataset has, with their types; `LeRobotWriter` fills them."""
CAMERA_TYPES = ("video", "image")
_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")
_FLOATS = ("float16", "float32", "float64")
FEATURE_TYPES = (*_FLOATS, *_INTEGERS, "bool", "string", *CAMERA_TYPES)
_MAX_INFO_BYTES = 16 << 20
_MAX_SIZE = 1 << 16
_MAX_FPS = 100_000
_NUMBER_FORMAT = re.compile(r"(0?[1-9])?d?")


class LeRobotDatasetError(ValueError):
    """Dataset folder that can't be read or written; the message names the file."""


def require(package: str, purpose: str) -> Any:
    """Import and return an optional package.

    Raises:
        ModuleNotFoundError: with the command that installs the package.
    """
    import importlib

    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise
        raise ModuleNotFoundError(
            f'{purpose} requires {error.name}: pip install "robo-orchard-hooks[robotics]"',
            name=error.name,
        ) from None


@dataclass(frozen=True)
class Feature:
    """Type and shape of one column.

    Attributes:
        dtype: One of `FEATURE_TYPES`.
        shape: Shape of one frame's value, as in ``info.json``: (H, W, 3) for cameras.
        names: Names of the dimensions, or None.
    """

    dtype: str
    shape: tuple[int, ...]
    names: Any = None

    @property
    def is_camera(self) -> bool:
        """Return True for a video or an image."""
        return self.dtype in CAMERA_TYPES

    @property
    def is_numeric(self) -> bool:
        """Return True for numbers and booleans."""
        return self.dtype not in (*CAMERA_TYPES, "string")

    @property
    def image_size(self) -> tuple[int, int]:
        """Return height and width of a camera, from (H, W, 3) or (3, H, W)."""
        first = self.shape[0] in (1, 3) and self.shape[2] not in (1, 3)
        return self.shape[1:] if first else self.shape[:2]  # type: ignore[return-value]  # of 3


@dataclass(frozen=True)
class DatasetInfo:
    """Checked content of ``meta/info.json``."""

    fps: float
    features: Mapping[str, Feature]
    total_episodes: int
    total_frames: int
    data_path: str = DATA_PATH
    video_path: str | None = VIDEO_PATH
    robot_type: str | None = None

    @property
    def cameras(self) -> list[str]:
        """Return the names of the camera features."""
        return [name for name, feature in self.features.items() if feature.is_camera]

    def data_file(self, chunk_index: int, file_index: int) -> str:
        """Return the path of a table of frames, relative to the dataset's folder."""
        return self.data_path.format(chunk_index=chunk_index, file_index=file_index)

    def video_file(self, key: str, chunk_index: int, file_index: int) -> str:
        """Return the path of a video, relative to the dataset's folder."""
        assert self.video_path is not None  # checked with the features
        return self.video_path.format(video_key=key, chunk_index=chunk_index, file_index=file_index)


def read_info(folder: Path) -> DatasetInfo:
    """Read and check ``meta/info.json``.

    Raises:
        LeRobotDatasetError: the folder is no dataset, was never finished, has another version, or
            its ``info.json`` is invalid.
    """
    path = folder / INFO_PATH
    if not path.is_file():
        raise LeRobotDatasetError(_explain_missing(folder))
    try:
        if path.stat().st_size > _MAX_INFO_BYTES:
            raise LeRobotDatasetError(f"{path}: larger than {_MAX_INFO_BYTES} bytes")
        document = parse_json(path.read_bytes(), max_depth=32)
        if not isinstance(document, dict):
            raise LeRobotDatasetError(f"expected an object, found {describe(document)}")
        return _parse_info(document)
    except (JsonError, LeRobotDatasetError, OSError) as error:
        raise LeRobotDatasetError(f"{path}: {error}") from error


def partial_folder(folder: Path) -> Path:
    """Return the folder in which `LeRobotWriter` records, next to the finished dataset."""
    return folder.with_name(f"{folder.name}.partial")


def _explain_missing(folder: Path) -> str:
    partial = partial_folder(folder)
    if partial.is_dir():
        return (
            f"{folder}: expected a finished dataset, found the unfinished recording {partial}; "
            "finish it with LeRobotWriter(..., resume=True).finalize()"
        )
    if not folder.is_dir():
        return (
            f"expected the folder of a LeRobotDataset, found no folder {str(folder)!r} in "
            f"{Path.cwd() if not folder.is_absolute() else folder.parent}"
        )
    return f"expected the folder of a LeRobotDataset, found no {INFO_PATH} in {folder}"


def _parse_info(document: dict[str, Any]) -> DatasetInfo:
    version = document.get("codebase_version")
    if version != VERSION:
        raise LeRobotDatasetError(
            f"expected codebase_version {VERSION!r}, found {describe(version)}{_remedy(version)}"
        )
    fps: Any = document.get("fps")
    is_number = isinstance(fps, int | float) and not isinstance(fps, bool)
    if not is_number or not 0 < fps <= _MAX_FPS:
        raise LeRobotDatasetError(f"fps: expected frames per second > 0, found {describe(fps)}")
    features = document.get("features")
    if not isinstance(features, dict) or not features:
        raise LeRobotDatasetError(f"features: expected a mapping, found {describe(features)}")
    parsed = {name: parse_feature(name, value) for name, value in features.items()}
    for name, dtype in INDEX_FEATURES.items():
        if name not in parsed or not parsed[name].is_numeric:
            raise LeRobotDatasetError(f"features: expected {name} of type {dtype}")
    has_video = any(feature.dtype == "video" for feature in parsed.values())
    names = {"chunk_index", "file_index"}
    video_path = document.get("video_path")
    if has_video:
        _check_template("video_path", video_path, {*names, "video_key"})
    _check_template("data_path", document.get("data_path"), names)
    totals = {}
    for name in ("total_episodes", "total_frames"):
        value = document.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise LeRobotDatasetError(f"{name}: expected a number >= 0, found {describe(value)}")
        totals[name] = value
    robot_type = document.get("robot_type")
    return DatasetInfo(
        fps=fps,
        features=parsed,
        data_path=document["data_path"],
        video_path=video_path if has_video else None,
        robot_type=robot_type if isinstance(robot_type, str) else None,
        **totals,
    )


def _remedy(version: Any) -> str:
    if isinstance(version, str) and version.startswith("v2."):
        return (
            "; convert the dataset with lerobot 0.4: python -m "
            "lerobot.datasets.v30.convert_dataset_v21_to_v30 --repo-id=NAME --root=FOLDER"
        )
    return "; this version is not supported"


def parse_feature(name: str, value: Any) -> Feature:
    """Return the checked feature of an ``info.json``, or of `LeRobotWriter`'s arguments.

    Raises:
        LeRobotDatasetError: name, type or shape are invalid; the message starts with the name.
    """
    where = f"features.{shorten(str(name), 80)}"
    if not isinstance(name, str) or not name or "/" in name or path_problem(name):
        raise LeRobotDatasetError(f"{where}: expected a name without '/' and '..'")
    if not isinstance(value, Mapping):
        raise LeRobotDatasetError(f"{where}: expected dtype and shape, found {describe(value)}")
    dtype: Any = value.get("dtype")
    shape: Any = value.get("shape")
    if dtype not in FEATURE_TYPES:
        raise LeRobotDatasetError(
            f"{where}.dtype: expected one of {', '.join(FEATURE_TYPES)}; found {describe(dtype)}"
        )
    is_shape = isinstance(shape, Sequence) and not isinstance(shape, str)
    if not is_shape or not all(type(n) is int and 1 <= n <= _MAX_SIZE for n in shape):
        raise LeRobotDatasetError(
            f"{where}.shape: expected sizes from 1 to {_MAX_SIZE}, found {describe(shape)}"
        )
    feature = Feature(dtype, tuple(shape), value.get("names"))
    if feature.is_camera and (len(shape) != 3 or not {shape[0], shape[2]} & {1, 3}):
        raise LeRobotDatasetError(
            f"{where}.shape: expected (height, width, 3) of a camera, found {feature.shape}"
        )
    if not 1 <= len(feature.shape) <= 5 or math.prod(feature.shape) > _MAX_SIZE**2:
        raise LeRobotDatasetError(f"{where}.shape: expected 1 to 5 sizes, found {feature.shape}")
    return feature


def _check_template(name: str, template: Any, fields: Collection[str]) -> None:
    """Check a path template, which comes from a stranger, before `str.format` evaluates it."""
    if not isinstance(template, str):
        raise LeRobotDatasetError(f"{name}: expected a path, found {describe(template)}")
    try:
        pieces = [*string.Formatter().parse(template)]
    except ValueError as error:
        raise LeRobotDatasetError(f"{name}: {error}, in {describe(template)}") from error
    for _, key, form, conversion in pieces:
        if key is None:
            continue
        allowed = "" if key == "video_key" else _NUMBER_FORMAT
        if key not in fields or conversion or not re.fullmatch(allowed, form or ""):
            raise LeRobotDatasetError(
                f"{name}: expected only {', '.join(sorted(fields))} in braces, such as "
                f"{{chunk_index:03d}}, found {describe(template)}"
            )
    example = template.format(chunk_index=0, file_index=0, video_key="camera")
    if problem := path_problem(example):
        raise LeRobotDatasetError(
            f"{name}: expected a path within the dataset, found {describe(template)}, which "
            f"{problem}"
        )


def read_table(path: Path, columns: Sequence[str] | None = None, filters: Any = None) -> Any:
    """Read columns and rows of a Parquet file with pyarrow.

    Raises:
        LeRobotDatasetError: the file is missing, truncated or lacks a column.
    """
    pyarrow = require("pyarrow", "reading a LeRobotDataset")
    parquet = require("pyarrow.parquet", "reading a LeRobotDataset")
    try:
        found = parquet.read_schema(path).names
        for name in columns or ():
            if name not in found:
                raise LeRobotDatasetError(
                    f"{path}: expected a column {name!r}; {suggest_name(name, found, 'it has')}"
                )
        return parquet.read_table(path, columns=columns, partitioning=None, filters=filters)
    except FileNotFoundError as error:
        raise LeRobotDatasetError(f"{path}: expected a Parquet file, found none") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise LeRobotDatasetError(
            f"{path}: expected a complete Parquet file: {shorten(str(error), 200)}; it was "
            "truncated, or its recording was never finished"
        ) from error


def read_tasks(folder: Path) -> list[str]:
    """Return the task texts by their index.

    Raises:
        LeRobotDatasetError: the table is missing or invalid.
    """
    path = folder / TASKS_PATH
    table = read_table(path)
    texts = [
        name
        for name, kind in zip(table.schema.names, map(str, table.schema.types), strict=True)
        if kind in ("string", "large_string")
    ]
    if "task_index" not in table.schema.names or len(texts) != 1:
        raise LeRobotDatasetError(
            f"{path}: expected task_index and one column of texts, found {table.schema.names}"
        )
    by_index = dict(
        zip(*(table[name].to_pylist() for name in ("task_index", texts[0])), strict=True)
    )
    if sorted(by_index) != [*range(table.num_rows)]:
        raise LeRobotDatasetError(f"{path}: expected task indices from 0 without a gap")
    return [str(by_index[index]) for index in range(table.num_rows)]


@dataclass(frozen=True)
class VideoPlaces:
    """Video file and start of each episode, for one camera."""

    chunk_index: NDArray[np.int64]
    file_index: NDArray[np.int64]
    from_timestamp: NDArray[np.float64]
    """Seconds in the file at which the episode's first frame is shown."""


@dataclass(frozen=True)
class Episodes:
    """Rows of ``meta/episodes`` by episode index."""

    length: NDArray[np.int64]
    chunk_index: NDArray[np.int64]
    file_index: NDArray[np.int64]
    videos: Mapping[str, VideoPlaces] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.length)


def episode_files(folder: Path) -> list[Path]:
    """Return the tables of ``meta/episodes`` in order.

    Raises:
        LeRobotDatasetError: there is none.
    """
    files = sorted((folder / EPISODES_FOLDER).glob("*/*.parquet"))
    if not files:
        raise LeRobotDatasetError(
            f"expected tables in {folder / EPISODES_FOLDER}, found none; the recording was never "
            "finished, or the files were not copied"
        )
    return files


def read_episodes(folder: Path, info: DatasetInfo) -> Episodes:
    """Read ``meta/episodes`` without statistics, and check it against ``info.json``.

    Raises:
        LeRobotDatasetError: a table is missing or truncated, or numbers contradict each other.
    """
    videos = [name for name, feature in info.features.items() if feature.dtype == "video"]
    numbers = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    numbers += [f"videos/{key}/{name}" for key in videos for name in ("chunk_index", "file_index")]
    seconds = [f"videos/{key}/from_timestamp" for key in videos]
    found: dict[str, list[NDArray[Any]]] = {name: [] for name in (*numbers, *seconds)}
    for path in episode_files(folder):
        table = read_table(path, [*found])
        for name, arrays in found.items():
            values = table[name].to_numpy()
            kind = np.float64 if name in seconds else np.int64
            is_valid = values.dtype.kind in ("if" if name in seconds else "i")
            if not is_valid or not np.isfinite(values).all() or (values < 0).any():
                raise LeRobotDatasetError(f"{path}: {name}: expected numbers >= 0 in each row")
            arrays.append(values.astype(kind))
    columns = {name: np.concatenate(arrays) for name, arrays in found.items()}
    order = np.argsort(columns["episode_index"], kind="stable")
    columns = {name: values[order] for name, values in columns.items()}
    meta = folder / EPISODES_FOLDER
    count = len(order)
    if not np.array_equal(columns["episode_index"], np.arange(count)):
        raise LeRobotDatasetError(f"{meta}: expected episodes from 0 without a gap")
    frames = sum(map(int, columns["length"]))
    if (count, frames) != (info.total_episodes, info.total_frames):
        raise LeRobotDatasetError(
            f"{meta}: expected {info.total_episodes} episodes with {info.total_frames} frames, as "
            f"in {INFO_PATH}, found {count} with {frames}"
        )
    if (columns["length"] < 1).any():
        raise LeRobotDatasetError(f"{meta}: length: expected at least 1 frame in each episode")
    return Episodes(
        length=columns["length"],
        chunk_index=columns["data/chunk_index"],
        file_index=columns["data/file_index"],
        videos={
            key: VideoPlaces(
                columns[f"videos/{key}/chunk_index"],
                columns[f"videos/{key}/file_index"],
                columns[f"videos/{key}/from_timestamp"],
            )
            for key in videos
        },
    )
