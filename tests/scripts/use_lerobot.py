"""Script for a Python with lerobot: read a dataset by its own reader, or write one by its writer.

python use_lerobot.py read FOLDER FILE.npz CHUNK
python use_lerobot.py write FOLDER
"""

import sys
import warnings
from typing import Any

import numpy as np

warnings.simplefilter("ignore")
from lerobot.datasets.lerobot_dataset import LeRobotDataset  # noqa: E402


def read(folder: str, file: str, chunk: str) -> None:
    fps = LeRobotDataset("test/data", root=folder, video_backend="pyav").fps
    deltas = {"action": [n / fps for n in range(int(chunk))]}
    dataset = LeRobotDataset(
        "test/data", root=folder, delta_timestamps=deltas, video_backend="pyav"
    )
    columns: dict[str, Any] = {}
    for index in range(len(dataset)):
        for name, value in dataset[index].items():
            columns.setdefault(f"sample/{name}", []).append(np.asarray(value))
    for name, each in dataset.meta.stats.items():
        for key, value in each.items():
            columns[f"stats/{name}/{key}"] = np.asarray(value)
    arrays: dict[str, Any] = {name: np.stack(value) for name, value in columns.items()}
    np.savez(file, **arrays)


def write(folder: str) -> None:
    features: dict[str, dict[str, Any]] = {
        "observation.state": {"dtype": "float32", "shape": (3,), "names": ["x", "y", "z"]},
        "action": {"dtype": "float32", "shape": (2,), "names": None},
        "next.done": {"dtype": "bool", "shape": (1,), "names": None},
        "matrix": {"dtype": "float64", "shape": (2, 2), "names": None},
        "note": {"dtype": "string", "shape": (1,), "names": None},
    }
    for name, dtype in (("top", "video"), ("side", "image")):
        names = ["height", "width", "channels"]
        image_feature = {"dtype": dtype, "shape": (64, 96, 3), "names": names}
        features[f"observation.images.{name}"] = image_feature
    dataset = LeRobotDataset.create("test/data", fps=30, features=features, root=folder)
    random = np.random.default_rng(0)
    for episode, length in enumerate((6, 3, 5)):
        for frame in range(length):
            image = np.full((64, 96, 3), 10 * frame + 80 * episode, np.uint8)
            dataset.add_frame(
                {
                    "observation.state": random.normal(size=3).astype(np.float32),
                    "action": random.normal(size=2).astype(np.float32),
                    "next.done": np.array([frame == length - 1]),
                    "matrix": random.normal(size=(2, 2)),
                    "note": f"note {frame % 2}",
                    "observation.images.top": image,
                    "observation.images.side": image,
                    "task": f"task {episode % 2}",
                }
            )
        dataset.save_episode(parallel_encoding=False)
    dataset.finalize()


if __name__ == "__main__":
    if sys.argv[1] == "read":
        read(*sys.argv[2:])
    else:
        write(*sys.argv[2:])
