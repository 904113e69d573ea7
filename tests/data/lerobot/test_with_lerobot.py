"""Exchange of datasets with lerobot 0.4: its reader and ours return equal samples.

The tests run where lerobot is installed, in this Python or in that of ``LEROBOT_PYTHON``:
``pip install lerobot==0.4.4``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robo_orchard_lab.data.lerobot import LeRobotDataset
from robot_data import ACTION, STATE, camera, write_dataset

SCRIPT = Path(__file__).parents[2] / "scripts" / "use_lerobot.py"
PYTHON = os.environ.get("LEROBOT_PYTHON") or (sys.executable if find_spec("lerobot") else "")

pytestmark = pytest.mark.skipif(not PYTHON, reason="requires lerobot, or LEROBOT_PYTHON")

CHUNK = 4
FEATURES = {
    "observation.state": STATE,
    "action": ACTION,
    "observation.images.top": camera(64, 96),
    "observation.images.wrist": camera(96, 64),
    "observation.images.side": camera(dtype="image"),
    "next.reward": {"dtype": "float32", "shape": (1,)},
    "next.done": {"dtype": "bool", "shape": (1,)},
    "matrix": {"dtype": "float64", "shape": (2, 2)},
    "note": {"dtype": "string", "shape": (1,)},
}


def use_lerobot(*arguments: object) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [PYTHON, str(SCRIPT), *map(str, arguments)]
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-3000:]


def assert_equal_to_lerobot(folder: Path, file: Path) -> dict[str, Any]:
    """Compare all samples with those of lerobot, and return the arrays of lerobot."""
    use_lerobot("read", folder, file, CHUNK)
    theirs = dict(np.load(file))
    dataset = LeRobotDataset(folder, chunk_size=CHUNK)
    names = {name.removeprefix("sample/") for name in theirs if name.startswith("sample/")}
    for index in range(len(dataset)):
        sample = dataset[index]
        assert sample.keys() == names
        for name, value in sample.items():
            ours, expected = np.asarray(value), theirs[f"sample/{name}"][index]
            assert ours.dtype.kind == expected.dtype.kind, name
            assert ours.shape == expected.shape, name
            assert np.array_equal(ours, expected), name
    return theirs


@pytest.mark.parametrize(("codec", "fps"), [("libsvtav1", 30), ("h264", 50)])
def test_lerobot_reads_what_we_write(tmp_path: Path, codec: str, fps: int) -> None:
    """lerobot's samples and statistics of our datasets equal ours, with several files."""
    folder = tmp_path / "data"
    limits: dict[str, Any] = {"data_file_mb": 0.02, "video_file_mb": 0.003, "files_per_chunk": 2}
    write_dataset(folder, (7, 1, 5, 12), FEATURES, fps=fps, codec=codec, **limits)
    assert len([*folder.glob("videos/*/*/*.mp4")]) > 3
    theirs = assert_equal_to_lerobot(folder, tmp_path / "samples.npz")
    for name, each in LeRobotDataset(folder).statistics.items():
        for key, value in each.items():
            assert np.allclose(theirs[f"stats/{name}/{key}"], value, atol=1e-6), (name, key)


def test_we_read_what_lerobot_writes(tmp_path: Path) -> None:
    """Our samples of a dataset of lerobot equal lerobot's; statistics, too, but std of images."""
    folder = tmp_path / "data"
    use_lerobot("write", folder)
    theirs = assert_equal_to_lerobot(folder, tmp_path / "samples.npz")
    found = LeRobotDataset(folder).statistics
    for name in ("observation.state", "action", "matrix"):
        for key, value in found[name].items():
            assert np.allclose(theirs[f"stats/{name}/{key}"], value, atol=1e-6), (name, key)
    # lerobot 0.4.4 squares uint8 pixels without more bits; we compute the std from frames.
    pixels = theirs["sample/observation.images.side"]
    side = found["observation.images.side"]
    assert np.ravel(side["std"]) == pytest.approx(pixels.std(axis=(0, 2, 3)), abs=1e-3)
