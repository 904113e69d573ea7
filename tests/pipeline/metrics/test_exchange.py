"""The board on two real processes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from launching import SCRIPTS, launch

SCRIPT = SCRIPTS / "exchange_on_ranks.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two ranks wrote."""
    folder = tmp_path_factory.mktemp("exchange")
    launch(SCRIPT, folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_all_ranks_find_the_same(ranks: list[Any]) -> None:
    """Every rank has the values of all ranks, and is told the same."""
    assert ranks[0]["points"] == ranks[1]["points"]
    assert ranks[0]["told"] == ranks[1]["told"] == [2.0, 1.0]


def test_each_reduction_spans_the_ranks(ranks: list[Any]) -> None:
    """Means are weighted by samples; a name that one rank lacks is that of the other."""
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


def test_a_logging_point_is_one_collective(ranks: list[Any]) -> None:
    """Whatever is published, each logging point gathers once, and once more when it outgrows it."""
    collectives = [calls for _, calls in ranks[0]["points"]]
    once = ["all_gather"]
    assert collectives == [once, once, once, once * 2, once]
    many, _ = ranks[0]["points"][3]
    assert len(many) == 3000
    assert set(many.values()) == {0.5}
