"""Values of a config are replaced by dotted path."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import Field

from robo_orchard_core.utils.config import (
    Anything,
    ClassConfig,
    Config,
    ConfigFieldError,
    ConfigInstanceOf,
    config_of,
)


class Ball:
    def __init__(self, size: int, weight: float = 1.0, spots: tuple[int, ...] = (1, 2)) -> None:
        self.size, self.weight, self.spots = size, weight, spots


class Football(Ball):
    pass


class Cube:
    def __init__(self, side: int, **more: Any) -> None:
        self.side, self.more = side, more


def thrown(ball: Any, far: int = 1) -> Any:
    return ball, far


def kicked(ball: Any, far: int = 1) -> Any:
    return ball, far


class Range(Config):
    low: int = 0
    high: int = 9

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError("low must not be above high")


class Toys(Config):
    by_name: dict[str, ConfigInstanceOf[ClassConfig[Any]]] = Field(default={})
    in_line: list[ConfigInstanceOf[ClassConfig[Any]]] = Field(default=[])
    labels: dict[str, int | None] = Field(default={"red": 1})
    numbered: dict[int, str] = Field(default={3: "three"})
    limits: Range = Range()
    act: Anything = None


TOYS = Toys(
    by_name={"ball": config_of(Ball, size=1), "b.c": config_of(Cube, side=2, x={"y": [1, 2]})},
    in_line=[config_of(Ball, size=3), config_of(Cube, side=4)],
    act=config_of(thrown, far=2),
)


@pytest.mark.parametrize(
    ("changes", "other"),
    [
        (
            {"by_name.ball.size": 5},
            TOYS.replace(by_name={**TOYS.by_name, "ball": config_of(Ball, size=5)}),
        ),
        ({"in_line.1.side": 5}, TOYS.replace(in_line=[TOYS.in_line[0], config_of(Cube, side=5)])),
        ({"in_line.0": TOYS.in_line[1]}, TOYS.replace(in_line=[TOYS.in_line[1]] * 2)),
        ({"labels.blue": 2}, TOYS.replace(labels={"red": 1, "blue": 2})),
        ({"numbered.3": "drei"}, TOYS.replace(numbered={3: "drei"})),
        ({"act.far": 7}, TOYS.replace(act=config_of(thrown, far=7))),
    ],
)
def test_replace_reaches_into_mappings_and_lists(changes: dict[str, Any], other: Toys) -> None:
    """Dotted names contain keys and indexes."""
    assert TOYS.replace(**changes) == other != TOYS


def test_replace_accepts_quoted_keys() -> None:
    """Quoted keys and extra arguments of open signatures can be replaced."""
    other = TOYS.replace(**{'by_name."b.c".x.y.0': 7, 'by_name."b.c".new': 1})
    assert other.by_name["b.c"]().more == {"x": {"y": [7, 2]}, "new": 1}
    assert TOYS.by_name["b.c"]().more == {"x": {"y": [1, 2]}}


def test_replace_may_set_fields_of_derived_configs() -> None:
    """Fields that were not set, and values in their defaults, can be replaced."""
    other = TOYS.replace(**{"by_name.ball.weight": 2, "in_line.0.spots.1": 5})
    assert other.by_name["ball"]().weight == 2.0
    assert other.in_line[0]().spots == (1, 5)


def test_none_removes_an_entry_unless_none_is_valid() -> None:
    """None is stored if None is a valid value."""
    other = TOYS.replace(**{"by_name.ball": None, "labels.red": None})
    assert [*other.by_name] == ["b.c"]
    assert other.labels == {"red": None}
    assert [*TOYS.by_name] == ["ball", "b.c"]


def test_replacements_are_validated_together() -> None:
    """Rules across fields are checked on the result, in any order of values."""
    for changes in ({"limits.low": 20, "limits.high": 30}, {"limits.high": 30, "limits.low": 20}):
        assert TOYS.replace(**changes).limits == Range(low=20, high=30)
    both = {"limits.low": 1, "limits": Range(high=5)}
    assert TOYS.replace(**both).limits == Range(low=1, high=5)


def test_class_may_be_replaced_by_a_subclass() -> None:
    """Other classes are refused."""
    other = TOYS.replace(**{"by_name.ball.class_type": Football})
    assert type(other.by_name["ball"]()) is Football


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"by_name.bal.size": 1}, "by_name.bal: no entry has this name; did you mean 'ball'?"),
        ({"by_name.bal": None}, "by_name.bal: no entry has this name; did you mean 'ball'?"),
        ({"by_name.xyz": None}, "by_name.xyz: no entry has this name; there is ball, b.c"),
        (
            {"by_name.ball.sizes": 1},
            "by_name.ball.sizes: BallConfig has no such field; did you mean",
        ),
        ({"by_name.ball.size": "x"}, "by_name.ball.size: Input should be a valid integer"),
        ({"by_name.ball": 3}, "by_name.ball: "),
        ({"by_name.ball.size.x": 3}, "by_name.ball.size: holds no config, mapping or list but int"),
        ({"in_line.2.size": 1}, "in_line.2: expected the index of one of 2 items"),
        ({"in_line.last": None}, "in_line.last: expected the index of one of 2 items"),
        ({"in_line.0.size": None}, "in_line.0.size: Input should be a valid integer"),
        ({"by_name.ball.class_type": Cube}, "by_name.ball.class_type: the other values are for"),
        ({"act.func": kicked}, "act.func: the other values are for"),
        ({"by_name..x": 1}, "expected keys with dots between them"),
    ],
)
def test_replace_errors_have_path_and_suggestion(changes: dict[str, Any], problem: str) -> None:
    """Errors have the path and the most similar name."""
    with pytest.raises(ConfigFieldError, match="^" + re.escape(problem)):
        TOYS.replace(**changes)
