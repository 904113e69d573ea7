"""Recording of episodes by `LeRobotWriter`, also interrupted, and the files of a dataset."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as parquet
import pytest

from robo_orchard_lab.data.lerobot import LeRobotDataset, LeRobotDatasetError, LeRobotWriter
from robot_data import ACTION, STATE, camera, record_episode, seen_in, value_of, write_dataset

FEATURES = {"observation.state": STATE, "action": ACTION}
FILMED = {**FEATURES, "observation.images.top": camera()}
FRAME: dict[str, Any] = {"observation.state": [0, 0, 0.5], "action": [0.0, 1.0], "task": "lift"}


def test_a_dataset_has_the_files_of_the_format(tmp_path: Path) -> None:
    """All files have the names of v3.0, and info.json the totals and paths."""
    folder = write_dataset(tmp_path / "data", (3, 2), FILMED, fps=25, robot_type="arm")
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == [
        "data/chunk-000/file-000.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
        "meta/info.json",
        "meta/stats.json",
        "meta/tasks.parquet",
        "videos/observation.images.top/chunk-000/file-000.mp4",
    ]
    info = json.loads((folder / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0"
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (2, 5, 2)
    assert (info["fps"], info["robot_type"], info["splits"]) == (25, "arm", {"train": "0:2"})
    assert info["features"]["observation.images.top"]["info"]["video.codec"] == "h264"
    assert not (tmp_path / "data.partial").exists()


def test_size_limits_split_the_files(tmp_path: Path) -> None:
    """Each file stays below its limit, chunks have few files, and all frames are readable."""
    lengths = (6, 4, 8, 3, 5, 7)
    folder = write_dataset(
        tmp_path / "data",
        lengths,
        FILMED,
        data_file_mb=0.008,
        video_file_mb=0.004,
        files_per_chunk=2,
    )
    tables = sorted(folder.glob("data/*/*.parquet"))
    videos = sorted(folder.glob("videos/*/*/*.mp4"))
    assert len(tables) > 2
    assert len(videos) > 2
    assert tables[2].parent.name == "chunk-001"
    dataset = LeRobotDataset(folder)
    rows = [(episode, frame) for episode, n in enumerate(lengths) for frame in range(n)]
    for index, row in enumerate(rows):
        sample = dataset[index]
        assert seen_in(sample["observation.images.top"]) == row
        assert sample["observation.state"].tolist() == value_of(STATE, *row).tolist()


def test_stored_statistics_are_of_all_frames(tmp_path: Path) -> None:
    """meta/stats.json merges the statistics of the episodes exactly, but for quantiles."""
    folder = write_dataset(tmp_path / "data", (5, 1, 9))
    stats = json.loads((folder / "meta/stats.json").read_text())
    values = np.array([value_of(STATE, e, f) for e, n in enumerate((5, 1, 9)) for f in range(n)])
    exact = values.astype(np.float64)
    found = stats["observation.state"]
    assert found["mean"] == pytest.approx(exact.mean(axis=0))
    assert found["std"] == pytest.approx(exact.std(axis=0))
    assert found["count"] == [15]
    assert found["q50"] == pytest.approx(np.median(exact, axis=0), abs=0.5)
    assert stats["index"]["max"] == [14]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": [0.0]}, r"action: expected float32 of shape \(2,\), found float64 of shape"),
        ({"action": [np.nan, 0.0]}, "action: expected finite values"),
        ({"action": ["a", "b"]}, "action: expected float32"),
        ({"observation.stat": [0]}, r"unknown feature .* did you mean 'observation\.state'"),
        ({"task": None}, "task: expected a text"),
        ({"observation.images.top": np.zeros((32, 48, 3))}, r"expected a uint8 image .* float64"),
        ({"observation.images.top": np.zeros((8, 8, 3), np.uint8)}, r"found uint8 of shape \(8, 8"),
    ],
)
def test_bad_values_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """A value of another shape, type or name is an error, and the frame isn't added."""
    writer = LeRobotWriter(tmp_path / "data", fps=10, features=FILMED, codec="h264")
    frame = {**FRAME, "observation.images.top": np.zeros((3, 32, 48), np.uint8)}
    with pytest.raises(LeRobotDatasetError, match=message):
        writer.add_frame({**frame, **change})
    with pytest.raises(LeRobotDatasetError, match="expected at least one frame"):
        writer.save_episode()
    writer.add_frame(frame)
    writer.save_episode()
    assert len(LeRobotDataset(writer.finalize())) == 1


