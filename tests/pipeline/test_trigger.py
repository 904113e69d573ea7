"""Triggers as text, as objects, and as fields of a config."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from robo_orchard_core.utils.cli import pydantic_from_argparse
from robo_orchard_core.utils.config import ConfigFieldError
from robo_orchard_lab.pipeline import PipelineHooks
from robo_orchard_lab.pipeline.hooks.mixin import PipelineHooksConfig
from robo_orchard_lab.pipeline.trigger import (
    AnyOf,
    AtSteps,
    EveryEpochs,
    EveryOptimizerSteps,
    EverySeconds,
    EverySteps,
    First,
    Last,
    Trigger,
    TriggerError,
)

counts = st.integers(1, 10**15)
starts = st.none() | st.integers(0, 10**15)
counted = st.one_of(
    st.builds(EverySteps, counts, starts),
    st.builds(EveryOptimizerSteps, counts, starts),
    st.builds(EveryEpochs, counts, starts),
    st.builds(AtSteps, st.sets(counts, min_size=1)),
    st.just(First()),
    st.just(Last()),
)
seconds = st.one_of(st.integers(1, 10**30), st.floats(0, exclude_min=True, allow_infinity=False))
single = st.one_of(counted, st.builds(EverySeconds, seconds))
triggers = st.one_of(
    single, st.lists(single, min_size=2, max_size=4).map(lambda parts: AnyOf(tuple(parts)))
)


@given(triggers)
@example(EverySeconds(8.444234073065329e21))  # divided by 3600 it is an integer, but not exact
@example(EverySeconds(5e-324))
@example(EverySeconds(90))
def test_text_round_trips(trigger: Trigger) -> None:
    """``parse(str(trigger))`` is equal, for every kind and any number of joined triggers."""
    assert Trigger.parse(str(trigger)) == trigger
    assert hash(Trigger.parse(str(trigger))) == hash(trigger)


@pytest.mark.parametrize(
    ("text", "trigger"),
    [
        ("100 steps", EverySteps(100)),
        (" 1step ", EverySteps(1)),
        ("50 Optimizer Steps", EveryOptimizerSteps(50)),
        ("1 optimizer_step", EveryOptimizerSteps(1)),
        ("2 epochs", EveryEpochs(2)),
        ("100 steps from 0", EverySteps(100, start=0)),
        ("1 epoch FROM 3", EveryEpochs(1, 3)),
        ("5 optimizer steps  from 10|last", EveryOptimizerSteps(5, 10) | Last()),
        ("30 s", EverySeconds(30)),
        ("1.5 min", EverySeconds(90)),
        ("0.5h", EverySeconds(1800)),
        ("3 seconds | 1 minute|1 hour", EverySeconds(3) | EverySeconds(60) | EverySeconds(3600)),
        ("at steps 10, 2", AtSteps([2, 10])),
        ("at step 5", AtSteps({5})),
        ("first | last", First() | Last()),
    ],
)
def test_parse_accepts_variants(text: str, trigger: Trigger) -> None:
    """Singular and plural units parse, in any case, with or without a space."""
    assert Trigger.parse(text) == trigger


@pytest.mark.parametrize(
    ("trigger", "text"),
    [
        (EverySteps(1), "1 step"),
        (EveryOptimizerSteps(2), "2 optimizer steps"),
        (EveryEpochs(1) | EverySeconds(5400), "1 epoch | 90 min"),
        (EverySeconds(7200), "2 h"),
        (EverySeconds(0.25), "0.25 s"),
        (EverySeconds(61), "61 s"),
        (AtSteps([3, 1]), "at steps 1, 3"),
    ],
)
def test_text_is_short(trigger: Trigger, text: str) -> None:
    """The text has the largest unit with an integer count."""
    assert str(trigger) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "can't read '' as a trigger; write '100 steps'"),
        ("100", "can't read '100' as a trigger"),
        ("100 steps |", r"can't read '' in '100 steps \|' as a trigger"),
        ("1 epoch | often", r"can't read 'often' in '1 epoch \| often'"),
        ("1.5 steps", "can't read '1.5 steps'"),
        ("5 steps from", "can't read '5 steps from'"),
        ("5 steps from -1", "can't read '5 steps from -1'"),
        ("10 min from 0", "can't read '10 min from 0'"),
        ("0 steps from 0", "'0 steps from 0': EverySteps needs an int >= 1, got 0"),
        ("-3 steps", "can't read '-3 steps'"),
        ("1.2.3 s", "can't read '1.2.3 s'"),
        ("0 steps", "'0 steps': EverySteps needs an int >= 1, got 0"),
        ("2 epochs | 0 s", "'0 s': EverySeconds needs a number of seconds > 0, got 0"),
        ("1e999 h", "'1e999 h': EverySeconds needs a finite number"),
        ("at steps 1, 0", "'at steps 1, 0': AtSteps needs an int >= 1, got 0"),
        ("at steps", "can't read 'at steps'"),
    ],
)
def test_invalid_text_is_refused(text: str, message: str) -> None:
    """The error names the part, and has examples."""
    with pytest.raises(TriggerError, match=message):
        Trigger.parse(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EverySteps(0), "EverySteps needs an int >= 1, got 0"),
        (lambda: EverySteps(2.0), "got 2.0"),  # type: ignore[arg-type]
        (lambda: EverySteps(True), "got True"),
        (lambda: EveryOptimizerSteps(-1), "EveryOptimizerSteps needs"),
        (lambda: EveryEpochs("1"), "EveryEpochs needs an int >= 1, got '1'"),  # type: ignore[arg-type]
        (lambda: EverySeconds(0), "seconds > 0, got 0"),
        (lambda: EverySeconds(math.nan), "seconds > 0, got nan"),
        (lambda: EverySeconds(math.inf), "finite number of seconds, got inf; for never"),
        (lambda: EverySeconds(10**400), "finite number of seconds"),
        (lambda: EverySeconds("5"), "seconds > 0, got '5'"),  # type: ignore[arg-type]
        (lambda: AtSteps([]), "at least one step"),
        (lambda: AtSteps([3, 0]), "AtSteps needs an int >= 1, got 0"),
        (lambda: AtSteps(3), r"numbers of steps, such as \{10\}, got 3"),  # type: ignore[arg-type]
        (lambda: AnyOf((First(),)), "two triggers or more, got 1"),
    ],
)
def test_invalid_numbers_are_refused(make: Callable[[], Any], message: str) -> None:
    """The error comes at construction, and names the trigger."""
    with pytest.raises(TriggerError, match=message):
        make()


def test_joined_triggers_are_flat() -> None:
    """Nested joins are one list; other objects can't be joined."""
    a, b, c = EverySteps(2), First(), Last()
    assert (a | b) | c == a | (b | c) == AnyOf((a, AnyOf((b, c))))
    with pytest.raises(TypeError):
        _ = a | "1 epoch"  # type: ignore[operator]  # what the test is about


