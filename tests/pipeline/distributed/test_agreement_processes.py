"""Agreements of ranks in real processes."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest

from launching import SCRIPTS, launch

SCRIPT = SCRIPTS / "agree_on_ranks.py"


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the results of one rank, after checking that all ranks' are equal."""
    folder = tmp_path_factory.mktemp("ranks")
    launch(SCRIPT, folder, processes=request.param)
    first, *others = (json.loads(file.read_text()) for file in sorted(folder.glob("rank*.json")))
    assert len(others) == request.param - 1
    assert all(other == first for other in others)
    return first


def test_a_request_of_one_rank_is_carried_out_by_all(found: Any) -> None:
    """All ranks carry out a rank-local request at one commit point, here every fifth step.

    A background save ends when the save has ended on all ranks.
    """
    stopped = found["alone"]["stopped"]
    [over] = (
        what for what in found["alone"]["done"] if what.endswith("save ended, SaveCheckpoint")
    )
    assert int(over.partition(":")[0]) in range(10, stopped, 5)
    asked_at = {
        over,
        "5: evaluated alone, First on rank 0",
        "5: saved alone, AsksAlone.ask (agree_on_ranks.py) on rank 1",
        "5: logged alone, AsksAlone.ask (agree_on_ranks.py) on rank 1",
        "5: weights alone, Me on rank 1",
        "evaluation ValidationHook",
        f"{stopped}: stopped alone, Second on rank 1",
        f"{stopped}: the run ends, HookBasedTrainer",
    }
    assert set(found["alone"]["done"]) == asked_at
    assert stopped % 5 == 0
    assert found["alone"]["checkpoints"] == [5, stopped]
    assert found["alone"]["weights"]
    evaluation, log = found["alone"]["logged"]  # once
    assert evaluation == "First on rank 0 requested an evaluation: evaluated alone"
    assert log.startswith("AsksAlone.ask (agree_on_ranks.py:")
    assert log.endswith(") on rank 1 requested a log: logged alone")


def is_logging(call: str) -> bool:
    """Return True if a collective belongs to a logging point or the final record."""
    return call.endswith(("MetricsBoard.flush", "MetricsBoard.flush_partial"))


@pytest.mark.parametrize("kind", ["declared", "automatic"])
def test_all_topics_share_one_exchange(kind: str, found: Any) -> None:
    """Signals, time limit, clocks and rank-local requests share the exchanges.

    A logging point has its own exchange, and nothing else waits for a device.
    """
    run = found[kind]
    exchanges = [call for call in run["collectives"] if call.endswith("Agreement.settle")]
    logged = [call for call in run["collectives"] if is_logging(call)]
    assert len(exchanges) + len(logged) == len(run["collectives"])
    if kind == "declared":  # every 8 steps; the signal came in step 33
        assert (run["stopped"], len(exchanges), len(logged)) == (40, 5, 2)
        assert run["code"] == 128 + signal.SIGTERM
    else:  # the interval is covered by test_agreement.py
        assert len(exchanges) >= 3
    assert run["fired"] == []
    assert len(run["reads"]) == len(logged)
    assert all(map(is_logging, run["reads"]))


def test_the_agreed_number_follows_the_rule(found: Any) -> None:
    """The first rank's, highest or lowest number is agreed on; a lowest of 0 is not passed on."""
    assert found["agreed"] == [2, 2, 1]


def test_diverged_ranks_are_detected(found: Any) -> None:
    """The error lists the steps and topics of each rank if ranks exchange different ones."""
    assert found["nothing"] == "agreed"
    assert "rank 0: step 7, a clock; rank 1: step 8, a clock" in found["steps"]
    assert "rank 0: step 7, a clock; rank 1: step 7, a clock, a signal" in found["topics"]
    assert found["steps"].endswith("or make the request with rank_local=True")
