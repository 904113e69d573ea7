"""Errors of folders that are damaged, incomplete, hostile or of another version."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest

from robo_orchard_lab.data.lerobot import LeRobotDataset, LeRobotDatasetError
from robot_data import ACTION, STATE, camera, write_dataset

TABLE = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
VIDEO = "videos/observation.images.top/chunk-000/file-000.mp4"
FEATURES = {"observation.state": STATE, "action": ACTION, "observation.images.top": camera()}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset of 5 + 1 + 4 frames with one camera."""
    return write_dataset(tmp_path_factory.mktemp("data") / "intact", features=FEATURES)


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    """Return a copy to damage."""
    return shutil.copytree(intact, tmp_path / "data")


def change_info(folder: Path, **changes: Any) -> None:
    path = folder / "meta/info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_table(path: Path, change: Callable[[dict[str, list[Any]]], None]) -> None:
    table = parquet.read_table(path)
    columns = table.to_pydict()
    change(columns)
    parquet.write_table(pyarrow.table(columns, schema=table.schema), path)


def test_folders_that_are_no_dataset_are_named(tmp_path: Path) -> None:
    """A missing folder and one without info.json are errors with the path."""
    with pytest.raises(LeRobotDatasetError, match=r"found no folder .*nowhere"):
        LeRobotDataset(tmp_path / "nowhere")
    with pytest.raises(LeRobotDatasetError, match=r"found no meta/info\.json in"):
        LeRobotDataset(tmp_path)


@pytest.mark.parametrize(
    ("version", "remedy"),
    [
        ("v2.1", r"found 'v2\.1' \(str\); convert .* lerobot\.datasets\.v30\.convert_dataset_v21"),
        ("v4.0", r"found 'v4\.0' \(str\); this version is not supported"),
        (None, "found None"),
    ],
)
def test_other_versions_are_refused(folder: Path, version: str | None, remedy: str) -> None:
    """Another version is an error; of v2.1, with lerobot's command for the conversion."""
    change_info(folder, codebase_version=version)
    with pytest.raises(LeRobotDatasetError, match=remedy):
        LeRobotDataset(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data_path": "../../{chunk_index}/{file_index}.parquet"},
            r"data_path: .* contains '\.\.'",
        ),
        ({"data_path": "/etc/{chunk_index}{file_index}"}, "data_path: .* is absolute"),
        ({"data_path": "{chunk_index.__class__.__mro__}"}, "data_path: expected only chunk_index"),
        ({"data_path": "{chunk_index:999999999d}"}, "data_path: expected only chunk_index"),
        ({"data_path": "{chunk_index!r}"}, "data_path: expected only chunk_index"),
        ({"data_path": "{"}, "data_path: .*'{'"),
        ({"data_path": None}, "data_path: expected a path"),
        (
            {"video_path": "{video_key:>99999999}/{chunk_index}/{file_index}"},
            "video_path: expected",
        ),
        ({"video_path": "~/{video_key}{chunk_index}{file_index}"}, "video_path: .* begins with ~"),
        ({"fps": 0}, "fps: expected frames per second"),
        ({"fps": 10**400}, "fps|digits"),
        ({"fps": True}, "fps: expected frames per second"),
        ({"total_frames": 10**18}, f"expected 3 episodes with {10**18} frames"),
        ({"total_episodes": -1}, "total_episodes: expected a number >= 0"),
        ({"features": []}, "features: expected a mapping"),
        ({"features": {"action": {"dtype": "float32", "shape": [10**9]}}}, "sizes from 1 to"),
        ({"features": {"action": {"dtype": "object", "shape": [2]}}}, "dtype: expected one of"),
        ({"features": {"../a": {"dtype": "float32", "shape": [2]}}}, "expected a name without '/'"),
        (
            {"features": {"action": {"dtype": "float32", "shape": [2]}}},
            "expected timestamp of type",
        ),
    ],
)
def test_hostile_info_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    """Paths that leave the folder, format tricks and absurd numbers are errors with the field."""
    change_info(folder, **changes)
    with pytest.raises(LeRobotDatasetError, match=message):
        LeRobotDataset(folder)


