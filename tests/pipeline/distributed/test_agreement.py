"""Intervals, topics and requests of agreements, on one rank."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed

from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.distributed.agreement import Agreement
from robo_orchard_lab.pipeline.errors import PipelineConfigError, PipelineStateError
from robo_orchard_lab.pipeline.requests import Requests, StopRequest
from robo_orchard_lab.testing import count_collectives
from tiny import make_trainer


@pytest.fixture(params=["gloo"])
def job(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A job of one process with a process group."""
    meet = f"file://{tmp_path / 'meet'}"
    torch.distributed.init_process_group(request.param, meet, rank=0, world_size=1)
    yield request.param
    torch.distributed.destroy_process_group()


def agreement_of_many(**options: int) -> Agreement:
    """Return the agreement of a rank of two."""
    return Agreement(processes=2, **options)


class Clock:
    """Clock that advances at each reading, so an exchange costs half a millisecond."""

    now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 0.0005
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Replaces the machine's clock, which varies with load."""
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def exchanged_at(
    agreement: Agreement,
    steps: range,
    clock: Clock | None = None,
    step_s: float = 0.0,
    wait_s: Callable[[], float] | None = None,
) -> list[int]:
    """Return the steps with an exchange, given the duration of a step."""
    found: list[int] = []
    current = 0
    agreement.topic("step", find=lambda: current + 1, tell=found.append, wait_s=wait_s)
    for current in steps:
        if current >= agreement.due_at:
            agreement.settle(current)
        if clock is not None:
            clock.now_s += step_s
    return [step - 1 for step in found]


@pytest.mark.parametrize("job", ["gloo", "cuda:gloo"], indirect=True)
def test_exchanges_use_host_memory(job: str) -> None:
    """A second group is made once if the job's process group is GPU-only."""
    with count_collectives() as calls:
        exchanged_at(agreement_of_many(every=1), range(1, 3))
    assert [call.what for call in calls] == ["all_gather", "all_gather"]


def test_all_topics_share_an_exchange(job: str) -> None:
    """Any number of topics share one exchange, in registration order; 0 is not passed on."""
    agreement = agreement_of_many(every=1)
    agreed_numbers: list[tuple[int, int]] = []
    for number in range(40):
        agreement.topic(
            f"topic {number}",
            find=lambda number=number: number % 3,  # type: ignore[misc]  # bound to the number
            tell=lambda agreed, number=number: agreed_numbers.append((number, agreed)),  # type: ignore[misc]
        )
    with count_collectives() as calls:
        agreement.settle(1)
    assert [call.what for call in calls] == ["all_gather"]
    assert agreed_numbers == [(number, number % 3) for number in range(40) if number % 3]


def test_slow_steps_have_an_exchange_each(job: str, clock: Clock) -> None:
    """Every step has an exchange if an exchange costs under 1 % of a step."""
    assert exchanged_at(agreement_of_many(), range(3, 50), clock, 0.06) == [*range(3, 50)]


def test_exchanges_cost_one_percent_of_the_time(job: str, clock: Clock) -> None:
    """The first three exchanges measure the cost; later exchanges are rare."""
    first, second, third, *others = exchanged_at(agreement_of_many(), range(1000), clock, 0.0005)
    assert [first, second, third] == [0, 1, 2]
    gaps = [after - before for before, after in itertools.pairwise(others)]
    assert len(others) >= 8
    assert all(90 <= gap <= 100 for gap in gaps)


def test_a_requested_wait_is_kept(job: str, clock: Clock) -> None:
    """A wait in seconds is converted to steps, and exchanges stay rare."""
    waits = agreement_of_many()
    found = exchanged_at(waits, range(200), clock, 0.01, wait_s=lambda: 0.5)
    assert found[:2] == [0, 1]
    assert all(45 <= b - a <= 50 for a, b in itertools.pairwise(found[1:]))
    hurries = agreement_of_many()
    found = exchanged_at(hurries, range(200), clock, 0.01, wait_s=lambda: 0.0)
    assert len(found) < 60


def test_an_interval_may_be_declared(job: str) -> None:
    """A declared interval counts from the run's first step, also in a resumed run."""
    assert exchanged_at(agreement_of_many(every=5), range(7, 23)) == [10, 15, 20]
    with pytest.raises(PipelineConfigError, match=r"agree_every must be an int >= 1.* got 0"):
        make_trainer(max_step=1, agree_every=0)


def test_an_error_names_the_topic(job: str) -> None:
    """An error of a topic has a note with the topic's name."""
    for agreement in (Agreement(), agreement_of_many()):
        agreement.topic("luck", find=lambda: 1 // 0, tell=print)
        with pytest.raises(ZeroDivisionError) as error:
            agreement.settle(1)
        assert error.value.__notes__ == ["while the ranks agreed on 'luck'"]


def test_one_process_agrees_after_each_step() -> None:
    """One process needs no exchange."""
    steps: list[int] = []
    hooks = PipelineHooks()

    @hooks.on_loop.before
    def begin(args: PipelineHookArgs) -> None:
        args.run.agreement.topic("step", find=lambda: args.global_step_id, tell=steps.append)

    make_trainer(hooks, max_step=3)()
    assert steps == [1, 2, 3]


def test_rank_local_requests_in_one_process_must_be_declared() -> None:
    """Declared rank-local requests of one process take effect at once; others are refused."""
    requests = Requests()
    for ask in (requests.stop, requests.save, requests.evaluate, requests.log):
        with pytest.raises(
            PipelineStateError, match=r"call args\.requests\.allow_rank_local\(\) on"
        ):
            ask("why not", rank_local=True)
    assert not requests.pending
    requests.allow_rank_local()
    requests.stop("why not", "me", rank_local=True)
    assert requests.stop_request == StopRequest("why not", "me")


def test_rank_local_requests_wait_for_the_exchange(job: str) -> None:
    """After the exchange all ranks have the request, once, with the requesting rank."""
    agreement = agreement_of_many(every=3)
    requests = Requests(agreement)
    requests.allow_rank_local()
    requests.allow_rank_local()
    for step in range(1, 5):
        requests.stop("the disk is full", "Watch", rank_local=True)
        agreement.settle(step)
        assert requests.pending is (step >= 3)
    assert requests.stop_request == StopRequest("the disk is full", "Watch on rank 0")
    assert requests.pop_rank_local() == [
        StopRequest("the disk is full", "Watch")
    ]  # requested again
