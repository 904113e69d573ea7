"""Checkpoints crafted to do harm."""

from __future__ import annotations

import os
import resource
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import psutil  # type: ignore[import-untyped]  # carries no annotations
import pytest
import torch

from hostile_checkpoints import LIMITS, WAYS, Made, make_hostile
from robo_orchard_lab.pipeline.checkpoint import load_checkpoint, save_checkpoint
from robo_orchard_lab.pipeline.errors import CheckpointError

# Additional memory for reading: the limits' 16 MiB of tensors, and 25 times their 1 MiB of JSON.
ROOM_BYTES = 256 << 20
SLOWEST_S = 5.0


@pytest.fixture
def good(tmp_path: Path) -> Made:
    tensors = {
        "w": torch.ones(3, 4),
        "b": torch.zeros(5, dtype=torch.float64),
        "flags": torch.tensor([True, False, True]),
    }
    save_checkpoint(
        tmp_path / "good",
        3,
        {"model": tensors, "optimizer": {"lr": 0.1, "state": {0: tensors["w"]}}, "trainer": [1]},
        {"random": {"stream": torch.arange(8), "place": 3}},
        metrics={"loss": 0.5},
        metadata={"versions": {"torch": "2"}},
    )
    assert load_checkpoint(tmp_path / "good", limits=LIMITS).info.step == 3
    return Made.read(tmp_path / "good")


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Limit additional memory; more is a MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def refusal_of(path: Path) -> str | None:
    """Return the error's text, or None if the checkpoint loads."""
    try:
        load_checkpoint(path, limits=LIMITS)
    except CheckpointError as error:
        return str(error)
    return None


def check_all_are_refused(good: Made, folder: Path, numbers: range) -> None:
    """Check that each is soon a CheckpointError with the path, and that nothing is written."""
    arena = folder / "arena"
    arena.mkdir()
    (arena / "secret").write_text("12345")
    before = sorted(os.listdir(folder))
    refused: Counter[str] = Counter()
    for number in numbers:
        way, made = make_hostile(good, number)
        path = arena / "step_00000003"
        made.write(path)
        names = sorted(os.listdir(path))
        began_at = monotonic()
        message = refusal_of(path)
        assert message is not None, f"number {number} was loaded: {way}"
        assert str(path) in message, (number, way)
        assert len(message) < 2000, (number, way)
        assert monotonic() - began_at < SLOWEST_S, (number, way)
        assert sorted(os.listdir(path)) == names
        assert sorted(os.listdir(arena)) == ["secret", "step_00000003"]
        refused[way] += 1
        shutil.rmtree(path)
    assert (arena / "secret").read_text() == "12345"
    assert sorted(os.listdir(folder)) == before
    assert len(refused) == len(WAYS)


def test_hostile_checkpoints_are_refused(good: Made, tmp_path: Path, little_memory: None) -> None:
    """None of 1,700 defective checkpoints loads, crashes, is slow or needs much memory."""
    check_all_are_refused(good, tmp_path, range(1_700))


@pytest.mark.slow
def test_ten_thousand_hostile_checkpoints_are_refused(
    good: Made, tmp_path: Path, little_memory: None
) -> None:
    """10,000 other hostile checkpoints are refused as well."""
    check_all_are_refused(good, tmp_path, range(10_000, 20_000))
