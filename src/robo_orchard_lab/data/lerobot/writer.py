"""Recording of episodes, which loses at most the current episode if it is interrupted.

Each saved episode is complete on disk, in ``FOLDER.partial``. `LeRobotWriter.finalize` joins the
episodes to a dataset and renames it to ``FOLDER``: the folder is complete or doesn't exist.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from robo_orchard_core.utils.config.errors import describe, suggest_name
from robo_orchard_core.utils.strict_json import parse_json
from robo_orchard_lab.data.lerobot.assembly import SavedEpisode, assemble, frame_schema
from robo_orchard_lab.data.lerobot.format import (
    DATA_FILE_MB,
    FILES_PER_CHUNK,
    INDEX_FEATURES,
    VIDEO_FILE_MB,
    Feature,
    LeRobotDatasetError,
    parse_feature,
    partial_folder,
    require,
)
from robo_orchard_lab.data.lerobot.statistics import (
    ImageStatistics,
    Statistics,
    array_statistics,
)
from robo_orchard_lab.data.lerobot.video import CODECS, VideoEncoder, encode_png
from robo_orchard_lab.pipeline.run.durable import flush_file, make_folder, replace_file

_RECORDING = "recording.json"


class LeRobotWriter:
    """Writer of a LeRobotDataset v3.0 folder.

    Use it as a context manager: it calls `finalize` at the end, and keeps the saved episodes if an
    exception passes::

        features = {
            "observation.state": {"dtype": "float32", "shape": (7,)},
            "observation.images.top": {"dtype": "video", "shape": (240, 320, 3)},
            "action": {"dtype": "float32", "shape": (7,)},
        }
        with LeRobotWriter("data/pick", fps=30, features=features) as writer:
            for episode in episodes:
                for state, image, action in episode:
                    writer.add_frame({"observation.state": state, "action": action,
                                      "observation.images.top": image, "task": "pick the cup"})
                writer.save_episode()

    Args:
        folder: Dataset to create; must not exist.
        fps: Frames per second.
        features: Columns by name, each with ``dtype``, ``shape`` and optionally ``names``.
            ``video`` and ``image`` are cameras with shape (H, W, 3).
        robot_type: Name of the robot, for readers.
        codec: Video encoder: ``libsvtav1`` (lerobot's default), ``h264`` or ``hevc``.
        resume: Continue an interrupted recording after its last saved episode.
        data_file_mb: Largest size of a table; an episode is never split.
        video_file_mb: Largest size of a video; an episode is never split.
        files_per_chunk: Largest number of files in a ``chunk-...`` folder.

    Raises:
        LeRobotDatasetError: the folder exists, an argument is invalid, or the interrupted recording
            has other features.
        ModuleNotFoundError: pyarrow is missing, or PyAV for cameras.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        fps: float,
        features: Mapping[str, Mapping[str, Any]],
        robot_type: str | None = None,
        codec: str = "libsvtav1",
        resume: bool = False,
        data_file_mb: float = DATA_FILE_MB,
        video_file_mb: float = VIDEO_FILE_MB,
        files_per_chunk: int = FILES_PER_CHUNK,
    ) -> None:
        self.folder = Path(folder)
        self.fps = fps
        self.robot_type = robot_type
        self.codec = codec
        self.features = {name: parse_feature(name, value) for name, value in features.items()}
        self.limits = {
            "data_file_mb": data_file_mb,
            "video_file_mb": video_file_mb,
            "files_per_chunk": files_per_chunk,
        }
        self._check_arguments()
        require("pyarrow.parquet", "writing a LeRobotDataset")
        if any(feature.is_camera for feature in self.features.values()):
            require("av", "writing camera videos")
        self.partial = partial_folder(self.folder)
        self.episodes: list[SavedEpisode] = []
        self._open_recording(resume)
        self.total_frames = sum(episode.length for episode in self.episodes)
        self.tasks = [*dict.fromkeys(task for each in self.episodes for task in each.tasks)]
        self._start_episode()

    def _check_arguments(self) -> None:
        if not 0 < self.fps < float("inf"):
            raise LeRobotDatasetError(f"fps: expected a number > 0, found {describe(self.fps)}")
        for name in self.features:
            if name in (*INDEX_FEATURES, "task"):
                raise LeRobotDatasetError(f"features.{name}: is added by the writer; leave it out")
        if not self.features:
            raise LeRobotDatasetError("features: expected at least one")
        if self.codec not in CODECS:
            raise LeRobotDatasetError(
                f"codec: expected one of {', '.join(CODECS)}, found {describe(self.codec)}"
            )
        for name, limit in self.limits.items():
            if not limit > 0:
                raise LeRobotDatasetError(f"{name}: expected a number > 0, found {limit!r}")
        for name, feature in self.features.items():
            if feature.dtype == "video" and any(size % 2 for size in feature.image_size):
                raise LeRobotDatasetError(
                    f"features.{name}.shape: expected an even height and width for a video, found "
                    f"{feature.shape}; crop the frames, or use dtype 'image'"
                )

    def _open_recording(self, resume: bool) -> None:
        if self.folder.exists():
            raise LeRobotDatasetError(
                f"{self.folder}: expected a new folder, found an existing one; remove it or choose "
                "another name"
            )
        settings = {
            "fps": self.fps,
            "robot_type": self.robot_type,
            "codec": self.codec,
            "features": {name: _described(feature) for name, feature in self.features.items()},
        }
        file = self.partial / _RECORDING
        if not self.partial.exists():
            make_folder(self.partial)
            replace_file(file, json.dumps(settings).encode())
            return
        if not resume:
            raise LeRobotDatasetError(
                f"found the unfinished recording {self.partial}; continue it with resume=True, or "
                "remove it"
            )
        if file.exists():
            before = parse_json(file.read_bytes(), max_depth=32)
            settings = json.loads(json.dumps(settings))  # tuples become lists
            for name, value in settings.items():
                if before.get(name) != value:
                    raise LeRobotDatasetError(
                        f"{file}: expected {name} of the interrupted recording, "
                        f"{before.get(name)!r}; found {value!r}"
                    )
        else:
            replace_file(file, json.dumps(settings).encode())
        while (marker := self._path(len(self.episodes), "json")).exists():
            self.episodes.append(SavedEpisode.read(marker))

    def _path(self, episode: int, ending: str) -> Path:
        return self.partial / f"episode-{episode:06d}.{ending}"

    def _start_episode(self) -> None:
        self._rows: dict[str, list[Any]] = {
            name: [] for name, feature in self.features.items() if feature.dtype != "video"
        }
        self._frame_tasks: list[str] = []
        self._encoders: dict[str, VideoEncoder] = {}
        self._images = {
            name: ImageStatistics() for name, feature in self.features.items() if feature.is_camera
        }

    def add_frame(self, frame: Mapping[str, Any]) -> None:
        """Add a frame to the current episode.

        Args:
            frame: Value of each feature, and the text ``task``. Cameras are uint8 images of shape
                (H, W, 3) or (3, H, W).

        Raises:
            LeRobotDatasetError: a value is missing, unknown, not finite, or of another type or
                shape; the frame isn't added.
        """
        for name in frame:
            if name not in self.features and name != "task":
                raise LeRobotDatasetError(
                    f"add_frame: unknown feature {name!r}; "
                    f"{suggest_name(str(name), [*self.features], 'the features are')}"
                )
        task = frame.get("task")
        if not isinstance(task, str) or not task:
            raise LeRobotDatasetError(f"add_frame: task: expected a text, found {describe(task)}")
        values = {}
        for name, feature in self.features.items():
            if name not in frame:
                raise LeRobotDatasetError(f"add_frame: expected a value of {name!r}, found none")
            values[name] = _checked_value(name, feature, frame[name])
        episode = len(self.episodes)
        for name, value in values.items():
            feature = self.features[name]
            if feature.is_camera:
                self._images[name].add(value)
            if feature.dtype == "video":
                if name not in self._encoders:
                    path = self._path(episode, f"{name}.mp4")
                    path.unlink(missing_ok=True)  # of an interrupted episode
                    self._encoders[name] = VideoEncoder(
                        path, self.fps, self.codec, feature.image_size
                    )
                self._encoders[name].add(value)
            elif feature.dtype == "image":
                number = len(self._frame_tasks)
                path_in_table = f"frame-{number:06d}.png"
                self._rows[name].append({"bytes": encode_png(value), "path": path_in_table})
            else:
                self._rows[name].append(value)
        self._frame_tasks.append(task)

    def save_episode(self) -> int:
        """Store the current episode on disk, and return its index.

        Raises:
            LeRobotDatasetError: the episode has no frame.
        """
        length = len(self._frame_tasks)
        if not length:
            raise LeRobotDatasetError("save_episode: expected at least one frame, found none")
        index = len(self.episodes)
        self.tasks = [*dict.fromkeys([*self.tasks, *self._frame_tasks])]
        for name, encoder in self._encoders.items():
            encoder.close()
            flush_file(self._path(index, f"{name}.mp4"))
        frame_index = np.arange(length)
        columns: dict[str, Any] = {
            **self._rows,
            "timestamp": (frame_index / self.fps).astype(np.float32),
            "frame_index": frame_index,
            "episode_index": np.full(length, index),
            "index": frame_index + self.total_frames,
            "task_index": np.array([self.tasks.index(task) for task in self._frame_tasks]),
        }
        self._write_table(self._path(index, "parquet"), columns)
        saved = SavedEpisode(
            length=length,
            tasks=[*dict.fromkeys(self._frame_tasks)],
            statistics=self._statistics(columns),
        )
        # The last file marks the episode as complete.
        replace_file(self._path(index, "json"), saved.to_json())
        self.episodes.append(saved)
        self.total_frames += length
        self._start_episode()
        return index

    def _write_table(self, path: Path, columns: Mapping[str, Any]) -> None:
        pyarrow = require("pyarrow", "writing a LeRobotDataset")
        parquet = require("pyarrow.parquet", "writing a LeRobotDataset")
        schema = frame_schema(self.features)
        plain = {
            field.name: [_plain_value(value) for value in columns[field.name]] for field in schema
        }
        parquet.write_table(pyarrow.table(plain, schema=schema), path)
        flush_file(path)

    def _statistics(self, columns: Mapping[str, Any]) -> dict[str, Statistics]:
        found: dict[str, Statistics] = {}
        for name in (*self.features, *INDEX_FEATURES):
            feature = self.features.get(name)
            if feature is not None and feature.is_camera:
                found[name] = self._images[name].result()
            elif feature is None or feature.is_numeric:
                found[name] = array_statistics(np.stack(columns[name]))
        return found

    def discard_episode(self) -> None:
        """Drop the frames since the last saved episode."""
        for name, encoder in self._encoders.items():
            encoder.close(discard=True)
            self._path(len(self.episodes), f"{name}.mp4").unlink(missing_ok=True)
        self._start_episode()

    def finalize(self) -> Path:
        """Join all saved episodes to the dataset, and return its folder.

        Raises:
            LeRobotDatasetError: there is no episode, or frames that are not saved.
        """
        if self._frame_tasks:
            raise LeRobotDatasetError(
                f"finalize: found {len(self._frame_tasks)} frames after the last episode; call "
                "save_episode() or discard_episode() first"
            )
        if not self.episodes:
            raise LeRobotDatasetError("finalize: expected at least one episode, found none")
        built = self.partial / "dataset"
        shutil.rmtree(built, ignore_errors=True)  # of an interrupted call
        assemble(
            built,
            self.episodes,
            self._path,
            fps=self.fps,
            features=self.features,
            robot_type=self.robot_type,
            tasks=self.tasks,
            **self.limits,  # type: ignore[arg-type]  # one int among floats
        )
        os.rename(built, self.folder)
        shutil.rmtree(self.partial, ignore_errors=True)
        return self.folder

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self.finalize()
        else:
            self.discard_episode()


