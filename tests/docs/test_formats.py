"""Readers that the pages about file formats show: they read files of real runs."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState, GradientState

from hostile_checkpoints import Made
from robo_orchard_lab.pipeline.checkpoint import load_checkpoint, save_checkpoint
from robo_orchard_lab.pipeline.run.run_state import RunState
from robo_orchard_lab.pipeline.sinks import read_metrics
from run_folders import train

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference"


@pytest.fixture(autouse=True)
def fresh_accelerate_state() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _function(page: str, name: str) -> Callable[..., Any]:
    """Return a function of the program on a page."""
    text = (REFERENCE / page).read_text("utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", text, re.S)
    namespace: dict[str, Any] = {}
    exec(program, namespace)  # noqa: S102  # a program of the page
    function: Callable[..., Any] = namespace[name]
    return function


def _plain(value: Any) -> Any:
    """Return a state with NumPy arrays instead of tensors."""
    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value


def _are_equal(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_are_equal(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(_are_equal, left, right))
    return type(left) is type(right) and (left == right or left != left)


def test_the_reader_of_the_page_reads_a_run(tmp_path: Path) -> None:
    """All parts of a run's checkpoint equal those that the package loads."""
    train(tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "last"
    found = _function("checkpoint_format.md", "read_checkpoint")(folder)
    saved = load_checkpoint(folder)
    assert found.keys() == {"model", "optimizer", "trainer", "state"}
    assert _are_equal(found, _plain({**saved.parts, **saved.rank_parts}))
    assert found["trainer"]["progress"]["global_step_id"] == 14


def test_the_reader_reads_every_value_of_a_state(tmp_path: Path) -> None:
    """Marked values and a changed byte are read, and refused, as the page says."""
    state = {
        "tuple": (1, [2.5, None]),
        "numbers": {1: "a", "$x": float("nan"), "inf": float("inf")},
        "counter": Counter(a=2),
        "array": np.arange(3),
        "tensor": torch.ones(2, 2),
    }
    save_checkpoint(tmp_path / "a", 3, {"mine": state, "flat": {"w": torch.ones(3)}})
    read = _function("checkpoint_format.md", "read_checkpoint")
    found = read(tmp_path / "a")
    assert _are_equal(found, _plain({"mine": state, "flat": {"w": torch.ones(3)}}))
    file = tmp_path / "a" / "flat.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(AssertionError, match=r"flat\.safetensors"):
        read(tmp_path / "a")


def test_the_reader_joins_shards(tmp_path: Path) -> None:
    """A tensor in two shards is complete, next to a tensor without shards."""
    whole = torch.arange(21.0).reshape(7, 3)
    save_checkpoint(tmp_path / "a", 3, {"model": {"bias": torch.ones(2)}})
    made = Made.read(tmp_path / "a")
    made.manifest["ranks"] = 2
    for rank, begin, end in ((0, 0, 4), (1, 4, 7)):
        info = {"w": {"saved_offsets": [begin, 0], "full_shape": [7, 3]}}
        metadata = {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(info)}
        name = f"model.shard{rank:05d}.safetensors"
        made.files[name] = safetensors.torch.save({"w": whole[begin:end].clone()}, metadata)
        made.sign(name)
    made.write(tmp_path / "b")
    found = _function("checkpoint_format.md", "read_checkpoint")(tmp_path / "b")
    assert _are_equal(found, _plain(dict(load_checkpoint(tmp_path / "b").parts)))
    assert np.array_equal(found["model"]["w"], whole.numpy())


def test_the_reader_of_metrics_reads_a_run(tmp_path: Path) -> None:
    """Values and counters equal those that the package reads, also of a file that a crash cut."""
    train(tmp_path / "run")
    file = tmp_path / "run" / "metrics.jsonl"
    file.write_bytes(file.read_bytes() + b'{"epoch_id": 3, "global')
    values, records = _function("metrics_file.md", "read_metrics_file")(file)
    expected = read_metrics(file)
    assert len(records) == len(expected) >= 14
    assert sorted(values) == sorted((v.step, v.name, v.value) for r in expected for v in r.values)
    for mine, theirs in zip(records, expected, strict=True):
        assert mine == {name: getattr(theirs, name) for name in mine}


def test_the_page_of_the_run_folder_names_its_files(tmp_path: Path) -> None:
    """Each file of a run, and each key of run_state.json and plan.json, is on the page."""
    train(tmp_path / "run")
    page = (REFERENCE / "run_folder.md").read_text("utf-8")
    files = [path.name for path in (tmp_path / "run").iterdir()]
    assert [name for name in files if name not in page] == []
    state = json.loads((tmp_path / "run" / "run_state.json").read_text("utf-8"))
    assert state.keys() == RunState.model_fields.keys()
    plan = json.loads((tmp_path / "run" / "plan.json").read_text("utf-8"))
    names = [*state, *state["process"], *state["checkpoint"], *plan, *plan["hooks"][0]]
    assert [name for name in names if f"`{name}`" not in page] == []


def test_the_page_of_checkpoints_names_all_keys(tmp_path: Path) -> None:
    """Each key of a run's manifest and of its parts is on the page."""
    train(tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "last"
    page = (REFERENCE / "checkpoint_format.md").read_text("utf-8")
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    saved = load_checkpoint(folder)
    trainer, state = saved.parts["trainer"], saved.rank_parts["state"]
    names = [*manifest, *manifest["metadata"], *saved.parts, *trainer, *state, *state["random"]]
    assert [name for name in dict.fromkeys(names) if not re.search(rf"\b{name}\b", page)] == []
