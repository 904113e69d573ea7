"""Assembly of saved episodes into the files of a dataset."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robo_orchard_core.utils.strict_json import parse_json
from robo_orchard_lab.data.lerobot.format import (
    DATA_PATH,
    EPISODES_PATH,
    INDEX_FEATURES,
    INFO_PATH,
    STATS_PATH,
    TASKS_PATH,
    VERSION,
    VIDEO_PATH,
    Feature,
    require,
)
from robo_orchard_lab.data.lerobot.statistics import (
    Statistics,
    merge_statistics,
    stack_statistics,
)
from robo_orchard_lab.data.lerobot.video import join_videos, video_info
from robo_orchard_lab.pipeline.run.durable import flush_file, flush_folder

_ROW_GROUP_BYTES = 32 << 20
_MB = 2**20


@dataclass(frozen=True)
class SavedEpisode:
    """Complete episode of a recording, next to its table and its videos."""

    length: int
    tasks: list[str]
    statistics: Mapping[str, Statistics]

    def to_json(self) -> bytes:
        """Return the content of the file that marks the episode as complete."""
        plain = {
            name: {key: value.tolist() for key, value in each.items()}
            for name, each in self.statistics.items()
        }
        document = {"length": self.length, "tasks": self.tasks, "statistics": plain}
        return json.dumps(document).encode()

    @classmethod
    def read(cls, path: Path) -> SavedEpisode:
        """Read the file again."""
        document = parse_json(path.read_bytes(), max_depth=32)
        statistics = {
            name: {key: np.array(value) for key, value in each.items()}
            for name, each in document["statistics"].items()
        }
        return cls(document["length"], document["tasks"], statistics)


def frame_schema(features: Mapping[str, Feature]) -> Any:
    """Return the Arrow schema of a table of frames, with the types and metadata of lerobot."""
    pyarrow = require("pyarrow", "writing a LeRobotDataset")
    fields, described = [], {}
    for name, feature in _stored(features):
        item = {"dtype": feature.dtype, "_type": "Value"}
        if feature.dtype == "image":
            kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
            item = {"_type": "Image"}
        elif feature.shape == (1,) or feature.dtype == "string":
            kind = _arrow_type(feature.dtype)
        elif len(feature.shape) == 1:
            kind = pyarrow.list_(_arrow_type(feature.dtype), feature.shape[0])
            item = {"feature": item, "length": feature.shape[0], "_type": "List"}  # type: ignore[dict-item]
        else:
            kind = _arrow_type(feature.dtype)
            for _ in feature.shape:
                kind = pyarrow.list_(kind)
            number = len(feature.shape)
            item = {"shape": feature.shape, "dtype": feature.dtype, "_type": f"Array{number}D"}  # type: ignore[dict-item]
        fields.append(pyarrow.field(name, kind))
        described[name] = item
    metadata = {"huggingface": json.dumps({"info": {"features": described}})}
    return pyarrow.schema(fields, metadata=metadata)


def _arrow_type(dtype: str) -> Any:
    pyarrow = require("pyarrow", "writing a LeRobotDataset")
    return pyarrow.string() if dtype == "string" else pyarrow.from_numpy_dtype(np.dtype(dtype))


def _stored(features: Mapping[str, Feature]) -> Iterator[tuple[str, Feature]]:
    """Yield the features with a column in the tables, the index columns last."""
    for name, feature in features.items():
        if feature.dtype != "video":
            yield name, feature
    for name, dtype in INDEX_FEATURES.items():
        yield name, Feature(dtype, (1,))


def assemble(
    folder: Path,
    episodes: Sequence[SavedEpisode],
    path_of: Callable[[int, str], Path],
    *,
    fps: float,
    features: Mapping[str, Feature],
    robot_type: str | None,
    tasks: Sequence[str],
    data_file_mb: float,
    video_file_mb: float,
    files_per_chunk: int,
) -> None:
    """Write all files of a dataset and flush them.

    Args:
        folder: Folder to create.
        episodes: All episodes in order.
        path_of: File of an episode with an ending: ``parquet``, or ``CAMERA.mp4``.
        fps: Frames per second.
        features: Features without the index columns.
        robot_type: Name of the robot, or None.
        tasks: Task texts by index.
        data_file_mb: Size limit of a table.
        video_file_mb: Size limit of a video.
        files_per_chunk: Limit of files in a ``chunk-...`` folder.
    """
    ends = np.cumsum([episode.length for episode in episodes]).tolist()
    rows: list[dict[str, Any]] = [
        {"episode_index": index, "tasks": episode.tasks, "length": episode.length}
        for index, episode in enumerate(episodes)
    ]
    tables = [path_of(index, "parquet") for index in range(len(episodes))]
    for number, group in enumerate(_groups(tables, data_file_mb)):
        place = _place(number, files_per_chunk)
        _join_tables(_new(folder / DATA_PATH.format(**place)), [tables[index] for index in group])
        for index in group:
            rows[index].update({f"data/{name}": value for name, value in place.items()})
            rows[index]["dataset_from_index"] = ends[index] - episodes[index].length
            rows[index]["dataset_to_index"] = ends[index]
    described: dict[str, dict[str, Any]] = {}
    for name, feature in features.items():
        described[name] = {
            "dtype": feature.dtype,
            "shape": [*feature.shape],
            "names": feature.names,
        }
        if feature.dtype != "video":
            continue
        videos = [path_of(index, f"{name}.mp4") for index in range(len(episodes))]
        for number, group in enumerate(_groups(videos, video_file_mb)):
            place = _place(number, files_per_chunk)
            path = _new(folder / VIDEO_PATH.format(video_key=name, **place))
            join_videos([(videos[index], episodes[index].length) for index in group], path, fps)
            flush_file(path)
            frames = 0
            for index in group:
                rows[index].update({f"videos/{name}/{key}": n for key, n in place.items()})
                rows[index][f"videos/{name}/from_timestamp"] = frames / fps
                frames += episodes[index].length
                rows[index][f"videos/{name}/to_timestamp"] = frames / fps
            described[name].setdefault("info", video_info(path, fps))
    for name, dtype in INDEX_FEATURES.items():
        described[name] = {"dtype": dtype, "shape": [1], "names": None}
    merged = {
        name: merge_statistics(stack_statistics([each.statistics[name] for each in episodes]))
        for name in episodes[0].statistics
    }
    plain = {
        name: {key: value.tolist() for key, value in each.items()} for name, each in merged.items()
    }
    _write_episodes(folder, rows, episodes, data_file_mb, files_per_chunk)
    _write_tasks(folder, tasks)
    _write_json(folder / STATS_PATH, plain)
    info = {
        "codebase_version": VERSION,
        "robot_type": robot_type,
        "total_episodes": len(episodes),
        "total_frames": ends[-1],
        "total_tasks": len(tasks),
        "chunks_size": files_per_chunk,
        "data_files_size_in_mb": data_file_mb,
        "video_files_size_in_mb": video_file_mb,
        "fps": fps,
        "splits": {"train": f"0:{len(episodes)}"},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if any(f.dtype == "video" for f in features.values()) else None,
        "features": described,
    }
    _write_json(folder / INFO_PATH, info)
    for inner in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        flush_folder(inner)


def _groups(files: Sequence[Path], limit_mb: float) -> Iterator[list[int]]:
    """Yield the indices of the files to join, each group below the limit or of one file."""
    group: list[int] = []
    size = 0
    for index, file in enumerate(files):
        own = file.stat().st_size
        if group and size + own >= limit_mb * _MB:
            yield group
            group, size = [], 0
        group.append(index)
        size += own
    yield group


def _place(number: int, files_per_chunk: int) -> dict[str, int]:
    chunk, file = divmod(number, files_per_chunk)
    return {"chunk_index": chunk, "file_index": file}


def _new(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _join_tables(path: Path, parts: Sequence[Path]) -> None:
    pyarrow = require("pyarrow", "writing a LeRobotDataset")
    parquet = require("pyarrow.parquet", "writing a LeRobotDataset")
    with parquet.ParquetWriter(path, parquet.read_schema(parts[0])) as writer:
        waiting: list[Any] = []
        size = 0
        for number, part in enumerate(parts):
            waiting.append(parquet.ParquetFile(part).read())
            size += waiting[-1].nbytes
            if size >= _ROW_GROUP_BYTES or number == len(parts) - 1:
                writer.write_table(pyarrow.concat_tables(waiting))
                waiting, size = [], 0
    flush_file(path)


def _write_episodes(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    episodes: Sequence[SavedEpisode],
    limit_mb: float,
    files_per_chunk: int,
) -> None:
    pyarrow = require("pyarrow", "writing a LeRobotDataset")
    parquet = require("pyarrow.parquet", "writing a LeRobotDataset")
    for row, episode in zip(rows, episodes, strict=True):
        for name, each in episode.statistics.items():
            row.update({f"stats/{name}/{key}": value.tolist() for key, value in each.items()})
    table = pyarrow.table({name: [row[name] for row in rows] for name in rows[0]})
    count = max(1, int(limit_mb * _MB / (table.nbytes / len(rows))))
    for number, start in enumerate(range(0, len(rows), count)):
        part = table.slice(start, count)
        place = _place(number, files_per_chunk)
        for name, value in place.items():
            values = pyarrow.array([value] * len(part), pyarrow.int64())
            part = part.append_column(f"meta/episodes/{name}", values)
        path = _new(folder / EPISODES_PATH.format(**place))
        parquet.write_table(part, path)
        flush_file(path)


def _write_tasks(folder: Path, tasks: Sequence[str]) -> None:
    """Write the tasks as pandas writes a frame with the texts as its index; lerobot reads that."""
    pyarrow = require("pyarrow", "writing a LeRobotDataset")
    parquet = require("pyarrow.parquet", "writing a LeRobotDataset")
    index = "__index_level_0__"
    kinds = [("task_index", "task_index", "int64", "int64"), (None, index, "unicode", "object")]
    described = {
        "index_columns": [index],
        "column_indexes": [
            {
                "name": None,
                "field_name": None,
                "pandas_type": "unicode",
                "numpy_type": "object",
                "metadata": {"encoding": "UTF-8"},
            }
        ],
        "columns": [
            {"name": n, "field_name": f, "pandas_type": p, "numpy_type": d, "metadata": None}
            for n, f, p, d in kinds
        ],
        "pandas_version": "2.2.3",
    }
    schema = pyarrow.schema(
        [("task_index", pyarrow.int64()), (index, pyarrow.string())],
        metadata={"pandas": json.dumps(described)},
    )
    columns = {"task_index": [*range(len(tasks))], index: [*tasks]}
    path = _new(folder / TASKS_PATH)
    parquet.write_table(pyarrow.table(columns, schema=schema), path)
    flush_file(path)


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    text = json.dumps(document, indent=4, ensure_ascii=False, allow_nan=False)
    _new(path).write_text(text, encoding="utf-8")
    flush_file(path)
