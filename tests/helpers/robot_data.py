"""Small LeRobot datasets for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robo_orchard_lab.data.lerobot import LeRobotWriter

STATE = {"dtype": "float32", "shape": (3,), "names": ["x", "y", "z"]}
ACTION = {"dtype": "float32", "shape": (2,)}


def camera(height: int = 32, width: int = 48, dtype: str = "video") -> dict[str, Any]:
    """Return the feature of a camera."""
    return {"dtype": dtype, "shape": (height, width, 3)}


def picture(episode: int, frame: int, height: int = 32, width: int = 48) -> NDArray[np.uint8]:
    """Return an image with gray levels of the frame at the left and of the episode at the right."""
    image = np.empty((height, width, 3), np.uint8)
    image[:, : width // 2] = 8 * (frame % 30)
    image[:, width // 2 :] = 20 * episode
    return image


def seen_in(image: Any) -> tuple[int, int]:
    """Return episode and frame of a decoded picture of shape (3, H, W) in [0, 1]."""
    width = image.shape[2]
    left, right = image[:, :, : width // 2 - 8].mean(), image[:, :, width // 2 + 8 :].mean()
    return round(float(right) * 255 / 20), round(float(left) * 255 / 8)


def value_of(feature: Mapping[str, Any], episode: int, frame: int) -> Any:
    """Return a value that depends on episode and frame only."""
    if feature["dtype"] in ("video", "image"):
        return picture(episode, frame, *feature["shape"][:2])
    if feature["dtype"] == "string":
        return f"note {frame % 2}"
    random = np.random.default_rng(1000 * episode + frame)
    return random.normal(size=feature["shape"]).astype(feature["dtype"])


def write_dataset(
    folder: Path,
    lengths: Sequence[int] = (5, 1, 4),
    features: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    fps: float = 10,
    **options: Any,
) -> Path:
    """Write a dataset with one episode of each length."""
    chosen = features or {"observation.state": STATE, "action": ACTION}
    with LeRobotWriter(folder, fps=fps, features=chosen, **{"codec": "h264", **options}) as writer:
        for episode, length in enumerate(lengths):
            record_episode(writer, chosen, episode, length)
    return folder


def record_episode(
    writer: LeRobotWriter, features: Mapping[str, Mapping[str, Any]], episode: int, length: int
) -> None:
    """Add the frames of an episode and save the episode."""
    for frame in range(length):
        values = {name: value_of(each, episode, frame) for name, each in features.items()}
        writer.add_frame({**values, "task": f"task {episode % 2}"})
    writer.save_episode()
