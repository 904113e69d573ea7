"""Compiled models, gradient checkpointing and bf16, on two processes and in one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from compiled_on_ranks import WAYS, WITHOUT_DDP, Dropped, train
from launching import SCRIPTS, launch
from robo_orchard_lab.pipeline.checkpoint import load_checkpoint

SCRIPT = SCRIPTS / "compiled_on_ranks.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    launch(SCRIPT, folder)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.fixture
def doubles() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    torch._dynamo.reset()


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_checkpoint(checkpoint / "last").parts["model"]
    return weights


def assert_close(one: Any, other: Any, within: float = 1e-12) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=within)


@pytest.mark.parametrize("way", WAYS)
def test_compiling_before_or_after_wrapping_changes_nothing(
    found: list[dict[str, Any]], folder: Path, way: str
) -> None:
    """Losses, and weights under their plain names, equal the uncompiled model's."""
    for of_rank in found:
        assert_close(of_rank[way]["losses"], of_rank["plain"]["losses"])
        assert of_rank[way]["compiled"] == ("compiled" in way)
        assert of_rank[way]["progress"] == of_rank["plain"]["progress"]
    assert_close(weights_of(folder / way), weights_of(folder / "plain"))


def test_a_compiled_sharded_model_equals_ddp(found: list[dict[str, Any]], folder: Path) -> None:
    """A compiled sharded model trains as the model in DDP."""
    for of_rank in found:
        assert_close(of_rank["sharded, then compiled"]["losses"], of_rank["plain"]["losses"])
    assert_close(weights_of(folder / "sharded"), weights_of(folder / "plain"))


@pytest.mark.parametrize("kind", ["ddp", "sharded"])
def test_gradient_checkpointing_changes_nothing(found: list[dict[str, Any]], kind: str) -> None:
    """Gradient checkpointing leaves losses and weights equal, dropout included."""
    for of_rank in found:
        once, twice = (of_rank[f"{kind} dropped {twice}"] for twice in (False, True))
        assert torch.equal(once["losses"], twice["losses"])
        assert all(torch.equal(once["weights"][n], twice["weights"][n]) for n in once["weights"])
        assert_close(once["losses"], of_rank["ddp dropped False"]["losses"])


def test_bf16_runs_under_autocast(found: list[dict[str, Any]]) -> None:
    """Autocast is on in DDP and in shards, and losses are equal up to its precision."""
    for of_rank in found:
        in_ddp, sharded = of_rank["ddp bf16"]["losses"], of_rank["sharded bf16"]["losses"]
        assert not torch.allclose(in_ddp, of_rank["single"]["losses"], rtol=0, atol=1e-6)
        assert_close(in_ddp, of_rank["single"]["losses"], within=0.05)
        assert_close(in_ddp, sharded, within=1e-2)


@pytest.mark.parametrize("way", ["in DDP", "in DDP, then compiled"])
def test_gradients_are_reduced_once_per_window(found: list[dict[str, Any]], way: str) -> None:
    """Gradients are reduced at the end of each accumulation window, also of a short last one."""
    for of_rank in found:
        assert of_rank["reductions"][way] == [2, 5, 6]


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("way", WITHOUT_DDP)
def test_compiled_in_one_process(tmp_path: Path, way: str) -> None:
    """Compiling in either order changes nothing in one process."""
    plain = train(tmp_path, "plain", sharded=False)
    compiled = train(tmp_path, way, sharded=False, wrap=WAYS[way])
    assert_close(compiled["losses"], plain["losses"])
    assert_close(weights_of(tmp_path / way), weights_of(tmp_path / "plain"))


@pytest.mark.usefixtures("doubles")
def test_gradient_checkpointing_changes_nothing_in_one_process(tmp_path: Path) -> None:
    """Gradient checkpointing leaves the losses equal in one process."""
    once, twice = (
        train(tmp_path, str(twice), sharded=False, model=Dropped(twice=twice))
        for twice in (False, True)
    )
    assert torch.equal(once["losses"], twice["losses"])
