"""FSDP2 training on two processes, compared with DDP."""

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
def test_sharded_training_equals_ddp(found: list[dict[str, Any]], accumulate: int) -> None:
    """Losses, weights and counters equal DDP's, also with accumulation and a short window."""
    for of_rank in found:
        assert_close(of_rank[f"sharded{accumulate}"], of_rank[f"ddp{accumulate}"])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_sharded_run_resumes_exactly(found: list[dict[str, Any]], accumulate: int) -> None:
    """A stopped and resumed run ends bit-identical; a stop completes its window first."""
    left = {1: 5, 3: 3}[accumulate]  # of 9 steps, when 4 are done or the window of step 4
    for of_rank in found:
        uninterrupted = of_rank[f"sharded{accumulate}"]
        assert len(of_rank[f"sharded{accumulate} resumed"]["losses"]) == left
        assert_same(of_rank[f"sharded{accumulate} resumed"], end_of(uninterrupted, left))


def test_a_window_of_ddp_continues_in_shards(found: list[dict[str, Any]]) -> None:
    """Gradients that DDP accumulated before a stop within a window are reduced to the shards."""
    for of_rank in found:
        resumed = of_rank["ddp to sharded within a window"]
        assert_close(resumed, end_of(of_rank["sharded3"], steps=5))


def test_saves_wait_for_the_end_of_a_window(folder: Path, found: list[dict[str, Any]]) -> None:
    """With windows of three steps, each checkpoint lies between two windows.

    A value that is measured within a window keeps no checkpoint, and a warning says so.
    """
    store = CheckpointStore(folder / "every_step")
    assert [info.step for info in store.list()] == [3, 6, 9]
    assert "for step 2, where eval/val/loss is" in found[0]["not kept"][0]
    assert "every='100 optimizer steps'" in found[0]["not kept"][0]
    assert (folder / "every_step" / "best").resolve().name == "step_00000006"


def test_checkpoints_load_across_ddp_and_fsdp(found: list[dict[str, Any]]) -> None:
    """A sharded checkpoint resumes in DDP, and a DDP checkpoint in shards."""
    for of_rank in found:
        for name in ("sharded to ddp", "ddp to sharded"):
            assert_close(of_rank[name], end_of(of_rank["sharded1"], steps=5))


def test_full_tensors_of_hooks_stay_full(folder: Path, found: list[dict[str, Any]]) -> None:
    """Each rank gets back its own tensor, even with a parameter's name and shape."""
    for rank, of_rank in enumerate(found):
        expected = OwnValues.first_of(rank).double() + 9
        resumed = ("sharded1 resumed", "sharded3 resumed", "sharded to ddp", "ddp to sharded")
        for name in ("sharded1", *resumed):
            torch.testing.assert_close(of_rank[name]["own values"], expected, rtol=0, atol=0)
    for rank, of_rank in enumerate(results(folder, of=3)):
        expected = OwnValues.first_of(min(rank, 1)).double() + 9
        torch.testing.assert_close(of_rank["any"]["own values"], expected, rtol=0, atol=0)


def test_a_sharded_run_resumes_on_three_ranks(folder: Path, found: list[dict[str, Any]]) -> None:
    """A run saved by two ranks resumes on three with different shards."""
    assert_resumes([of_rank["any"] for of_rank in found], [r["any"] for r in results(folder, of=3)])
    one, three = (load_file(folder / name / "ema.safetensors") for name in ("any", "of three"))
    torch.testing.assert_close(one, three, rtol=0, atol=1e-9)


def test_a_sharded_run_resumes_on_one_rank(
    folder: Path, found: list[dict[str, Any]], tmp_path: Path
) -> None:
    """A run saved by two ranks resumes on one rank with a plain model."""
    torch.set_default_dtype(torch.float64)
    try:
        alone = in_any_number(tmp_path, None, folder / "of two" / "checkpoints" / "last")
    finally:
        torch.set_default_dtype(torch.float32)
    assert_resumes([of_rank["any"] for of_rank in found], [alone])


