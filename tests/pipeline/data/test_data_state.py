"""A state with another order of samples is refused with both values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, WeightedRandomSampler

from loaded_data import Drawing, Indices, data_of, epochs, local_sizes, resumed, rng_states, same
from robo_orchard_lab.pipeline.data import DataOrder
from robo_orchard_lab.pipeline.errors import PipelineConfigError, StateError
from robo_orchard_lab.pipeline.progress import TrainerProgress


def loader(length: int = 26, batch_size: int = 4, **options: Any) -> DataLoader[Any]:
    return DataLoader(Drawing(length), batch_size, **{"shuffle": True, **options})


def state_after(steps: int, given: Any = None, order: DataOrder | None = None) -> dict[str, Any]:
    progress = TrainerProgress()
    data = data_of(loader() if given is None else given, order, progress)
    batches = data.epoch(0)
    for _ in range(steps):
        next(batches)
        progress.finish_step()
    return data.state_dict()


Change = Callable[[], tuple[DataLoader[Any], DataOrder | None]]
CHANGES: list[tuple[Change, str]] = [
    (
        lambda: (loader(), DataOrder(seed=8)),
        r"seed was 7 when the run was saved, .* has seed=8; set seed=7",
    ),
    (
        lambda: (loader(), DataOrder(keyed_by="sample")),
        "keyed by batch when the run was saved, and DataOrder has keyed_by='sample'",
    ),
    (
        lambda: (loader(length=27), None),
        "a dataset of length 26 when the run was saved, and has 27",
    ),
    (
        lambda: (loader(shuffle=False), None),
        "the sampler RandomSampler when the run was saved, and has SequentialSampler",
    ),
    (
        lambda: (loader(shuffle=None, sampler=RandomSampler(range(26), num_samples=20)), None),
        "a sampler of length 26 when the run was saved, and has 20",
    ),
    (
        lambda: (loader(generator=torch.Generator()), None),
        r"generators \[\] when the run was saved, and has \['loader.generator'\]",
    ),
    (
        lambda: (loader(batch_size=5), None),
        r"4 samples when .* has 5; .*batch_size=4, .*allow_other_batch_size=True",
    ),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[text for _, text in CHANGES])
def test_different_order_is_refused(change: Change, message: str) -> None:
    """The error names the difference and both values; nothing changes."""
    given, order = change()
    data = data_of(given, order or DataOrder())
    before = data.state_dict(), rng_states()
    with pytest.raises(StateError, match=message):
        data.check(state_after(3), {})
    assert same([data.state_dict(), rng_states()], list(before))


def test_unknown_version_is_refused() -> None:
    """The error names both versions."""
    with pytest.raises(StateError, match="version 99, this release reads 1"):
        resumed(loader(), {**state_after(3), "version": 99})


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8, 30])
@pytest.mark.parametrize("steps", [3, 7])
def test_different_batch_size_resumes_at_the_next_sample(
    steps: int, batch_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Each remaining sample of the epoch is loaded once if allowed."""
    order = DataOrder(seed=7, keyed_by="sample", allow_other_batch_size=True)
    complete = torch.cat([batch[1] for batch in data_of(loader(), order).epoch(0)])
    data = resumed(loader(batch_size=batch_size), state_after(steps, order=order), order)
    rest = list(data.epoch(0, steps))
    done = min(4 * steps, 26)
    where = "the start of a step" if done % batch_size == 0 else "within a step"
    assert f"with {batch_size} samples a step instead of 4, at sample {done}" in caplog.text
    assert f"which is {where} of other epochs" in caplog.text
    assert same(torch.cat([batch[1] for batch in rest] or [complete[26:]]), complete[done:])
    assert data.steps_per_epoch == steps + len(rest)
    assert local_sizes(data, steps) == [len(batch[0]) for batch in rest]


def test_between_epochs_the_batch_size_may_change() -> None:
    """No position needs to be kept."""
    progress = TrainerProgress()
    data = data_of(loader(), progress=progress)
    list(data.epoch(0))
    progress.finish_epoch()
    resumed(loader(batch_size=5), data.state_dict())


def test_custom_sampler_keeps_its_batch_size_within_an_epoch() -> None:
    """Its position is counted in batches, so another size is refused even if allowed."""

    class Own(RandomSampler):
        pass

    def given(batch_size: int) -> DataLoader[Any]:
        return DataLoader(Indices(26), batch_size, sampler=Own(range(26)))

    with pytest.raises(StateError, match="only with one of torch's samplers"):
        resumed(given(5), state_after(3, given(4)), DataOrder(allow_other_batch_size=True))


@pytest.mark.parametrize("steps", [0, 3])
def test_loaded_state_can_be_saved_again(steps: int) -> None:
    """Before the next epoch, the saved state equals the loaded one."""

    def given() -> DataLoader[Any]:
        return loader(generator=torch.Generator().manual_seed(steps))

    state = state_after(steps, given())
    data = resumed(given(), state)
    assert same(data.state_dict(), state)
    assert same(epochs(resumed(given(), data.state_dict()))[0], epochs(data_of(given()))[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, r"seed must be an int from 0 .* got -1"),
        ({"seed": 2**64}, "seed must be an int"),
        ({"seed": True}, "seed must be an int"),
        ({"keyed_by": "epoch"}, "keyed_by must be 'batch', 'sample' or 'none', got 'epoch'"),
        ({"fast_forward": 1}, "fast_forward must be True or False, got 1"),
    ],
)
def test_invalid_order_is_refused(options: Any, message: str) -> None:
    """The constructor's error names field and value."""
    with pytest.raises(PipelineConfigError, match=message):
        DataOrder(**options)


def test_weighted_sampler_of_another_length_is_refused() -> None:
    """The number of samples of a WeightedRandomSampler is its length."""

    def given(samples: int) -> DataLoader[Any]:
        sampler = WeightedRandomSampler([1.0] * 26, samples)
        return DataLoader(Indices(26), batch_sampler=BatchSampler(sampler, 4, False))

    with pytest.raises(
        StateError, match="a sampler of length 30 when the run was saved, and has 31"
    ):
        resumed(given(31), state_after(3, given(30)))
