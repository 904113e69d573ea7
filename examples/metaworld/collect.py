"""Collect demonstrations of Meta-World's scripted expert as a LeRobotDataset v3.0 folder.

    cd examples/metaworld
    python collect.py                                     # 50 episodes in 5 s
    python collect.py --episodes 10 --seed 1 --folder data/ten
    MUJOCO_GL=egl python collect.py --camera corner --folder data/images

The same arguments collect the same frames. The folder appears when it is complete; after an
interruption, run the command again.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from pick_place import ACTION_DIM, FPS, STATE_DIM, TASK, Expert, make_environment
from robo_orchard_lab.data.lerobot import LeRobotWriter
from robo_orchard_lab.data.lerobot.format import partial_folder

FOLDER = "data/pick-place-v3"
INSTRUCTION = "pick up the puck and move it to the goal"


def collect(
    folder: str | Path = FOLDER,
    episodes: int = 50,
    seed: int = 0,
    cameras: Sequence[str] = (),
    image_size: int = 128,
) -> Path:
    """Collect successful episodes of the expert into a new folder, with a progress bar.

    Args:
        folder: dataset to create.
        episodes: number of episodes; episode ``i`` has goal ``i`` of the training goals.
        seed: of the goals.
        cameras: cameras to record as videos.
        image_size: height and width of the videos in pixels.
    """
    folder = Path(folder)
    shutil.rmtree(partial_folder(folder), ignore_errors=True)  # of an interrupted collection
    environment = make_environment("train", seed, cameras, image_size=image_size)
    videos = {f"observation.images.{camera}": image_size for camera in cameras}
    features: dict[str, dict[str, Any]] = {
        "observation.state": {"dtype": "float32", "shape": (STATE_DIM,)},
        **{name: {"dtype": "video", "shape": (size, size, 3)} for name, size in videos.items()},
        "action": {"dtype": "float32", "shape": (ACTION_DIM,), "names": ["x", "y", "z", "gripper"]},
    }
    expert = Expert()
    console = Console(stderr=True)
    with LeRobotWriter(folder, fps=FPS, features=features, robot_type="sawyer") as writer:
        for goal in track(range(episodes), f"Collecting {TASK}", console=console):
            observation, _ = environment.reset(seed=goal)
            is_done = False
            while not is_done:
                frame = observation if cameras else {"observation.state": observation}
                action = expert.action(frame["observation.state"])
                writer.add_frame({**frame, "action": action, "task": INSTRUCTION})
                observation, _, is_done, is_truncated, _ = environment.step(action)
                if is_truncated and not is_done:
                    raise RuntimeError(f"the expert failed at goal {goal} of seed {seed}")
            writer.save_episode()
    environment.close()
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Collect demonstrations of a scripted expert.")
    parser.add_argument("--folder", default=FOLDER, help="dataset to create (%(default)s)")
    parser.add_argument("--episodes", type=int, default=50, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the goals (%(default)s)")
    parser.add_argument(
        "--camera", action="append", default=[], help="record a video, such as corner; repeatable"
    )
    parser.add_argument("--image-size", type=int, default=128, help="in pixels (%(default)s)")
    given = parser.parse_args()
    if Path(given.folder).exists():
        sys.exit(f"{given.folder} exists; remove it, or pass another --folder")
    collect(given.folder, given.episodes, given.seed, given.camera, given.image_size)
    print(f"{given.episodes} episodes in {given.folder}")


if __name__ == "__main__":
    main()
