"""MetricsBoard on two real processes, and on many ranks in one process."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launching import SCRIPTS, launch
from robo_orchard_lab.pipeline.metrics.accumulators import REDUCTIONS, Accumulator, combine
from robo_orchard_lab.pipeline.metrics.exchange import RankGather, read_values

SCRIPT = SCRIPTS / "exchange_on_ranks.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Return the JSON that each of two ranks wrote."""
    folder = tmp_path_factory.mktemp("exchange")
    launch(SCRIPT, folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_all_ranks_have_equal_values(ranks: list[Any]) -> None:
    """Every rank has the values of all ranks, and calls its subscribers with them."""
    assert ranks[0]["points"] == ranks[1]["points"]
    assert ranks[0]["received"] == ranks[1]["received"] == [2.0, 1.0]


def test_reductions_span_the_ranks(ranks: list[Any]) -> None:
    """Means are weighted by samples; a name missing on one rank has the other rank's value."""
    (values, _), *_ = ranks[0]["points"]
    assert values == {
        "both": 2.0,
        "numbers": 2.0,
        "highest": 1.0,
        "lowest": 0.0,
        "total": 2.0,
        "first": 7.0,
        "only/second": 0.5,
        "eval/val/count": 1.0,
        "eval/val/rows": 0 + 1 + 10 + 11 + 12,
    }
    third, _ = ranks[0]["points"][2]
    assert third == {"both": 1.0, "only/first": 1.0}


def test_logging_point_costs_one_collective(ranks: list[Any]) -> None:
    """Each logging point gathers once, and a second time if the buffer grows."""
    collectives = [calls for _, calls in ranks[0]["points"]]
    once = ["all_gather"]
    assert collectives == [once, once, once, once * 2, once]
    many, _ = ranks[0]["points"][3]
    assert len(many) == 3000
    assert set(many.values()) == {0.5}


def messages_of(ranks: list[dict[str, Accumulator]], patch: pytest.MonkeyPatch) -> Any:
    """Return the values that the ranks read from each other's messages, without a network."""
    sent: list[torch.Tensor] = []
    accelerator = SimpleNamespace(num_processes=len(ranks), device=torch.device("cpu"))

    def send(rows: list[torch.Tensor], own: torch.Tensor) -> None:
        sent.append(own.clone())
        for row in rows:
            row.copy_(own)

    def receive(rows: list[torch.Tensor], own: torch.Tensor) -> None:
        for row, message in zip(rows, sent, strict=True):
            row.copy_(message)

    patch.setattr(torch.distributed, "all_gather", send)
    for accumulators in ranks:
        read_values(RankGather(), accumulators, [], accelerator)
    patch.setattr(torch.distributed, "all_gather", receive)
    return read_values(RankGather(), ranks[0], [], accelerator)


VALUES = [0.1, 0.7, -3.3e-17, 1e16, 0.0, -0.0, 1e308, -1e308, float("inf"), -float("inf")]


def random_accumulators(seed: int, kind: Literal["equal", "some", "all"]) -> Any:
    """Return accumulators of 9 ranks: with equal names, another one on some ranks, or any."""
    ranks = []
    for rank in range(9):
        numbers = random.Random(f"{seed} {rank}")
        accumulators = {}
        for index, reduce in enumerate(REDUCTIONS * 2):
            is_missing = index == 7 and rank in (2, 5)
            if (kind == "some" and is_missing) or (kind == "all" and numbers.random() < 0.3):
                continue
            accumulator = accumulators[f"{reduce}/{index}"] = Accumulator(reduce)
            accumulator.step = numbers.randrange(50)
            for _ in range(numbers.randrange(1, 4) if kind == "all" else 2):
                value = numbers.choice([*VALUES, float("nan")] if index == 3 else VALUES)
                is_tensor = numbers.random() < 0.5 if kind == "all" else index % 3 == 0
                weight: Any = (
                    numbers.choice([1.0, 3.0, torch.tensor(2.0)]) if reduce == "mean" else 1.0
                )
                accumulator.add(torch.tensor([value]) if is_tensor else value, weight)
        ranks.append(accumulators)
    return ranks


@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["equal", "some", "all"]))
def test_many_ranks_are_reduced_in_rank_order(
    seed: int, kind: Literal["equal", "some", "all"]
) -> None:
    """Values equal the reduction rank by rank, bit for bit, also with different names."""
    ranks = random_accumulators(seed, kind)
    with pytest.MonkeyPatch.context() as patch:
        found = messages_of(ranks, patch)
    expected = {}
    for name in dict.fromkeys(name for accumulators in ranks for name in accumulators):
        own = [accumulators[name] for accumulators in ranks if name in accumulators]
        parts = [(each.numbers(), [t.item() for t in each.tensors()]) for each in own]
        expected[name] = repr(combine(own[0].reduce, parts)), max(each.step for each in own)
    assert {each.name: (repr(each.value), each.step) for each in found} == expected
    assert [each.name for each in found] == [*expected]
