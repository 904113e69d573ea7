"""Tests of the recorder, its records and its workers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from full_training import STEPS, build
from robo_orchard_lab.testing.fixtures import isolated
from robo_orchard_lab.testing.resume_worker import (
    RunOrder,
    describe_function,
    execute_order,
    find_function,
)
from robo_orchard_lab.testing.run_record import (
    RunRecord,
    RunRecorder,
    leaves,
    read_record,
    rng_facts,
    state_facts,
    value_text,
)


def outcome(folder: Path, recorded: bool) -> dict[str, str]:
    """The end of a run, with or without someone who writes it down."""
    folder.mkdir()
    with isolated(0):
        trainer = build(folder, None)
        if recorded:
            with RunRecorder(trainer, folder / "record.jsonl", None):
                trainer()
        else:
            trainer()
        return state_facts(trainer)


def test_a_recorder_changes_nothing(tmp_path: Path) -> None:
    """Weights, optimizer, RNG states, hook states and the log are those without a recorder."""
    without, found = outcome(tmp_path / "a", False), outcome(tmp_path / "b", True)
    assert found == without
    logs = [(tmp_path / run / "metrics.jsonl").read_bytes() for run in ("a", "b")]
    assert logs[0] == logs[1] != b""


def record_of(tmp_path: Path, **order: Any) -> RunRecord:
    """Run the function of a recorded process in this process."""
    source = describe_function(partial(build, workers=0))
    path = tmp_path / "record.jsonl"
    with isolated(0):
        execute_order(RunOrder(source, str(tmp_path), str(path), **order))
    record = read_record(path)
    assert record is not None
    return record


def test_a_record_is_complete(tmp_path: Path) -> None:
    """It has samples, batch, state and loss of each step, events and end."""
    record = record_of(tmp_path)
    assert (record.start, record.last, sorted(record.steps)) == (0, STEPS, [*range(STEPS + 1)])
    assert record.steps[0][:3] == [
        "before on_loop 0 0 0 0",
        "before on_epoch 0 0 0 0",
        "before on_step 0 0 0 0",
    ]
    assert record.steps[STEPS][-1] == f"after on_loop 2 0 {STEPS} 6"
    ahead, after = (entry for entry in record.steps[4] if isinstance(entry, dict))
    kinds = {name.partition(" ")[0].partition("[")[0] for name in ahead}
    assert kinds == {
        *("sample", "batch", "weights", "gradients", "optimizer", "lr_scheduler"),
        *("random", "hook"),
    }
    later = [name for entry in record.steps[6] if isinstance(entry, dict) for name in entry]
    assert any(name.startswith("metric grad_norm") for name in later)
    assert list(after) == ["loss"]
    assert ahead["sample indices"].startswith("[")
    assert "EMA._updates" in record.attributes[4]
    assert record.end is not None
    assert "optimizer 0.weight.exp_avg" in record.end


def test_a_worker_stops_and_saves(tmp_path: Path) -> None:
    """A worker stops after the given step, and the next worker starts there."""
    first = record_of(tmp_path, stop_after=3, save_to=str(tmp_path / "saved"))
    second = record_of(tmp_path, resume_from=str(tmp_path / "saved"), stop_after=4, seed=1)
    assert (first.last, second.start, second.last) == (3, 3, 4)
    idle = record_of(tmp_path, resume_from=str(tmp_path / "saved"), stop_after=3, seed=1)
    assert idle.steps == {3: []}


def not_a_trainer(run_folder: Path, resume_from: Any) -> Any:
    return "no trainer"


def test_a_build_without_a_trainer_is_refused(tmp_path: Path) -> None:
    """The error shows the returned object."""
    order = RunOrder(describe_function(not_a_trainer), str(tmp_path), str(tmp_path / "record"))
    with isolated(0), pytest.raises(TypeError, match="must return a HookBasedTrainer, got 'no tr"):
        execute_order(order)


def test_functions_are_found_by_name_and_by_file(tmp_path: Path) -> None:
    """A function is found in a module that import does not find; another file is an error."""
    found = find_function(describe_function(partial(not_a_trainer, resume_from=None)))
    assert found(tmp_path) == "no trainer"
    assert find_function(describe_function("pathlib:Path")) is Path
    script = tmp_path / "other.py"
    script.write_text("def build(run_folder, resume_from):\n    return 3\n", encoding="utf-8")
    assert find_function(describe_function(f"{script}:build"))(None, None) == 3
    with pytest.raises(ImportError, match="has no function 'nothing'"):
        find_function(describe_function(f"{script}:nothing"))
    with pytest.raises(ImportError, match="is not a Python file"):
        find_function({"file": str(tmp_path / "text.txt"), "module": "text", "name": "build"})


TENSORS = [
    torch.tensor(1.0),
    torch.tensor(1.0, dtype=torch.float64),
    torch.tensor([1.0]),
    torch.tensor([[1.0]]),
    torch.tensor([1.0, -0.0]),
    torch.tensor([1.0, 0.0]),
    torch.tensor([1, 0]),
    torch.tensor([True, False]),
    torch.tensor([1.0, 0.0], dtype=torch.bfloat16),
    torch.tensor([1.0, 0.0]).to(torch.float8_e4m3fn),
    torch.tensor([1.0 + 2j, 0.0]),
    torch.tensor([1.0 + 2j, 0.0]).conj(),
    torch.empty(0),
    torch.empty(0, 3),
    torch.tensor([1.0, 0.0]).to_sparse(),
    torch.tensor([float("nan"), 0.0]),
    torch.arange(6.0).reshape(2, 3),
    torch.arange(6.0).reshape(3, 2).T,
    torch.zeros(3, requires_grad=True),
]


def test_different_values_have_different_texts() -> None:
    """Tensors differ by type, shape, layout and bits; equal tensors have equal texts."""
    texts = [value_text(tensor) for tensor in TENSORS]
    assert len(set(texts)) == len(TENSORS)
    assert texts == [value_text(tensor.detach().clone()) for tensor in TENSORS]
    assert value_text(np.arange(3)) == value_text(torch.arange(3))
    assert value_text("a" * 99) != value_text("a" * 98 + "b")
    assert value_text(object()) == "<object object>"


def test_leaves_have_paths() -> None:
    """A long list of numbers, and an empty collection, is one leaf."""
    state = {"a": [{"b": 1}, (2,)], "many": [*range(20)], "none": {}, "empty": []}
    assert dict(leaves(state, "hook X")) == {
        "hook X.a[0].b": 1,
        "hook X.a[1][0]": 2,
        "hook X.many": [*range(20)],
        "hook X.none": {},
        "hook X.empty": [],
    }


def test_rng_facts_are_separate() -> None:
    """Using one of the three generators changes its fact alone."""
    with isolated(0):
        before = dict(rng_facts())
        np.random.rand()
        after = dict(rng_facts())
    assert {name for name in before if before[name] != after[name]} == {"random numpy"}
