"""How often ranks exchange what they agree on; here by one rank, which goes the same way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed

from robo_orchard_lab.pipeline.agreement import Agreement
from robo_orchard_lab.testing import count_collectives

ALONE = SimpleNamespace(num_processes=1)


@pytest.fixture(params=["gloo", "cuda:gloo"])
def job(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A job of one process, with a way for what lies in the host's memory, and without one."""
    meet = f"file://{tmp_path / 'meet'}"
    torch.distributed.init_process_group(request.param, meet, rank=0, world_size=1)
    yield request.param
    torch.distributed.destroy_process_group()


def exchanged_at(agreement: Agreement, steps: range, step_s: float, **options: float) -> list[int]:
    """The steps with an exchange, where each takes so long."""
    found = []
    for step in steps:
        if agreement.is_due(step):
            assert agreement.reach(step, step, ALONE, **options) == step
            found.append(step)
        time.sleep(step_s)
    return found


def test_the_numbers_go_through_the_hosts_memory(job: str) -> None:
    """Where the job's own group only has the device, one more is made, once."""
    with count_collectives() as calls:
        assert Agreement("any").reach(0, 7, ALONE) == 7
        assert Agreement("first").reach(0, 8, ALONE) == 8
    assert [call.what for call in calls] == ["all_gather", "all_gather"]


@pytest.mark.parametrize("job", ["gloo"], indirect=True)
def test_slow_steps_have_an_exchange_each(job: str) -> None:
    """Where an exchange takes less than a hundredth of a step, nobody has to wait for the next."""
    found = exchanged_at(Agreement("any"), range(3, 9), 0.1)
    assert found[:3] == [3, 4, 5]
    assert len(found) > 4  # all of them, but for a busy machine


@pytest.mark.parametrize("job", ["gloo"], indirect=True)
def test_fast_steps_share_one(job: str) -> None:
    """The first three learn what a step and an exchange take; then they are rare."""
    found = exchanged_at(Agreement("any"), range(2000), 0.0)
    assert found[:3] == [0, 1, 2]
    assert len(found) < 500


@pytest.mark.parametrize("job", ["gloo"], indirect=True)
def test_a_time_to_ask_again_is_kept(job: str) -> None:
    """It is told in steps, at the pace that they had."""
    found = exchanged_at(Agreement("first"), range(30), 0.01, wait_s=0.1)
    assert found[:2] == [0, 1]
    assert 2 <= len(found) <= 8
