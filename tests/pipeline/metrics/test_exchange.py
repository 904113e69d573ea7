"""MetricsBoard on two real processes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from launching import SCRIPTS, launch

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