def assert_resumes(uninterrupted: list[dict[str, Any]], resumed: list[dict[str, Any]]) -> None:
    assert resumed[0]["progress"] == uninterrupted[0]["progress"]
    for step in range(5):
        samples = [
            sorted(index for of_rank in ranks for index in of_rank["samples"][step - 5])
            for ranks in (uninterrupted, resumed)
        ]
        assert samples[0] == samples[1]
    for of_rank in resumed:
        weights = uninterrupted[0]["weights"]
        torch.testing.assert_close(of_rank["weights"], weights, rtol=0, atol=1e-9)


def test_each_process_writes_its_shards(folder: Path) -> None:
    """Each file has a slice of every divisible tensor, and other tensors are saved once."""
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
    """Training is equal and only the first replica saves with replicated shards."""
    for of_rank in found:
        assert_close(of_rank["replicas"], of_rank["sharded1"])
    checkpoint = folder / "replicas" / "checkpoints" / "last"
    assert [path.name for path in checkpoint.glob("model.shard*")] == [
        "model.shard00000.safetensors"
    ]
    export_weights(checkpoint, folder / "replicas.safetensors")
    exported = load_file(folder / "replicas.safetensors")
    torch.testing.assert_close(exported, found[0]["replicas"]["weights"], rtol=0, atol=0)


def test_a_full_export_holds_the_final_weights(
    folder: Path, found: list[dict[str, Any]], tmp_path: Path
) -> None:
    """One process exports the final weights to one file."""
    weights = found[0]["sharded1"]["weights"]
    export_weights(folder / "sharded1" / "checkpoints" / "last", tmp_path / "model.safetensors")
    for path in (
        tmp_path / "model.safetensors",
        folder / "sharded1" / "model" / "model.safetensors",
    ):
        exported = load_file(path)
        assert exported.keys() == weights.keys()
        assert all(torch.equal(exported[name], weights[name]) for name in weights)


def test_rank_local_shards_stay_rank_local(folder: Path) -> None:
    """A part with only sharded tensors is global if the job saved it, else local to a rank."""
    for rank in (0, 1):
        with OpenCheckpoint(folder / "stored", ReadLimits()) as opened:
            saved = opened.load(rank)
        assert saved.parts.keys() == {"model"}
        assert saved.rank_parts.keys() == {"own"}
        assert saved.rank_parts["own"]["rows"].tolist() == [0, 1, 2]


def test_a_sharded_tensor_may_be_empty(folder: Path) -> None:
    """An empty tensor is saved and loaded with its shape."""
    found = load_checkpoint(folder / "stored").parts["model"]
    assert found["rows"].tolist() == [0, 1, 2]
    assert found["nothing"].shape == (0, 2)


def test_torch_reads_the_shards(folder: Path, found: list[dict[str, Any]]) -> None:
    """The shards are readable by torch's distributed checkpoint."""
    weights = found[0]["sharded1"]["weights"]
    loaded = {name: torch.zeros_like(value) for name, value in weights.items()}
    reader = HuggingFaceStorageReader(str(folder / "sharded1" / "checkpoints" / "last"))
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        load(loaded, storage_reader=reader, no_dist=True)
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_the_average_equals_ddp(folder: Path) -> None:
    """Each process averages its shards as DDP does, and each format resumes the other."""
    sharded, resumed, *others = (
        load_file(folder / name / "ema.safetensors")
        for name in ("sharded1", "sharded1/resumed", "ddp1", "to_sharded", "to_ddp")
    )
    for other in others:
        torch.testing.assert_close(sharded, other, rtol=0, atol=1e-9)
    torch.testing.assert_close(sharded, resumed, rtol=0, atol=0)


