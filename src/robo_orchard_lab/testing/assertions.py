"""Assertions on hooks: an exact resume, unchanged weights, no device sync.

Each assertion runs the hook several times, each time as a new object.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias, Unpack

import torch

from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.metrics import MetricsRecord
from robo_orchard_lab.testing.fixtures import HookSource, RunSetting, as_sources, with_defaults
from robo_orchard_lab.testing.run import HookRun, hook_states, train

Hooks: TypeAlias = HookSource | Iterable[HookSource]


def assert_state_round_trip(
    hook: Hooks,
    *,
    stop_at: int | Iterable[int] | None = None,
    ignore: Iterable[str] = ("perf/*",),
    **setting: Unpack[RunSetting],
) -> None:
    """Assert that a run that is stopped, saved and resumed equals an uninterrupted run.

    Compared exactly are hook states, metrics, requests, weights and counters.

    >>> from robo_orchard_lab.pipeline.hooks import GradientClippingHookConfig
    >>> assert_state_round_trip(GradientClippingHookConfig(max_norm=1.0), steps=3)

    Args:
        hook: a config, or a function that returns a new hook; or several of these.
        stop_at: steps after which to stop, one run for each; after every step by default.
        ignore: patterns of names that may differ: metrics (``perf/*``) and paths in states
            (``MyHook.started_at``).
        **setting: see :class:`RunSetting`.

    Raises:
        AssertionError: the runs differ; the message names the stop and the first differences.
        ValueError: ``stop_at`` is outside the run, or the run is too short to stop.
    """
    hooks, full, ignored = as_sources(hook), with_defaults(setting), tuple(ignore)
    straight = train(hooks, full, has_more_runs=True)
    last = straight.progress.global_step_id - 1
    if last < 1:
        raise ValueError(f"a run of {last + 1} step can't be interrupted; give it more steps")
    stops = range(1, last + 1) if stop_at is None else stop_at
    for stop in [stops] if isinstance(stops, int) else stops:
        if not 1 <= stop <= last:
            raise ValueError(
                f"stop_at must be within the run, from 1 to {last}, got {stop}; "
                f"the run has {last + 1} steps"
            )
        with TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint"
            try:
                first = train(hooks, full, has_more_runs=True, stop_after=stop, save_to=path)
                second = train(hooks, full, has_more_runs=True, resume_from=path)
            except StateError as error:
                raise AssertionError(
                    f"{_names(straight)}: the state after step {stop} can't be saved and loaded: "
                    f"{error}"
                ) from error
        problems = [*_resume_differences(straight, first, second, ignored)]
        if problems:
            raise AssertionError(
                f"{_names(straight)}: a run that was stopped after step {stop} and resumed differs "
                "from an uninterrupted run:\n" + "\n".join(f"  {line}" for line in problems)
            )


def assert_weights_unchanged(hook: Hooks, **setting: Unpack[RunSetting]) -> None:
    """Assert that a run with the hook trains the same weights as a run without the hook.

    The hook must not use the global random generators either, which changes dropout and any other
    random operation of the model and its loss.

    >>> from robo_orchard_lab.pipeline.hooks import ProgressBarHookConfig
    >>> assert_weights_unchanged(ProgressBarHookConfig(), steps=2)

    Args:
        hook: a config, or a function that returns a new hook; or several of these.
        **setting: see :class:`RunSetting`.

    Raises:
        AssertionError: the message names the first step after which a weight differs.
    """
    hooks, full = as_sources(hook), with_defaults(setting)
    without = train([], full, has_more_runs=True)
    run = train(hooks, full, has_more_runs=True)
    for step, name, problem in _weight_differences(run.weights_by_step, without.weights_by_step):
        when = f"after step {step}" if step else "before the first step"
        raise AssertionError(
            f"{_names(run)} changes the weights: {when}, {name} {problem}. Random numbers from "
            "the global generator of torch, NumPy or Python change the weights, too"
        )
    if run.progress != without.progress:
        raise AssertionError(
            f"{_names(run)} changes the run: it ended at {run.progress}, "
            f"without the hook at {without.progress}"
        )
    for library, number in run.next_random_numbers.items():
        if number != without.next_random_numbers[library]:
            raise AssertionError(
                f"{_names(run)} uses {library}'s global random generator, which changes the random "
                "numbers of the model; use a generator of the hook's own"
            )


def assert_no_device_sync(hook: Hooks, *, allowed: int = 0, **setting: Unpack[RunSetting]) -> None:
    """Assert that a hook reads no value from the device, which waits for the device.

    Counts the reads that :func:`count_host_reads` finds in a run with the hook and not in a run
    without it, except the trainer's own reads at logging points and for saving.

    >>> from robo_orchard_lab.pipeline.hooks import GradientClippingHookConfig
    >>> assert_no_device_sync(GradientClippingHookConfig(max_norm=1.0), steps=3)

    Args:
        hook: a config, or a function that returns a new hook; or several of these.
        allowed: maximum number of reads in the run, for a hook with documented reads.
        **setting: see :class:`RunSetting`.

    Raises:
        AssertionError: the message lists the lines that read, with counts.
    """
    hooks, full = as_sources(hook), with_defaults(setting)
    without = train([], full, has_more_runs=True, counts_reads=True)
    run = train(hooks, full, has_more_runs=True, counts_reads=True)
    reads = _reads_of_hooks(run) - _reads_of_hooks(without)
    if reads.total() > allowed:
        lines = [f"  {count} x {read}" for read, count in reads.items()]
        raise AssertionError(
            f"{_names(run)} reads from tensors {reads.total()} times in "
            f"{run.progress.global_step_id} steps, expected at most {allowed}; each read waits for "
            "the device. Publish tensors, which are read together at logging points\n"
            + "\n".join(lines)
        )


def _reads_of_hooks(run: HookRun) -> Counter[str]:
    return Counter(str(read) for read in run.host_reads or () if not read.at_commit)


def _names(run: HookRun) -> str:
    names = ", ".join(repr(hook.name) for hook in run.hooks)
    return f"hook {names}" if len(run.hooks) == 1 else f"hooks {names}"


def differences(found: Any, expected: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path and a description of each difference between two nested states.

    Tensors and numbers must be exactly equal; NaN equals NaN.

    >>> list(differences({"count": 2, "best": [0.5]}, {"count": 3, "best": [0.5]}, "MyHook"))
    [('MyHook.count', 'is 2, expected 3')]
    """
    if isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor):
        if problem := _tensor_difference(found, expected):
            yield path, problem
    elif isinstance(found, Mapping) and isinstance(expected, Mapping):
        for key in {**expected, **found}:
            inner = f"{path}.{key}" if path else str(key)
            if key not in found:
                yield inner, "is missing"
            elif key not in expected:
                yield inner, f"is {found[key]!r:.60}, expected none"
            else:
                yield from differences(found[key], expected[key], inner)
    elif isinstance(found, list | tuple) and type(found) is type(expected):
        for index, (value, other) in enumerate(zip(found, expected, strict=False)):
            yield from differences(value, other, f"{path}[{index}]")
        if len(found) != len(expected):
            yield path, f"has {len(found)} items, expected {len(expected)}"
    elif not _is_equal(found, expected):
        yield path, f"is {found!r:.60}, expected {expected!r:.60}"


def _is_equal(found: Any, expected: Any) -> bool:
    if isinstance(found, torch.Tensor) or isinstance(expected, torch.Tensor):
        return False  # a tensor and something else
    return bool(found == expected or (found != found and expected != expected))  # NaN


def _tensor_difference(found: torch.Tensor, expected: torch.Tensor) -> str | None:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        kinds = (f"a tensor of {each.dtype} {tuple(each.shape)}" for each in (found, expected))
        return "is {}, expected {}".format(*kinds).replace("expected a tensor of", "expected")
    differing = (found != expected) & ~((found != found) & (expected != expected))
    if not differing.any():
        return None
    index = tuple(differing.nonzero()[0].tolist())
    return (
        f"is {found[index].item()!r}, expected {expected[index].item()!r}, at {list(index)} "
        f"({int(differing.sum())} of {found.numel()} elements differ)"
    )


def _resume_differences(
    straight: HookRun, first: HookRun, second: HookRun, ignored: Sequence[str]
) -> Iterator[str]:
    """Yield the first difference of each kind between a resumed and an uninterrupted run.

    Args:
        straight: the uninterrupted run.
        first: the run up to the stop.
        second: the resumed run.
        ignored: patterns of metrics and paths in states that may differ.
    """
    saved, loaded = hook_states(first.hooks), second.states_at_start
    yield from _first(differences(loaded, saved), ignored, "the loaded state")
    yield from _first(_metric_differences(straight, first, second), ignored, "metric")
    requests = zip_longest([*first.requests, *second.requests], straight.requests)
    if pair := next((pair for pair in requests if pair[0] != pair[1]), None):
        yield f"request: {pair[0] or 'none'}, expected {pair[1] or 'none'}"
    weights = [*first.weights_by_step[:-1], *second.weights_by_step]
    for step, name, problem in _weight_differences(weights, straight.weights_by_step):
        yield f"weights: after step {step}, {name} {problem}"
        break
    end = differences(hook_states(second.hooks), hook_states(straight.hooks))
    yield from _first(end, ignored, "at the end")
    if second.progress != straight.progress:
        yield f"the run ended at {second.progress}, expected {straight.progress}"


def _weight_differences(
    found: Iterable[Any], expected: Iterable[Any]
) -> Iterator[tuple[int, str, str]]:
    """Yield step, name and description of each difference between weights by step."""
    for step, pair in enumerate(zip(found, expected, strict=False)):
        for name, problem in differences(*pair):
            yield step, name, problem


def _first(found: Iterable[tuple[str, str]], ignored: Sequence[str], kind: str) -> Iterator[str]:
    for path, problem in found:
        if not any(fnmatchcase(path, pattern) for pattern in ignored):
            yield f"{kind}: {path} {problem}"
            return


def _metric_differences(
    straight: HookRun, first: HookRun, second: HookRun
) -> Iterator[tuple[str, str]]:
    # The partial record at the end of the first part is repeated in the second part.
    before_stop = [record for record in first.records if not record.partial]
    expected, found = _values(straight.records), _values([*before_stop, *second.records])
    for name in {**expected, **found}:
        for value, other in zip_longest(found.get(name, ()), expected.get(name, ())):
            if value is None or other is None or [*differences(value, other)]:
                yield name, f"{_value_text(value)}, expected {_value_text(other)}"
                break


def _values(records: Iterable[MetricsRecord]) -> dict[str, list[tuple[int, float]]]:
    values: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for value in record.values:
            values.setdefault(value.name, []).append((value.step, value.value))
    return values


def _value_text(value: tuple[int, float] | None) -> str:
    return "has no further value" if value is None else f"is {value[1]!r} at step {value[0]}"