def test_missing_values_are_refused(tmp_path: Path) -> None:
    """A frame without a feature is an error with its name."""
    writer = LeRobotWriter(tmp_path / "data", fps=10, features=FEATURES)
    with pytest.raises(LeRobotDatasetError, match="expected a value of 'action'"):
        writer.add_frame({"observation.state": [0, 0, 0], "task": "lift"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 0}, "fps: expected a number > 0"),
        ({"codec": "h265"}, "codec: expected one of libsvtav1, h264, hevc, found 'h265'"),
        ({"data_file_mb": 0}, "data_file_mb: expected a number > 0"),
        ({"features": {}}, "features: expected at least one"),
        ({"features": {"index": STATE}}, "features.index: is added by the writer"),
        ({"features": {"a/b": STATE}}, "expected a name without '/'"),
        ({"features": {"a": {"dtype": "float", "shape": (1,)}}}, "a.dtype: expected one of"),
        ({"features": {"a": {"dtype": "int64", "shape": (0,)}}}, "a.shape: expected sizes from 1"),
        ({"features": {"c": camera(31, 48)}}, "even height and width"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    """An invalid argument is an error before a folder is made."""
    arguments = {"fps": 10, "features": FEATURES, **options}
    with pytest.raises(LeRobotDatasetError, match=message):
        LeRobotWriter(tmp_path / "data", **arguments)
    assert not [*tmp_path.iterdir()]


def test_existing_folders_are_kept(tmp_path: Path) -> None:
    """A writer never changes a finished dataset."""
    write_dataset(tmp_path / "data")
    with pytest.raises(LeRobotDatasetError, match="expected a new folder"):
        LeRobotWriter(tmp_path / "data", fps=10, features=FEATURES)


KILLED = """
import os, sys
from pathlib import Path
from robot_data import ACTION, STATE, camera, record_episode, value_of
from robo_orchard_lab.data.lerobot import LeRobotWriter
features = {"observation.state": STATE, "action": ACTION, "observation.images.top": camera()}
writer = LeRobotWriter(sys.argv[1], fps=10, features=features, codec="h264")
record_episode(writer, features, 0, 4)
record_episode(writer, features, 1, 3)
values = {name: value_of(each, 9, 0) for name, each in features.items()}
writer.add_frame({**values, "task": "lost"})
os._exit(9)
"""


def test_a_killed_recording_resumes_after_its_last_saved_episode(tmp_path: Path) -> None:
    """A killed writer loses the current episode only; the resumed dataset equals a straight one."""
    folder = tmp_path / "data"
    ended = subprocess.run([sys.executable, "-c", KILLED, folder], check=False, env=_environment())
    assert ended.returncode == 9
    with pytest.raises(LeRobotDatasetError, match=r"found the unfinished recording .*resume=True"):
        LeRobotDataset(folder)
    with pytest.raises(LeRobotDatasetError, match="continue it with resume=True"):
        LeRobotWriter(folder, fps=10, features=FILMED, codec="h264")
    with pytest.raises(LeRobotDatasetError, match="expected fps of the interrupted recording, 10"):
        LeRobotWriter(folder, fps=20, features=FILMED, codec="h264", resume=True)
    with LeRobotWriter(folder, fps=10, features=FILMED, codec="h264", resume=True) as writer:
        assert len(writer.episodes) == 2
        record_episode(writer, FILMED, 2, 5)
    straight = write_dataset(tmp_path / "straight", (4, 3, 5), FILMED)
    for path in sorted(straight.rglob("*")):
        other = folder / path.relative_to(straight)
        if path.suffix == ".parquet":
            assert parquet.read_table(path).equals(parquet.read_table(other)), path
        elif path.is_file():
            assert path.read_bytes() == other.read_bytes(), path


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_an_exception_keeps_the_saved_episodes(tmp_path: Path) -> None:
    """An exception in the block passes, and the saved episodes are not finalized."""

    def record() -> None:
        with LeRobotWriter(tmp_path / "data", fps=10, features=FEATURES) as writer:
            record_episode(writer, FEATURES, 0, 2)
            writer.add_frame(FRAME)
            raise RuntimeError("the robot stopped")

    with pytest.raises(RuntimeError, match="robot"):
        record()
    assert not (tmp_path / "data").exists()
    writer = LeRobotWriter(tmp_path / "data", fps=10, features=FEATURES, resume=True)
    assert len(LeRobotDataset(writer.finalize())) == 2


def test_discarded_frames_are_not_stored(tmp_path: Path) -> None:
    """A discarded episode leaves no frame, and unsaved frames at the end are an error."""
    writer = LeRobotWriter(tmp_path / "data", fps=10, features=FILMED, codec="h264")
    values = {name: value_of(each, 5, 5) for name, each in FILMED.items()}
    writer.add_frame({**values, "task": "bad"})
    with pytest.raises(LeRobotDatasetError, match=r"1 frames after the last episode; call save"):
        writer.finalize()
    writer.discard_episode()
    with pytest.raises(LeRobotDatasetError, match="expected at least one episode"):
        writer.finalize()
    record_episode(writer, FILMED, 0, 2)
    dataset = LeRobotDataset(writer.finalize())
    assert (len(dataset), dataset.tasks) == (2, ["task 0"])


def test_av1_is_the_default(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The default codec is AV1, as in lerobot, without the encoder's banner."""
    with LeRobotWriter(tmp_path / "data", fps=30, features=FILMED) as writer:
        record_episode(writer, FILMED, 1, 9)
        record_episode(writer, FILMED, 2, 1)
        record_episode(writer, FILMED, 3, 4)
    assert "Svt" not in capfd.readouterr().err
    (video,) = (tmp_path / "data").glob("videos/*/*/*.mp4")
    with av.open(str(video)) as container:
        assert container.streams.video[0].codec_context.name in ("libdav1d", "av1", "libaom-av1")
    dataset = LeRobotDataset(tmp_path / "data")
    assert seen_in(dataset[7]["observation.images.top"]) == (1, 7)
    assert seen_in(dataset[12]["observation.images.top"]) == (3, 2)
