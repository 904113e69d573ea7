"""LeRobotDataset v3.0 folders: demonstrations as Parquet tables and camera videos.

- `dataset`: `LeRobotDataset`, a map-style dataset of frames and action chunks.
- `writer`: `LeRobotWriter`, which records episodes and survives interruptions.
- `format`: ``info.json``, tasks, episodes and paths of a folder.
- `columns`: tables of frames as tensors in memory.
- `video`: encode, join and lazily decode camera videos.
- `statistics`: mean, std, min, max and quantiles of features, merged over episodes.

Requires ``pip install "robo-orchard-hooks[robotics]"`` (pyarrow, PyAV).
"""

from robo_orchard_lab.data.lerobot.dataset import LeRobotDataset
from robo_orchard_lab.data.lerobot.format import LeRobotDatasetError
from robo_orchard_lab.data.lerobot.writer import LeRobotWriter

__all__ = ["LeRobotDataset", "LeRobotDatasetError", "LeRobotWriter"]
