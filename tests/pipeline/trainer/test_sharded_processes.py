"""Two real processes that train a model in shards (FSDP2), against the same in DDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from launching import SCRIPTS, launch
from robo_orchard_lab.pipeline.checkpoint import (
    CheckpointStore,
    ReadLimits,
    export_weights,
    load_checkpoint,
)
from robo_orchard_lab.pipeline.checkpoint.reader import OpenCheckpoint
from sharded_on_ranks import OwnValues, in_any_number

SCRIPT = SCRIPTS / "sharded_on_ranks.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    launch(SCRIPT, folder)
    launch(SCRIPT, folder, processes=3)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return results(folder, of=2)


def results(folder: Path, of: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank} of {of}.pt") for rank in range(of)]


def assert_close(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["progress"] == other["progress"]
    for part in ("losses", "weights"):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=1e-9)


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["progress"] == other["progress"]
    for part in ("losses", "weights"):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)


def end_of(one: dict[str, Any], steps: int) -> dict[str, Any]:
    return {**one, "losses": one["losses"][-steps:]}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_trains_as_ddp_does(found: list[dict[str, Any]], accumulate: int) -> None:
    """Losses, weights and counters are those of DDP, also with accumulation and a short window."""
    for of_rank in found:
        assert_close(of_rank[f"sharded{accumulate}"], of_rank[f"ddp{accumulate}"])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_resumes_exactly(found: list[dict[str, Any]], accumulate: int) -> None:
    """A run that is stopped and goes on ends bit for bit the same, also within a window."""
    for of_rank in found:
        straight = of_rank[f"sharded{accumulate}"]
        assert_same(of_rank[f"sharded{accumulate} resumed"], end_of(straight, steps=5))


def test_a_checkpoint_crosses(found: list[dict[str, Any]]) -> None:
    """One of shards goes on in DDP, and the other way round."""
    for of_rank in found:
        for name in ("sharded to ddp", "ddp to sharded"):
            assert_close(of_rank[name], end_of(of_rank["sharded1"], steps=5))


def test_what_a_hook_has_whole_stays_so(folder: Path, found: list[dict[str, Any]]) -> None:
    """Each rank gets back its own tensor, though it has a parameter's name and shape."""
    for rank, of_rank in enumerate(found):
        expected = OwnValues.first_of(rank).double() + 9
        resumed = ("sharded1 resumed", "sharded3 resumed", "sharded to ddp", "ddp to sharded")
        for name in ("sharded1", *resumed):
            torch.testing.assert_close(of_rank[name]["own values"], expected, rtol=0, atol=0)
    for rank, of_rank in enumerate(results(folder, of=3)):
        expected = OwnValues.first_of(min(rank, 1)).double() + 9
        torch.testing.assert_close(of_rank["any"]["own values"], expected, rtol=0, atol=0)


def test_it_resumes_on_three(folder: Path, found: list[dict[str, Any]]) -> None:
    """What two have saved, three go on with, each with other shards."""
    assert_goes_on([of_rank["any"] for of_rank in found], [r["any"] for r in results(folder, of=3)])
    one, three = (load_file(folder / name / "ema.safetensors") for name in ("any", "of three"))
    torch.testing.assert_close(one, three, rtol=0, atol=1e-9)


def test_it_resumes_on_one(folder: Path, found: list[dict[str, Any]], tmp_path: Path) -> None:
    """What two have saved, one goes on with, with a plain model."""
    torch.set_default_dtype(torch.float64)
    try:
        alone = in_any_number(tmp_path, None, folder / "of two" / "checkpoints" / "last")
    finally:
        torch.set_default_dtype(torch.float32)
    assert_goes_on([of_rank["any"] for of_rank in found], [alone])


def assert_goes_on(straight: list[dict[str, Any]], resumed: list[dict[str, Any]]) -> None:
    assert resumed[0]["progress"] == straight[0]["progress"]
    for step in range(5):
        samples = [
            sorted(index for of_rank in ranks for index in of_rank["samples"][step - 5])
            for ranks in (straight, resumed)
        ]
        assert samples[0] == samples[1]
    for of_rank in resumed:
        weights = straight[0]["weights"]
        torch.testing.assert_close(of_rank["weights"], weights, rtol=0, atol=1e-9)