def test_background_saves_hold_the_state_of_their_step(
    folder: Path, found: list[dict[str, Any]]
) -> None:
    """Background saves hold the state of their step while training continues."""
    store = CheckpointStore(folder / "background" / "checkpoints")
    assert [info.step for info in store.list()] == [2, 4, 6, 8, 9]
    assert all(found.problem is None for found in store.verify())
    here, uninterrupted = (
        load_checkpoint(folder / name / "checkpoints" / step).parts["model"]
        for name, step in (("background", "step_00000004"), ("sharded1/stopped", "last"))
    )
    torch.testing.assert_close(here, uninterrupted, rtol=0, atol=0)
    assert_same(found[0]["background"], found[0]["sharded1"])


@pytest.mark.parametrize("what", ["frozen", "by value", "by another norm", "skipped"])
def test_hooks_behave_as_with_ddp(found: list[dict[str, Any]], what: str) -> None:
    """Freezing, clipping, and skipping an update for one rank's NaN equal DDP."""
    for of_rank in found:
        one, other = of_rank[f"sharded {what}"], of_rank[f"ddp {what}"]
        torch.testing.assert_close(one["weights"], other["weights"], rtol=0, atol=1e-9)
        assert one["progress"] == other["progress"]
    assert one["progress"]["skipped_optimizer_steps"] == (what == "skipped")


def test_evaluations_equal_ddp(folder: Path, found: list[dict[str, Any]]) -> None:
    """Evaluations with averages and unequal shards equal DDP, and leave training unchanged."""
    for of_rank in found:
        assert [v[:2] for v in of_rank["sharded values"]] == [v[:2] for v in of_rank["ddp values"]]
        for one, other in zip(of_rank["sharded values"], of_rank["ddp values"], strict=True):
            assert one[2] == pytest.approx(other[2], rel=1e-9)
        assert len({value for *_, value in of_rank["sharded values"]}) == 4 * 4
        assert_close(of_rank["sharded evaluated"], of_rank["ddp evaluated"])
    one, other = (load_file(folder / f"{name}.safetensors") for name in ("sharded", "ddp"))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_the_model_computes_with_the_average(found: list[dict[str, Any]]) -> None:
    """The averaged weights are used, even after a forward pass has unsharded the model."""
    for one, other, again in (of_rank["sharded by hand"] for of_rank in found):
        assert torch.equal(one, again)
        assert not torch.allclose(one, other)
    torch.testing.assert_close(found[0]["sharded by hand"], found[0]["ddp by hand"])


def test_non_finite_parameters_are_named(found: list[dict[str, Any]]) -> None:
    """Every rank names the non-finite parameters, of any rank's shards."""
    for of_rank in found:
        assert "by the gradients of 0.weight, 0.bias, 2.weight and 3 more" in of_rank["not finite"]


def test_gradients_are_reduced_once_per_window(found: list[dict[str, Any]]) -> None:
    """Each group of parameters is reduced once at the end of a window, also of a short one."""
    for of_rank in found:
        assert of_rank["exchanges"]["gradients"] == [0, 0, 3, 0, 0, 3, 3]


def test_sync_flags_are_set_once_per_change(found: list[dict[str, Any]]) -> None:
    """Gradient sync is switched where a window begins and ends, and at the end of a run."""
    for of_rank in found:
        assert of_rank["exchanges"]["sync flags"] == [False, True, False, True]


def test_one_exchange_for_the_norm(found: list[dict[str, Any]]) -> None:
    """The non-finite guard and clipping share one exchange."""
    for of_rank in found:
        assert of_rank["exchanges"]["updates"] == [1, 1, 1]


def test_invalid_sharding_is_refused(found: list[dict[str, Any]]) -> None:
    """Silent DDP instead of FSDP, a stale optimizer, and a half-sharded model are refused."""
    for of_rank in found:
        refused = of_rank["refusals"]
        assert "configured for FSDP but runs with MULTI_CPU" in refused["not sharded"]
        assert "create the optimizer from model.parameters() after it" in refused["stale optimizer"]
        message = (
            "2.weight, 2.bias, 3.weight, ... (4 trainable parameters) are in no sharded module"
        )
        assert message in refused["in part"]
        assert "total   Sequential          65       0" in refused["summary"]