def _plain_value(value: Any) -> Any:
    """Return an array as lists; of shape (1,), as its number, which is how lerobot stores it."""
    if not isinstance(value, np.ndarray | np.generic):
        return value
    return value.item() if value.shape in ((), (1,)) else value.tolist()


def _described(feature: Feature) -> dict[str, Any]:
    return {"dtype": feature.dtype, "shape": feature.shape, "names": feature.names}


def _checked_value(name: str, feature: Feature, value: Any) -> Any:
    """Return a value in the feature's type and shape."""
    if feature.dtype == "string":
        if not isinstance(value, str):
            raise LeRobotDatasetError(
                f"add_frame: {name}: expected a text, found {describe(value)}"
            )
        return value
    array: NDArray[Any] = np.asarray(value)
    if feature.is_camera:
        height, width = feature.image_size
        if array.shape == (3, height, width):
            array = array.transpose(1, 2, 0)
        if array.shape != (height, width, 3) or array.dtype != np.uint8:
            raise LeRobotDatasetError(
                f"add_frame: {name}: expected a uint8 image of shape {(height, width, 3)}, found "
                f"{array.dtype} of shape {array.shape}"
            )
        return array
    dtype = np.dtype(feature.dtype)
    if array.shape == () and feature.shape == (1,):
        array = array.reshape(1)
    if array.shape != feature.shape or not np.can_cast(array.dtype, dtype, casting="same_kind"):
        raise LeRobotDatasetError(
            f"add_frame: {name}: expected {feature.dtype} of shape {feature.shape}, found "
            f"{array.dtype} of shape {array.shape}"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise LeRobotDatasetError(f"add_frame: {name}: expected finite values, found {array}")
    return array.astype(dtype)