@pytest.mark.parametrize(
    "text", ["", "{", '{"fps": NaN}', '{"fps": 1, "fps": 2}', "[]", "[" * 9999]
)
def test_broken_json_is_refused(folder: Path, text: str) -> None:
    """info.json that is no strict JSON is an error with the path."""
    (folder / "meta/info.json").write_text(text)
    with pytest.raises(LeRobotDatasetError, match=r"meta/info\.json: "):
        LeRobotDataset(folder)


@pytest.mark.parametrize("name", [TABLE, EPISODES, "meta/tasks.parquet"])
def test_truncated_tables_are_refused(folder: Path, name: str) -> None:
    """A truncated, empty or missing table is an error with its path."""
    path = folder / name
    data = path.read_bytes()
    for damaged in (data[: len(data) // 2], b"", data[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(LeRobotDatasetError, match=rf"{name}: expected a complete Parquet file"):
            LeRobotDataset(folder)
    path.unlink()
    with pytest.raises(LeRobotDatasetError, match=rf"{path.name}.*found none|found none"):
        LeRobotDataset(folder)


def test_tables_that_contradict_each_other_are_refused(folder: Path) -> None:
    """Lengths, totals and order must agree between info.json, episodes and frames."""
    keep = (folder / EPISODES).read_bytes(), (folder / TABLE).read_bytes()

    def restore() -> None:
        (folder / EPISODES).write_bytes(keep[0])
        (folder / TABLE).write_bytes(keep[1])

    change_table(folder / EPISODES, lambda columns: columns["length"].__setitem__(0, 6))
    with pytest.raises(LeRobotDatasetError, match=r"expected 3 episodes with 10 frames.*with 11"):
        LeRobotDataset(folder)
    change_info(folder, total_frames=11)
    with pytest.raises(LeRobotDatasetError, match=r"expected 6 frames of episode 0.*found 5"):
        LeRobotDataset(folder)
    change_info(folder, total_frames=10)
    restore()
    change_table(folder / EPISODES, lambda columns: columns["episode_index"].__setitem__(1, 7))
    with pytest.raises(LeRobotDatasetError, match="expected episodes from 0 without a gap"):
        LeRobotDataset(folder)
    restore()
    change_table(folder / TABLE, lambda columns: columns["frame_index"].reverse())
    with pytest.raises(LeRobotDatasetError, match="ordered by episode_index and frame_index"):
        LeRobotDataset(folder)
    restore()
    change_table(folder / TABLE, lambda columns: columns["task_index"].__setitem__(0, 9))
    with pytest.raises(LeRobotDatasetError, match="task_index: expected indices below 2"):
        LeRobotDataset(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_located(folder: Path, value: float) -> None:
    """A NaN action is an error with episode and frame; without its episode, the rest is read."""
    change_table(folder / TABLE, lambda columns: columns["action"][7].__setitem__(1, value))
    with pytest.raises(
        LeRobotDatasetError, match=r"action: expected finite values.* at frame 1 of episode 2"
    ):
        LeRobotDataset(folder)
    assert len(LeRobotDataset(folder, [0, 1])) == 6
    assert len(LeRobotDataset(folder, columns=["observation.state"])) == 10


def test_columns_of_another_shape_are_refused(folder: Path) -> None:
    """A column that differs from info.json, or is missing, is an error with both shapes."""
    info = json.loads((folder / "meta/info.json").read_text())
    features = info["features"]
    change_info(folder, features={**features, "action": {"dtype": "float32", "shape": [7]}})
    with pytest.raises(LeRobotDatasetError, match=r"action: .*shape \(7,\).* found lists of 2"):
        LeRobotDataset(folder)
    change_info(folder, features={**features, "action": {"dtype": "float32", "shape": [1]}})
    with pytest.raises(LeRobotDatasetError, match=r"action: .*shape \(1,\)"):
        LeRobotDataset(folder)
    change_info(folder, features={**features, "gripper": {"dtype": "float32", "shape": [1]}})
    with pytest.raises(LeRobotDatasetError, match="expected a column 'gripper'"):
        LeRobotDataset(folder)


def rewrite_video(path: Path, keep: Callable[[int], bool]) -> None:
    """Write the packets of a video again, without some frames."""
    temporary = path.with_suffix(".new.mp4")
    with av.open(str(path)) as source, av.open(str(temporary), "w") as output:
        own = source.streams.video[0]
        stream = output.add_stream_from_template(own, opaque=True)
        packets = [packet for packet in source.demux(own) if packet.dts is not None]
        for number, packet in enumerate(packets):
            if keep(number):
                packet.stream = stream
                output.mux(packet)
    temporary.rename(path)


def test_a_video_with_a_missing_frame_fails_at_that_frame(folder: Path) -> None:
    """A dropped frame is an error with file and time; other frames are read."""
    rewrite_video(folder / VIDEO, lambda number: number != 3)
    dataset = LeRobotDataset(folder)
    for index in (0, 1, 2, 4, 5, 9):
        dataset[index]
    with pytest.raises(
        LeRobotDatasetError, match=rf"{VIDEO}: expected a frame at 0\.3000 s .*frames were dropped"
    ):
        dataset[3]
    dataset[6]


def test_videos_that_are_too_short_fail(folder: Path) -> None:
    """A frame after the end of a video is an error; decoding continues with other frames."""
    rewrite_video(folder / VIDEO, lambda number: number < 7)
    dataset = LeRobotDataset(folder)
    with pytest.raises(LeRobotDatasetError, match="the video is shorter than its episodes"):
        dataset[9]
    dataset[6]


def test_damaged_videos_are_refused(folder: Path) -> None:
    """Missing, truncated and exchanged videos are errors with the path."""
    path = folder / VIDEO
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(LeRobotDatasetError, match=rf"{VIDEO}: (expected a video|can't decode)"):
        LeRobotDataset(folder)[9]
    path.unlink()
    with pytest.raises(LeRobotDatasetError, match=rf"{VIDEO}: expected a video, found none"):
        LeRobotDataset(folder)
    assert len(LeRobotDataset(folder, columns=["action"])) == 10
    other = write_dataset(
        folder.parent / "other", features={**FEATURES, "observation.images.top": camera(64, 64)}
    )
    shutil.copy(other / VIDEO, path)
    with pytest.raises(LeRobotDatasetError, match=r"expected frames of 32 x 48 .* found 64 x 64"):
        LeRobotDataset(folder)[0]


def test_unusable_statistics_are_computed_again(folder: Path) -> None:
    """Without plausible stored statistics, they are computed from columns and frames."""
    expected = LeRobotDataset(folder).statistics
    table = parquet.read_table(folder / EPISODES)
    broken = {
        name: [None] * 3
        if name == "stats/action/std"
        else [[[[0.0]]] * 3] * 3
        if name == "stats/observation.images.top/std"
        else column
        for name, column in table.to_pydict().items()
        if name != "stats/observation.state/mean"
    }
    parquet.write_table(pyarrow.table(broken), folder / EPISODES)
    found = LeRobotDataset(folder).statistics
    for name in ("action", "observation.state"):
        for key, values in expected[name].items():
            assert found[name][key] == pytest.approx(values, rel=1e-5)
    for key in ("mean", "std"):  # of decoded frames, which the encoder has changed a little
        top = "observation.images.top"
        assert np.ravel(found[top][key]) == pytest.approx(np.ravel(expected[top][key]), abs=0.02)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, intact: Path) -> None:
    """Without pyarrow, or PyAV for cameras, the error has the pip command."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "av"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "av", None)
    command = r'requires av: pip install "robo-orchard-hooks\[robotics\]"'
    with pytest.raises(ModuleNotFoundError, match=command):
        LeRobotDataset(intact)
    assert len(LeRobotDataset(intact, columns=["action"])) == 10
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=command.replace("av", "pyarrow")):
        LeRobotDataset(intact)
