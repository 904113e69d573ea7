"""Reading of LeRobot datasets beside lerobot's own reader, on the same folder.

`peers.sh` builds the environment with lerobot, in which both readers run in one process. Samples
are read in one random order. A figure is the time of a sample; a bar of 1.0 of the throughput is a
bar of 1.0 of the time.
"""

import json
import random
import tempfile
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet as parquet
import torch
from torch.utils.data import DataLoader

from benchmarks.environment import describe
from benchmarks.report import Report, Row, Table
from benchmarks.timing import interleave
from robo_orchard_lab.data.lerobot import LeRobotDataset, LeRobotWriter
from robo_orchard_lab.data.lerobot.format import DATA_PATH, EPISODES_PATH, INFO_PATH
from robo_orchard_lab.experiment import ExperimentConfig
from robo_orchard_lab.pipeline.sinks.jsonl import read_metrics

LEROBOT = "lerobot"
OURS = "this reader"
FPS = 30
SIZE = 14
"""Numbers of the state and of the action, as of two arms."""
CHUNK = 16
BATCH_SIZE = 64
BAR = 1.0
BAR_FLAT = 1.5
BAR_WAIT = 5.0
CAMERAS = ("observation.images.top", "observation.images.wrist")
TRAINED = ["observation.state", "action"]


def run(*, quick: bool) -> Report:
    torch.set_num_threads(1)
    rounds = 3 if quick else 11
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        states = record(folder / "states", episodes=5 if quick else 50, length=200)
        filmed = record(folder / "filmed", episodes=3 if quick else 20, length=100, filmed=True)
        few, many = (100, 64) if quick else (1000, 192)
        tables = [
            _beside("Frames of state and action", states, 1, few, rounds),
            _beside(f"Chunks of {CHUNK} actions", states, CHUNK, few, rounds),
            _beside("Frames with two cameras, AV1, 320 x 240", filmed, 1, many, rounds),
            _beside(f"Chunks of {CHUNK} actions with two cameras", filmed, CHUNK, many, rounds),
            _by_size(folder, states, 4 if quick else 100),
            _waiting(folder, states, steps=40 if quick else 400),
        ]
    packages = ["robo-orchard-hooks", "torch", "lerobot", "torchcodec", "av", "pyarrow"]
    return Report("robot_data", tables, environment=describe(packages))


def record(folder: Path, *, episodes: int, length: int, filmed: bool = False) -> Path:
    """Write a dataset; its videos show a moving pattern."""
    vector = {"dtype": "float32", "shape": (SIZE,)}
    features: dict[str, dict[str, Any]] = {"observation.state": vector, "action": vector}
    if filmed:
        features.update({n: {"dtype": "video", "shape": (240, 320, 3)} for n in CAMERAS})
    generator = np.random.default_rng(0)
    with LeRobotWriter(folder, fps=FPS, features=features) as writer:
        for _ in range(episodes):
            tiles = generator.integers(0, 255, (15, 20, 3), dtype=np.uint8)
            picture = np.kron(tiles, np.ones((16, 16, 1), np.uint8))
            for frame in range(length):
                values = generator.normal(size=(2, SIZE)).astype(np.float32)
                sample: dict[str, Any] = dict(zip(features, values, strict=False))
                if filmed:
                    sample.update({name: np.roll(picture, 3 * frame, axis=1) for name in CAMERAS})
                writer.add_frame({**sample, "task": "move"})
            writer.save_episode()
    return folder


def _beside(title: str, folder: Path, chunk: int, count: int, rounds: int) -> Table:
    ours = LeRobotDataset(folder, chunk_size=chunk, frame_cache_mb=0)  # as lerobot, which has none
    order = [*range(len(ours))]
    random.Random(0).shuffle(order)
    order = order[:count]
    if find_spec("lerobot") is None:
        note = "not measured: runs where peers.sh has built its environment"
        rows = [
            Row.of(f"{OURS}, by sample", [_by_sample(ours, order)], scale=1e6),
            Row.of(f"{OURS}, by batch of {BATCH_SIZE}", [_by_batch(ours, order)], scale=1e6),
            Row(LEROBOT, note=note),
        ]
        return Table(title, "us per sample", rows)
    theirs = _lerobot(folder, chunk)
    rows = []
    for way, measure in (("by sample", _by_sample), (f"by batch of {BATCH_SIZE}", _by_batch)):
        contenders = {LEROBOT: partial(measure, theirs, order), OURS: partial(measure, ours, order)}
        samples = interleave(contenders, reference=LEROBOT, rounds=rounds)
        rows.append(Row.of(f"{LEROBOT}, {way}", samples.values[LEROBOT], scale=1e6))
        reference = samples.references[OURS]
        mine = samples.values[OURS]
        rows.append(Row.of(f"{OURS}, {way}", mine, reference=reference, bar=BAR, scale=1e6))
    return Table(title, "us per sample", rows)


