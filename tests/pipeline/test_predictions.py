"""Outputs of a model for each sample, and their files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from robo_orchard_lab.pipeline.errors import BatchProcessorError, PipelineConfigError
from robo_orchard_lab.pipeline.predictions import Predictions


def collect(*batches: Any, indices: Any = None) -> Predictions:
    """Return the predictions of batches of two samples, and one sample in the last."""
    found = Predictions("Policy.forward")
    for number, outputs in enumerate(batches):
        samples = 1 if number == len(batches) - 1 else 2
        found.add(found.rows_of(outputs, samples, indices and indices[number]))
    return found


class Pair(NamedTuple):
    mean: torch.Tensor
    names: list[str]


@dataclass
class Action:
    action: torch.Tensor
    info: Any


def test_outputs_are_named_by_their_place() -> None:
    """Tensors, arrays, tuples, mappings, named tuples and dataclasses have a row per sample."""

    def outputs(samples: int) -> Any:
        pair = Pair(torch.ones(samples), ["a"] * samples)
        action = Action(torch.zeros(samples, 2), {"score": np.ones(samples), "loss": 1.0})
        return {"pair": pair, "both": (torch.ones(samples), torch.ones(samples, 3)), "do": action}

    found = collect(outputs(2), outputs(1), indices=[[4, np.int64(2)], torch.tensor([7])])
    assert found.indices == [4, 2, 7]
    assert len(found) == 3
    shapes = {n: getattr(column, "shape", column) for n, column in found.outputs.items()}
    assert shapes == {
        "pair.mean": (3,),
        "pair.names": ["a", "a", "a"],
        "both.0": (3,),
        "both.1": (3, 3),
        "do.action": (3, 2),
        "do.info.score": (3,),
    }


def test_files_hold_all_samples(tmp_path: Path) -> None:
    """Each format has the indices and the outputs; types that it lacks are converted."""
    batch = {"x": torch.tensor([[1.5], [float("nan")]], dtype=torch.bfloat16), "n": [1, 2]}
    last = {"x": torch.tensor([[-float("inf")]], dtype=torch.bfloat16), "n": [3]}
    found = collect(batch, last)
    for suffix in ("jsonl", "npz", "safetensors"):
        found.save(tmp_path / "new" / f"p.{suffix}")
    lines = [json.loads(line) for line in (tmp_path / "new/p.jsonl").read_text().splitlines()]
    assert lines == [
        {"index": 0, "x": [1.5], "n": 1},
        {"index": 1, "x": ["NaN"], "n": 2},
        {"index": 2, "x": ["-Infinity"], "n": 3},
    ]
    arrays = np.load(tmp_path / "new/p.npz")
    assert arrays["x"].dtype == np.float32
    assert arrays["n"].tolist() == [1, 2, 3]
    tensors = load_file(tmp_path / "new/p.safetensors")
    assert tensors["x"].dtype is torch.bfloat16
    assert tensors["index"].tolist() == [0, 1, 2]


def test_samples_may_differ_in_shape(tmp_path: Path) -> None:
    """Sequences of different lengths and lists of detections are written as JSON lines."""
    boxes = [{"box": torch.ones(2)}, {"box": torch.ones(0)}]
    found = collect(
        {"tokens": torch.ones(2, 3), "found": boxes},
        {"tokens": torch.zeros(1, 1), "found": [{"box": torch.ones(1)}]},
    )
    found.save(tmp_path / "p.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [len(line["tokens"]) for line in lines] == [3, 3, 1]
    assert [len(line["found"]["box"]) for line in lines] == [2, 0, 1]
    for suffix in (".npz", ".safetensors"):
        with pytest.raises(PipelineConfigError, match="'tokens' has rows of different shapes"):
            found.save(tmp_path / f"p{suffix}")
    texts = collect({"t": ["a", "b"]}, {"t": ["c"]})
    texts.save(tmp_path / "p.npz")
    assert np.load(tmp_path / "p.npz")["t"].tolist() == ["a", "b", "c"]
    with pytest.raises(PipelineConfigError, match=r"has values such as 'a'.* write a .jsonl"):
        texts.save(tmp_path / "p.safetensors")


def test_outputs_may_come_in_any_order() -> None:
    """A mapping with another order of keys is the same."""
    found = collect({"a": torch.zeros(2), "b": ["x", "y"]}, {"b": ["z"], "a": torch.ones(1)})
    assert found.outputs["b"] == ["x", "y", "z"]
    assert [float(value) for value in found.outputs["a"]] == [0.0, 0.0, 1.0]


def test_parts_without_rows_are_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """A loss within the outputs is reported once."""
    collect(*({"x": torch.ones(n), "loss": torch.ones(())} for n in (2, 2, 1)))
    [message] = caplog.messages
    assert message.startswith("left out 'loss' (float32[]) of Policy.forward")


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([torch.ones(())], BatchProcessorError, r"Policy.forward returned no output with a row"),
        ([None], BatchProcessorError, "no output with a row for each sample: expected tensors"),
        ([{"index": torch.ones(1)}], BatchProcessorError, "an output named 'index'"),
        (
            [{"a": torch.ones(2)}, {"b": torch.ones(1)}],
            BatchProcessorError,
            "differ between batches: expected a, found b",
        ),
        ([[object()]], PipelineConfigError, "found a object; convert it in the batch processor"),
    ],
)
def test_outputs_without_rows_are_refused(
    batches: Any, error: type[Exception], message: str
) -> None:
    """The error describes the outputs and the remedy."""
    with pytest.raises(error, match=message):
        collect(*batches)


def test_unknown_files_are_refused(tmp_path: Path) -> None:
    """The error lists the known suffixes."""
    known = r"ending in .jsonl, .npz, .parquet, .safetensors, found"
    with pytest.raises(PipelineConfigError, match=known):
        collect(torch.ones(1)).save(tmp_path / "p.csv")