def test_each_process_writes_its_shards(folder: Path) -> None:
    """Each file has a part of every tensor that can be divided, and the rest is there once."""
    checkpoint = folder / "sharded1" / "checkpoints" / "last"
    first, second = (
        load_file(checkpoint / f"model.shard{rank:05d}.safetensors") for rank in (0, 1)
    )
    assert {name: tuple(value.shape) for name, value in first.items()} == {
        **{"0.weight": (4, 4), "0.bias": (4,), "2.weight": (4,), "2.bias": (4,)},
        **{"3.weight": (1, 7), "3.bias": (1,)},
    }
    assert second["0.weight"].shape == (3, 4)
    assert set(load_file(checkpoint / "model.safetensors")) == {
        *("2.running_mean", "2.running_var", "2.num_batches_tracked")
    }


def test_replicas_of_shards_are_written_once(folder: Path, found: list[dict[str, Any]]) -> None:
    """Where two processes have the same shards, it trains the same, and the first one saves."""
    for of_rank in found:
        assert_close(of_rank["replicas"], of_rank["sharded1"])
    checkpoint = folder / "replicas" / "checkpoints" / "last"
    assert [path.name for path in checkpoint.glob("model.shard*")] == [
        "model.shard00000.safetensors"
    ]
    export_weights(checkpoint, folder / "replicas.safetensors")
    exported = load_file(folder / "replicas.safetensors")
    torch.testing.assert_close(exported, found[0]["replicas"]["weights"], rtol=0, atol=0)


def test_a_full_export(folder: Path, found: list[dict[str, Any]], tmp_path: Path) -> None:
    """One process makes one file of it, with the weights that the run ended with."""
    weights = found[0]["sharded1"]["weights"]
    export_weights(folder / "sharded1" / "checkpoints" / "last", tmp_path / "model.safetensors")
    for path in (
        tmp_path / "model.safetensors",
        folder / "sharded1" / "model" / "model.safetensors",
    ):
        exported = load_file(path)
        assert exported.keys() == weights.keys()
        assert all(torch.equal(exported[name], weights[name]) for name in weights)


def test_what_ranks_have_in_shards_stays_theirs(folder: Path) -> None:
    """A part of nothing but sharded tensors is the job's if the job saved it, and else a rank's."""
    for rank in (0, 1):
        with OpenCheckpoint(folder / "stored", ReadLimits()) as opened:
            saved = opened.load(rank)
        assert saved.parts.keys() == {"model"}
        assert saved.rank_parts.keys() == {"own"}
        assert saved.rank_parts["own"]["rows"].tolist() == [0, 1, 2]


def test_a_sharded_tensor_may_be_empty(folder: Path) -> None:
    """One without elements is saved and loaded with its shape, as any other."""
    found = load_checkpoint(folder / "stored").parts["model"]
    assert found["rows"].tolist() == [0, 1, 2]
    assert found["nothing"].shape == (0, 2)


def test_torch_reads_the_shards(folder: Path, found: list[dict[str, Any]]) -> None:
    """They are files of torch's distributed checkpoint."""
    weights = found[0]["sharded1"]["weights"]
    loaded = {name: torch.zeros_like(value) for name, value in weights.items()}
    reader = HuggingFaceStorageReader(str(folder / "sharded1" / "checkpoints" / "last"))
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        load(loaded, storage_reader=reader, no_dist=True)
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_the_average_is_that_of_ddp(folder: Path) -> None:
    """Each process averages its shards of what DDP averages, and each resumes the other."""
    sharded, resumed, *others = (
        load_file(folder / name / "ema.safetensors")
        for name in ("sharded1", "sharded1/resumed", "ddp1", "to_sharded", "to_ddp")
    )
    for other in others:
        torch.testing.assert_close(sharded, other, rtol=0, atol=1e-9)
    torch.testing.assert_close(sharded, resumed, rtol=0, atol=0)