def _lerobot(folder: Path, chunk: int) -> Any:
    """Return lerobot's reader with its default video decoder."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset as Reader

    deltas = {"action": [number / FPS for number in range(chunk)]} if chunk > 1 else None
    return Reader("benchmark/data", root=folder, delta_timestamps=deltas)


def _by_sample(dataset: Any, order: Sequence[int]) -> float:
    began_at = perf_counter()
    for index in order:
        dataset[index]
    return (perf_counter() - began_at) / len(order)


def _by_batch(dataset: Any, order: Sequence[int]) -> float:
    loader: DataLoader[Any] = DataLoader(dataset, BATCH_SIZE, sampler=order)
    began_at = perf_counter()
    for _ in loader:
        pass
    return (perf_counter() - began_at) / len(order)


def _by_size(folder: Path, states: Path, copies: int) -> Table:
    """Measure random access to datasets of different sizes, with and without copies of a table."""
    large = enlarge(states, folder / "large", copies)
    order = random.Random(1)
    datasets = {}
    for path in (states, large):
        dataset = LeRobotDataset(path, chunk_size=CHUNK, columns=TRAINED)
        datasets[f"{len(dataset):,} frames"] = dataset
    indices = {name: order.choices(range(len(each)), k=2000) for name, each in datasets.items()}
    first, second = datasets
    contenders = {name: partial(_by_sample, each, indices[name]) for name, each in datasets.items()}
    samples = interleave(contenders, reference=first, rounds=11)
    base = samples.references[second]
    rows = [
        Row.of(first, samples.values[first], scale=1e6),
        Row.of(second, samples.values[second], reference=base, bar=BAR_FLAT, scale=1e6),
    ]
    return Table("Random access by the size of the dataset", "us per sample", rows)


def enlarge(source: Path, target: Path, copies: int) -> Path:
    """Write a dataset with all episodes of `source` several times."""
    place = {"chunk_index": 0, "file_index": 0}
    info = json.loads((source / INFO_PATH).read_text(encoding="utf-8"))
    totals = {name: info[name] for name in ("total_episodes", "total_frames")}
    shifts = {
        DATA_PATH: {"episode_index": "total_episodes", "index": "total_frames"},
        EPISODES_PATH: {
            "episode_index": "total_episodes",
            "dataset_from_index": "total_frames",
            "dataset_to_index": "total_frames",
        },
    }
    for template, names in shifts.items():
        path = template.format(**place)
        table = parquet.read_table(source / path)
        parts = []
        for copy in range(copies):
            part = table
            for name, total in names.items():
                shifted = pyarrow.compute.add(table[name], copy * totals[total])
                part = part.set_column(part.schema.get_field_index(name), name, shifted)
            parts.append(part)
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.concat_tables(parts), target / path)
    for name, total in totals.items():
        info[name] = total * copies
    (target / INFO_PATH).write_text(json.dumps(info), encoding="utf-8")
    (target / "meta/tasks.parquet").write_bytes((source / "meta/tasks.parquet").read_bytes())
    return target


def _waiting(folder: Path, states: Path, steps: int) -> Table:
    """Measure the share of a training step that waits for data, with 2 workers."""
    document = {
        "model": {"class_type": "BehaviorCloning", "statistics": {"from_data": "statistics"}},
        "data": {
            "train": {
                "dataset": {
                    "class_type": "LeRobotDataset",
                    "folder": str(states),
                    "chunk_size": 8,
                    "columns": ["observation.state", "action"],
                },
                "batch_size": 256,
                "shuffle": True,
                "num_workers": 2,
                "persistent_workers": True,
            }
        },
        "batch_processor": {"class_type": "PolicyProcessor"},
        "optimizer": {"class_type": "torch.optim:AdamW", "lr": 0.001},
        "hooks": {
            "log": {
                "class_type": "MetricsLogger",
                "every": "10 steps",
                "sinks": [{"class_type": "JsonLinesSink", "path": "metrics.jsonl"}],
            },
            "stats": {"class_type": "StatsMonitor"},
        },
        "trainer": {"max_step": steps},
    }
    run = folder / "run"
    ExperimentConfig.from_dict(document).build(run_folder=run).trainer()
    found: dict[str, list[float]] = {"data": [], "compute": [], "hooks": []}
    for record_ in read_metrics(run / "metrics.jsonl")[1:]:  # the first has the start of workers
        for each in record_.values:
            part = each.name.removeprefix("perf/").removesuffix("_s")
            if part in found and each.name.startswith("perf/"):
                found[part].append(each.value)
    total = [sum(times) for times in zip(*found.values(), strict=True)]
    shares = [100 * data / step for data, step in zip(found["data"], total, strict=True)]
    note = (
        f"a step of {1e3 * median(total):.1f} ms: behavior cloning, batches of 256; means of 10 "
        "steps, by StatsMonitor; epochs begin within some"
    )
    return Table("Waiting for data", "% of a step", [Row.of(OURS, shares, bar=BAR_WAIT)], [note])