class Watching(PipelineHooks):
    def __init__(self, cfg: WatchingConfig) -> None:
        super().__init__()
        self.cfg = cfg


class WatchingConfig(PipelineHooksConfig[Watching]):
    class_type: type[Watching] = Watching
    every: Trigger = EverySteps(5)
    other: Trigger | None = None
    more: list[Trigger] = []  # noqa: RUF012 - a field


@given(triggers, st.none() | triggers, st.lists(triggers, max_size=3))
@settings(max_examples=50)
def test_config_round_trips_triggers(
    every: Trigger, other: Trigger | None, more: list[Trigger]
) -> None:
    """JSON, YAML and TOML hold a trigger as its text."""
    config = WatchingConfig(every=every, other=other, more=more)
    for text_format in ("json", "yaml", "toml"):
        text = config.to_str(format=text_format)
        assert str(every) in text
        assert WatchingConfig.from_str(text, format=text_format) == config


def test_field_accepts_text() -> None:
    """A field accepts text in code, in a file and on the command line."""
    expected = EverySteps(3) | EverySeconds(600)
    assert WatchingConfig(every="3 steps | 10 min").every == expected  # type: ignore[arg-type]  # pydantic's
    parser = argparse.ArgumentParser()
    arguments = ["--class_type", f"{__name__}:Watching", "--every", "3 steps | 10 min"]
    found = pydantic_from_argparse(WatchingConfig, parser, arguments)
    assert found.every == expected
    assert WatchingConfig.__pydantic_fields__["every"].default == EverySteps(5)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("5 stepps", "every: .*can't read '5 stepps' as a trigger"),
        (7, "every: .*7 of what\\? write '7 steps' or '7 epochs'"),
        (True, "every: .*expected a trigger or its text, got bool"),
        (None, "every: .*expected a trigger or its text, got NoneType"),
        (2.5, "every: .*expected a trigger or its text, got float"),
    ],
)
def test_invalid_field_is_refused(value: Any, message: str) -> None:
    """The error has the path of the field in the document."""
    with pytest.raises(ConfigFieldError, match=message):
        WatchingConfig.from_dict({"every": value})