def test_saves_in_the_background(folder: Path, found: list[dict[str, Any]]) -> None:
    """They hold what the run had at their step, though it has gone on meanwhile."""
    store = CheckpointStore(folder / "background" / "checkpoints")
    assert [info.step for info in store.list()] == [2, 4, 6, 8, 9]
    assert all(found.problem is None for found in store.verify())
    here, straight = (
        load_checkpoint(folder / name / "checkpoints" / step).parts["model"]
        for name, step in (("background", "step_00000004"), ("sharded1/stopped", "last"))
    )
    torch.testing.assert_close(here, straight, rtol=0, atol=0)
    assert_same(found[0]["background"], found[0]["sharded1"])


@pytest.mark.parametrize("what", ["frozen", "by value", "by another norm", "skipped"])
def test_hooks_do_as_with_ddp(found: list[dict[str, Any]], what: str) -> None:
    """Freezing, clipping, and skipping an update for one rank's NaN."""
    for of_rank in found:
        one, other = of_rank[f"sharded {what}"], of_rank[f"ddp {what}"]
        torch.testing.assert_close(one["weights"], other["weights"], rtol=0, atol=1e-9)
        assert one["progress"] == other["progress"]
    assert one["progress"]["skipped_optimizer_steps"] == (what == "skipped")


def test_evaluations_are_those_of_ddp(folder: Path, found: list[dict[str, Any]]) -> None:
    """Of an average, of unequal shares, and between updates, which go on as without them."""
    for of_rank in found:
        assert [v[:2] for v in of_rank["sharded values"]] == [v[:2] for v in of_rank["ddp values"]]
        for one, other in zip(of_rank["sharded values"], of_rank["ddp values"], strict=True):
            assert one[2] == pytest.approx(other[2], rel=1e-9)
        assert len({value for *_, value in of_rank["sharded values"]}) == 4 * 4
        assert_close(of_rank["sharded evaluated"], of_rank["ddp evaluated"])
    one, other = (load_file(folder / f"{name}.safetensors") for name in ("sharded", "ddp"))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_the_average_is_what_the_model_computes_with(found: list[dict[str, Any]]) -> None:
    """Also where a forward pass before it has left the model with whole weights."""
    for one, other, again in (of_rank["sharded by hand"] for of_rank in found):
        assert torch.equal(one, again)
        assert not torch.allclose(one, other)
    torch.testing.assert_close(found[0]["sharded by hand"], found[0]["ddp by hand"])


def test_who_is_not_finite(found: list[dict[str, Any]]) -> None:
    """Every rank names the parameters, of whoever's shards."""
    for of_rank in found:
        assert "by the gradients of 0.weight, 0.bias, 2.weight and 3 more" in of_rank["not finite"]


def test_gradients_travel_once_a_window(found: list[dict[str, Any]]) -> None:
    """One reduction for each group of parameters where a window ends, also a short one."""
    for of_rank in found:
        assert of_rank["exchanges"]["gradients"] == [0, 0, 3, 0, 0, 3, 3]


def test_shards_are_told_once_whether_to_exchange(found: list[dict[str, Any]]) -> None:
    """Where a window begins and where it ends, and at the end of a run that stops within one."""
    for of_rank in found:
        assert of_rank["exchanges"]["sync flags"] == [False, True, False, True]


def test_one_exchange_for_the_norm(found: list[dict[str, Any]]) -> None:
    """The guard and clipping share one."""
    for of_rank in found:
        assert of_rank["exchanges"]["updates"] == [1, 1, 1]


def test_what_is_refused(found: list[dict[str, Any]]) -> None:
    """Silent DDP in the place of FSDP, an optimizer of the parameters before, and half a model."""
    for of_rank in found:
        refused = of_rank["refusals"]
        assert "configured for FSDP, and runs with MULTI_CPU" in refused["not sharded"]
        assert "make the optimizer of model.parameters() after it" in refused["stale optimizer"]
        told = "2.weight, 2.bias, 3.weight, ... (4 trainable parameters) are in no sharded part"
        assert told in refused["in part"]
        assert "total   Sequential          65       0" in refused["summary"]
