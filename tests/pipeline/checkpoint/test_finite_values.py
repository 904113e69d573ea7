"""Record of non-finite values in checkpoints, and its effect on retention and loading."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from robo_orchard_lab.pipeline.checkpoint import (
    CheckpointStore,
    FiniteCheck,
    Retention,
    load_checkpoint,
    non_finite_names,
)
from robo_orchard_lab.pipeline.checkpoint.manifest import digest_of
from robo_orchard_lab.pipeline.errors import CheckpointError

CHECK = FiniteCheck(lambda name: name.startswith(("model/", "optimizer/")))
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]


def save_all(
    root: Path, values: str, retention: Retention | None = None, metrics: str | None = None
) -> list[int]:
    """Save steps 1, 2, ..., with a NaN for each ``x``; return the kept steps."""
    with CheckpointStore(root, retention=retention) as store:
        for step, value in enumerate(values, 1):
            weight = torch.tensor([1.0, math.nan if value == "x" else float(step)])
            measured = {} if metrics is None else {"accuracy": float(metrics[step - 1])}
            store.save(step, {"model": {"w": weight}}, metrics=measured, finite=CHECK)
        return [info.step for info in store.list()]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_non_finite_value_is_found(dtype: torch.dtype, bad: float) -> None:
    """One NaN or infinity in any floating dtype names its tensor; integers are never named."""
    healthy = torch.ones(1001).to(dtype)
    poisoned = torch.ones(1001)
    poisoned[777] = bad
    found = {"a": healthy, "b": poisoned.to(dtype), "c": torch.ones(3).long()}
    assert non_finite_names(found) == ["b"]


def test_opposite_infinities_and_large_values_are_told_apart() -> None:
    """Infinities that cancel out are found; finite values with an infinite sum are not."""
    largest = torch.full((8,), torch.finfo(torch.float64).max, dtype=torch.float64)
    half = torch.full((10_000,), 6e4, dtype=torch.float16)
    cancelling = torch.tensor([math.inf, -math.inf])
    found = {"largest": largest, "half": half, "cancelling": cancelling}
    found["complex"] = torch.tensor([complex(0, math.nan)])
    assert non_finite_names(found) == ["cancelling", "complex"]


def test_saved_values_of_all_dtypes_are_found(tmp_path: Path) -> None:
    """Next to integers that look like NaN as floats, a file names exactly its poisoned tensors."""
    healthy: dict[str, torch.Tensor] = {
        "int": torch.full((5,), -1, dtype=torch.int32),
        "complex": torch.ones(3, dtype=torch.complex64),
        **{str(dtype): torch.full((70_000,), 2.0).to(dtype) for dtype in DTYPES},
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0),
    }
    poisoned = {str(dtype): healthy[str(dtype)].clone() for dtype in DTYPES[:4]}
    for tensor in poisoned.values():
        tensor[-1] = -math.inf
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"model": healthy}, finite=CHECK)
        store.save(2, {"model": {**healthy, **poisoned}}, finite=CHECK)
        found = [info.non_finite for info in store.list()]
    assert found == [(), tuple(f"model/{name}" for name in poisoned)]


def test_manifest_names_the_first_non_finite_states(tmp_path: Path) -> None:
    """Weights and optimizer state are named, at most five; other parts are not checked."""
    nan = torch.tensor([math.nan])
    parts = {
        "model": {f"w{index}": nan for index in range(4)} | {"fine": torch.ones(1)},
        "optimizer": {"state": {"w0": {"exp_avg": nan, "step": torch.ones(1), "inf": -nan}}},
        "other": {"w": nan},
    }
    with CheckpointStore(tmp_path) as store:
        store.save(1, parts, finite=CHECK)
        store.save(2, {"other": {"w": nan}}, finite=FiniteCheck(CHECK.covers, ["losses"]))
        store.save(3, parts)
        named, only_losses, unchecked = store.list()
    assert named.non_finite == (
        *("model/w0", "model/w1", "model/w2", "model/w3"),
        "optimizer/state.w0.exp_avg",
    )
    assert named.poison.startswith("has non-finite values in model/w0, ")
    assert (only_losses.non_finite, only_losses.poison) == (("losses",), "")
    assert (unchecked.non_finite, unchecked.poison) == (None, "")


def test_unchecked_checkpoint_counts_as_healthy(tmp_path: Path) -> None:
    """A checkpoint saved without the check is the newest healthy one."""
    save_all(tmp_path, "..")
    CheckpointStore(tmp_path).open().save(3, {})
    saved = CheckpointStore(tmp_path).load_newest()
    assert saved is not None
    assert (saved.info.step, saved.info.non_finite, saved.skipped) == (3, None, ())


@pytest.mark.parametrize("names", ["no list", [1], ["a\nb"], ["w"] * 6, ["w" * 201]])
def test_hostile_record_is_refused(names: object, tmp_path: Path) -> None:
    """A record that no save writes, such as one with a line break, is an error."""
    save_all(tmp_path, ".")
    file = tmp_path / "step_00000001" / "manifest.json"
    document = json.loads(file.read_text()) | {"non_finite": names}
    del document["digest"]
    text = json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"
    document["digest"] = digest_of("xxh3_128", text)
    file.write_bytes(json.dumps(document, indent=1, sort_keys=True).encode() + b"\n")
    with pytest.raises(CheckpointError, match="expected a list of names"):
        load_checkpoint(file.parent)


@pytest.mark.parametrize(
    ("values", "retention", "left"),
    [
        ("..xxx", Retention(keep_last=2), [2, 4, 5]),
        ("..xxx", Retention(keep_last=1), [2, 5]),
        ("..xx.", Retention(keep_last=2), [4, 5]),
        ("xxxx", Retention(keep_last=2), [3, 4]),
        (".x.x.", Retention(keep_last=1, keep_every=2), [2, 4, 5]),
        ("..xxx", Retention(keep_last=1, keep_best=1, monitor="accuracy", mode="max"), [1, 2, 5]),
    ],
)
def test_newest_healthy_checkpoint_stays(
    values: str, retention: Retention, left: list[int], tmp_path: Path
) -> None:
    """Newer poisoned checkpoints never replace the newest healthy one, nor are they the best."""
    assert save_all(tmp_path, values, retention, metrics="51999") == left


def test_prune_keeps_the_newest_healthy_checkpoint_that_verifies(tmp_path: Path) -> None:
    """A damaged healthy checkpoint does not count; the decision has its reason."""
    save_all(tmp_path, "...xx")
    damaged = tmp_path / "step_00000003" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    with CheckpointStore(tmp_path, retention=Retention(keep_last=1)) as store:
        decisions = {d.path.name: d.why for d in store.prune() if not d.removed}
        assert [info.step for info in store.list()] == [2, 5]
    assert decisions["step_00000002"] == "the newest healthy one: newer ones are not finite"


def test_poisoned_checkpoints_are_skipped_with_the_reason(tmp_path: Path) -> None:
    """The newest healthy checkpoint is loaded, and ``skipped`` names the newer poisoned ones."""
    save_all(tmp_path, "..xx", Retention(monitor="accuracy", mode="max"), metrics="1299")
    store = CheckpointStore(tmp_path)
    saved = store.load_newest()
    assert saved is not None
    assert saved.info.step == 2
    assert [path.name for path, _ in saved.skipped] == ["step_00000004", "step_00000003"]
    assert "has non-finite values in model/w" in saved.skipped[0][1]
    assert (tmp_path / "best").resolve().name == "step_00000002"
    assert store.load("last").info.step == 4


def test_only_poisoned_checkpoints_are_an_error(tmp_path: Path) -> None:
    """Without a healthy checkpoint, nothing is loaded, and the message states the remedies."""
    save_all(tmp_path, "xx")
    with pytest.raises(CheckpointError, match=r"finite weights.*\n.*00000002 has non-finite"):
        CheckpointStore(tmp_path).load_newest()
