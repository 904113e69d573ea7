"""Samples, splits and statistics of `LeRobotDataset`."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from robo_orchard_lab.data.lerobot import LeRobotDataset, LeRobotDatasetError, LeRobotWriter
from robo_orchard_lab.data.lerobot.dataset import split_episodes
from robot_data import ACTION, STATE, camera, seen_in, value_of, write_dataset

LENGTHS = (5, 1, 4, 12)
CAMERAS = {
    "observation.state": STATE,
    "action": ACTION,
    "observation.images.top": camera(),
    "observation.images.wrist": camera(40, 64),
    "observation.images.side": camera(dtype="image"),
    "note": {"dtype": "string", "shape": (1,)},
    "next.reward": {"dtype": "float32", "shape": (1,)},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset without cameras."""
    return write_dataset(tmp_path_factory.mktemp("data") / "plain", LENGTHS)


@pytest.fixture(scope="module")
def filmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset with two videos and an image, several episodes in each file."""
    return write_dataset(tmp_path_factory.mktemp("data") / "filmed", LENGTHS, CAMERAS, fps=30)


def rows_of(lengths: Sequence[int]) -> list[tuple[int, int]]:
    return [(episode, frame) for episode, n in enumerate(lengths) for frame in range(n)]


def test_samples_have_the_recorded_values(plain: Path) -> None:
    """A sample has state, action, index columns and task of its frame."""
    dataset = LeRobotDataset(plain)
    assert len(dataset) == sum(LENGTHS)
    for index, (episode, frame) in enumerate(rows_of(LENGTHS)):
        sample = dataset[index]
        assert sample["observation.state"].tolist() == value_of(STATE, episode, frame).tolist()
        assert sample["action"].tolist() == [value_of(ACTION, episode, frame).tolist()]
        assert sample["action_is_pad"].tolist() == [False]
        assert sample["task"] == f"task {episode % 2}"
        numbers = ("episode_index", "frame_index", "index", "task_index")
        assert [int(sample[n]) for n in numbers] == [episode, frame, index, episode % 2]
        assert float(sample["timestamp"]) == pytest.approx(frame / 10)


def test_chunks_repeat_the_last_action_of_an_episode(plain: Path) -> None:
    """A chunk ends within its episode; repeated actions are marked as padding."""
    dataset = LeRobotDataset(plain, chunk_size=3)
    starts = np.cumsum([0, *LENGTHS])
    for episode, length in enumerate(LENGTHS):
        for frame in range(length):
            sample = dataset[int(starts[episode]) + frame]
            frames = [min(frame + ahead, length - 1) for ahead in range(3)]
            expected = [value_of(ACTION, episode, each).tolist() for each in frames]
            assert sample["action"].tolist() == expected
            assert sample["action_is_pad"].tolist() == [frame + n >= length for n in range(3)]


def test_delta_timestamps_select_other_frames_of_the_episode(plain: Path) -> None:
    """Offsets in seconds select frames; those outside of the episode are marked as padding."""
    name = "observation.state"
    dataset = LeRobotDataset(plain, delta_timestamps={name: [-0.1, 0.0]})
    sample = dataset[6]  # the first frame of the third episode
    assert sample[name].tolist() == [value_of(STATE, 2, 0).tolist()] * 2
    assert sample[f"{name}_is_pad"].tolist() == [True, False]
    assert dataset[7][name].tolist() == [value_of(STATE, 2, n).tolist() for n in (0, 1)]


def test_offsets_between_frames_are_refused(plain: Path) -> None:
    """An offset that is no multiple of 1 / fps is an error with the offset."""
    with pytest.raises(LeRobotDatasetError, match=r"multiples of 1 / 10 s, found 0\.05"):
        LeRobotDataset(plain, delta_timestamps={"action": [0.0, 0.05]})


def test_frames_of_all_cameras_are_exact(filmed: Path) -> None:
    """Each camera's image is of the sample's episode and frame, in any order of access."""
    dataset = LeRobotDataset(filmed, delta_timestamps={"observation.images.top": [-1 / 30, 0.0]})
    rows = rows_of(LENGTHS)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    for index in order:
        sample = dataset[index]
        episode, frame = rows[index]
        top = sample["observation.images.top"]
        assert top.shape == (2, 3, 32, 48)
        assert [seen_in(each) for each in top] == [(episode, max(frame - 1, 0)), (episode, frame)]
        assert seen_in(sample["observation.images.wrist"]) == rows[index]
        side = sample["observation.images.side"]
        assert side.dtype == torch.float32
        expected = torch.from_numpy(value_of(CAMERAS["observation.images.side"], episode, frame))
        assert torch.equal(side, expected.permute(2, 0, 1) / 255)
        assert sample["note"] == f"note {frame % 2}"


def test_columns_limit_what_is_read(filmed: Path) -> None:
    """With columns, samples have these columns and padding masks only."""
    dataset = LeRobotDataset(filmed, columns=["action", "observation.state"], chunk_size=2)
    assert [*dataset[0]] == ["observation.state", "action", "action_is_pad"]
    assert dataset.cameras == []
    with pytest.raises(LeRobotDatasetError, match=r"did you mean 'observation\.state'"):
        LeRobotDataset(filmed, columns=["observation.stat"])


def test_attributes_describe_the_columns(filmed: Path) -> None:
    """Sizes, cameras, features and fps are plain data for from_data."""
    dataset = LeRobotDataset(filmed)
    assert (dataset.state_dim, dataset.action_dim, dataset.fps) == (3, 2, 30)
    assert dataset.cameras == [name for name in CAMERAS if "images" in name]
    wrist = dataset.features["observation.images.wrist"]
    assert wrist == {"dtype": "video", "shape": [3, 40, 64]}
    assert dataset.tasks == ["task 0", "task 1"]


def test_splits_divide_the_episodes(plain: Path) -> None:
    """Train and validation have all episodes between them, equal for an equal seed."""
    options: dict[str, Any] = {"validation_fraction": 0.25, "split_seed": 3}
    train = LeRobotDataset(plain, "train", **options)
    validation = LeRobotDataset(plain, "validation", **options)
    assert sorted([*train.episode_indices, *validation.episode_indices]) == [0, 1, 2, 3]
    assert len(validation.episode_indices) == 1
    assert (train.episode_indices, validation.episode_indices) == split_episodes(4, 0.25, 3)
    found = {int(validation[index]["episode_index"]) for index in range(len(validation))}
    assert found == {*validation.episode_indices}
    assert len({tuple(split_episodes(20, 0.25, seed)[1]) for seed in range(5)}) > 1


def test_chosen_episodes_keep_their_indices(plain: Path) -> None:
    """With chosen episodes, chunks and indices are those of the complete dataset."""
    dataset = LeRobotDataset(plain, [3, 1], chunk_size=4)
    complete = LeRobotDataset(plain, chunk_size=4)
    for position, index in enumerate([5, *range(10, 22)]):
        for name, value in complete[index].items():
            assert np.array_equal(dataset[position][name], value), name
    with pytest.raises(LeRobotDatasetError, match="indices from 0 to 3, found 2 to 4"):
        LeRobotDataset(plain, [2, 4])


def test_statistics_are_of_the_train_split(plain: Path) -> None:
    """Merged statistics equal those of all frames of the train split, for both splits."""
    dataset = LeRobotDataset(plain, "validation", validation_fraction=0.5)
    train = LeRobotDataset(plain, "train", validation_fraction=0.5)
    assert dataset.statistics == train.statistics
    for name in ("observation.state", "action"):
        rows = [train[index][name].double().flatten() for index in range(len(train))]
        values = torch.stack(rows).numpy()
        found = train.statistics[name]
        assert found["mean"] == pytest.approx(values.mean(axis=0))
        assert found["std"] == pytest.approx(values.std(axis=0))
        assert found["min"] == values.min(axis=0).tolist()
        assert found["max"] == values.max(axis=0).tolist()


def test_statistics_of_cameras_are_per_channel(filmed: Path) -> None:
    """Statistics of a camera are those of its pixels, of shape (3, 1, 1)."""
    dataset = LeRobotDataset(filmed)
    feature = CAMERAS["observation.images.side"]
    images = np.stack([value_of(feature, *row) for row in rows_of(LENGTHS)]) / 255
    found = dataset.statistics["observation.images.side"]
    assert np.shape(found["mean"]) == (3, 1, 1)
    assert np.ravel(found["mean"]) == pytest.approx(images.mean(axis=(0, 1, 2)))
    assert np.ravel(found["std"]) == pytest.approx(images.std(axis=(0, 1, 2)))


@pytest.mark.parametrize(("context", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_load_equal_samples(filmed: Path, context: str, workers: int) -> None:
    """Workers decode what this process decodes, after a fork with open videos and after a spawn."""
    dataset = LeRobotDataset(filmed, chunk_size=2)
    expected = [dataset[index] for index in range(len(dataset))]  # opens the videos here
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=4,
        num_workers=workers,
        multiprocessing_context=multiprocessing.get_context(context),
    )
    index = 0
    for batch in loader:
        for position in range(len(batch["action"])):
            for name, value in expected[index].items():
                assert np.array_equal(batch[name][position], value), name
            index += 1
    assert index == len(dataset)


def test_forked_workers_open_videos_of_their_own(tmp_path: Path) -> None:
    """After a fork, workers share no file position with this process or with each other."""
    features = {"action": ACTION, "observation.images.top": camera(128, 128)}
    random = np.random.default_rng(0)
    with LeRobotWriter(tmp_path / "data", fps=30, features=features, codec="h264") as writer:
        for _ in range(60):  # noise: larger than the buffer of a file
            noise = random.integers(0, 255, (128, 128, 3), dtype=np.uint8)
            writer.add_frame({"action": [0, 0], "observation.images.top": noise, "task": "look"})
        writer.save_episode()
    dataset = LeRobotDataset(tmp_path / "data", frame_cache_mb=0)
    expected = [dataset[index]["observation.images.top"] for index in range(60)]
    order = random.permutation(60).tolist() * 2
    fork = multiprocessing.get_context("fork")
    loader: DataLoader[Any] = DataLoader(
        dataset, None, sampler=order, num_workers=2, multiprocessing_context=fork
    )
    for index, sample in zip(order, loader, strict=True):
        assert torch.equal(sample["observation.images.top"], expected[index])


def test_pickled_datasets_leave_out_open_videos(filmed: Path) -> None:
    """Pickling after decoding works, and the copy decodes again."""
    dataset = LeRobotDataset(filmed)
    image = dataset[7]["observation.images.top"]
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[7]["observation.images.top"], image)


def test_samples_and_batches_travel_between_processes(filmed: Path) -> None:
    """Pickled samples and batches have equal values, which the receiver may change."""
    dataset = LeRobotDataset(filmed, chunk_size=2)
    batch = next(iter(DataLoader(dataset, batch_size=22)))
    for sent in (dataset[3], batch):
        received = pickle.loads(pickle.dumps(sent))
        assert received.keys() == sent.keys()
        for name, value in sent.items():
            assert np.array_equal(received[name], value), name
        received["action"].add_(1)
        assert not torch.equal(received["action"], sent["action"])


def test_changed_samples_do_not_change_the_dataset(plain: Path) -> None:
    """A transform may change a sample in place."""
    dataset = LeRobotDataset(plain, chunk_size=2)
    takes: list[Callable[[], dict[str, Any]]] = [
        lambda: dataset[3],
        lambda: dataset.__getitems__([3])[0],
    ]
    for take in takes:
        before = {name: torch.as_tensor(v).clone() for name, v in take().items() if name != "task"}
        for name in before:
            take()[name].fill_(0)
        assert all(torch.equal(take()[name], value) for name, value in before.items())


def test_indices_outside_are_refused(plain: Path) -> None:
    """Iteration ends, negative indices count from the end, and others are an IndexError."""
    dataset = LeRobotDataset(plain)
    assert sum(1 for _ in iter(dataset)) == len(dataset)
    assert torch.equal(dataset[-1]["action"], dataset[len(dataset) - 1]["action"])
    with pytest.raises(IndexError, match="below 22"):
        dataset[22]


def test_actions_and_observations_of_one_number_keep_their_axis(tmp_path: Path) -> None:
    """A one-dimensional action is a vector, as policies expect; other columns are numbers."""
    one = {"dtype": "float32", "shape": (1,)}
    features = {"observation.state": one, "action": one, "next.reward": one}
    dataset = LeRobotDataset(write_dataset(tmp_path / "data", (3,), features), chunk_size=2)
    sample = dataset[0]
    shapes = {name: sample[name].shape for name in features}
    assert shapes == {"observation.state": (1,), "action": (2, 1), "next.reward": ()}
    assert dataset.action_dim == 1
    assert np.shape(dataset.statistics["action"]["mean"]) == (1,)
