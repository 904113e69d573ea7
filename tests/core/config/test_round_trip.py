"""Every config round-trips exactly through every format, or is refused with the path."""

from __future__ import annotations

import datetime
import decimal
import enum
import math
import re
import uuid
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Optional, get_args

import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typing_extensions import TypeAliasType

from robo_orchard_core.utils.config import (
    ClassConfig,
    Config,
    ConfigInstanceOf,
    ConfigSaveError,
    Format,
)
from robo_orchard_core.utils.config.formats import first_difference

# Shared machines are slow at times.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
FORMATS: tuple[Format, ...] = get_args(Format)
HERE = (__name__,)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    [
        *("on", "no", "y", "~", "null", "1e3", "0x1F", "012", "1:30", "2024-01-01", "=", "<<"),
        *("a: b", "- a", "# a", "'", '"', "\\", "\r\n", "\0", "\x7f", "\x85", "\u2028", "\ufeff"),
        *(" a ", "", "\t"),
    ]
)
FLOATS = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([1e300, -0.0, 5e-324])
INTEGERS = st.integers() | st.integers(min_value=-(10**100), max_value=10**100)


class Mode(enum.Enum):
    FAST = "fast"
    EXACT = 2


class Inner(Config):
    size: int = 1


class Special(Inner):
    label: str = "yes"
    rate: float = 0.1


class Everything(Config):
    flag: bool
    number: int
    rate: float
    text: str
    maybe: Optional[int] = 7  # noqa: UP045 - as users write it
    absent: str | None = None
    either: int | str
    pair: tuple[int, str]
    row: tuple[float, ...]
    names: set[str]
    frozen: frozenset[int]
    mode: Mode
    choice: Literal["a", 1, Mode.EXACT]
    path: Path
    pure: PurePosixPath
    when: datetime.datetime
    day: datetime.date
    span: datetime.timedelta
    money: decimal.Decimal
    identity: uuid.UUID
    raw: bytes
    by_number: dict[int, str]
    by_mode: dict[Mode, float]
    anything: Any
    inner: Inner
    inners: list[ConfigInstanceOf[Inner]]
    named: dict[str, Inner | None]
    kind: type[Inner] = Inner
    kinds: dict[str, type[Inner]]


PLAIN = st.recursive(
    st.none() | st.booleans() | INTEGERS | FLOATS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
SPECIALS = st.builds(Special, size=INTEGERS, label=TEXT, rate=FLOATS)
INNERS = st.builds(Inner, size=INTEGERS) | SPECIALS
TIMES = st.datetimes(timezones=st.sampled_from([datetime.UTC, None]))
CONFIGS = st.builds(
    Everything,
    flag=st.booleans(),
    number=INTEGERS,
    rate=FLOATS,
    text=TEXT,
    maybe=st.none() | INTEGERS,
    absent=st.none() | TEXT,
    either=INTEGERS | TEXT,
    pair=st.tuples(INTEGERS, TEXT),
    row=st.lists(FLOATS, max_size=3).map(tuple),
    names=st.sets(TEXT, max_size=3),
    frozen=st.frozensets(INTEGERS, max_size=3),
    mode=st.sampled_from(Mode),
    choice=st.sampled_from(["a", 1, Mode.EXACT]),
    path=st.sampled_from([Path("/a b/c"), Path(), Path("~/x")]),
    pure=st.just(PurePosixPath("a/b")),
    when=TIMES,
    day=st.dates(),
    span=st.timedeltas(datetime.timedelta(days=-9999), datetime.timedelta(days=9999)),
    money=st.decimals(allow_nan=False, allow_infinity=False, places=3),
    identity=st.uuids(),
    raw=TEXT.map(str.encode),
    by_number=st.dictionaries(INTEGERS, TEXT, max_size=3),
    by_mode=st.dictionaries(st.sampled_from(Mode), FLOATS),
    anything=PLAIN.filter(lambda value: "__none__" not in repr(value)),
    inner=INNERS,
    inners=st.lists(INNERS, max_size=3),
    named=st.dictionaries(TEXT, st.none() | INNERS, max_size=3),
    kind=st.sampled_from([Inner, Special]),
    kinds=st.dictionaries(TEXT, st.sampled_from([Inner, Special]), max_size=2),
)


@pytest.mark.parametrize("format_", FORMATS)
@PATIENT
@given(config=CONFIGS)
def test_every_config_round_trips_exactly(format_: Format, config: Everything) -> None:
    """A loaded config is equal, has the same repr, and writes identical text."""
    text = config.to_str(format_)
    loaded = Everything.from_str(text, format_, trust=HERE)
    assert loaded == config
    # Sets have no stable repr, and pydantic has its own class for UTC.
    plain: dict[str, Any] = {"names": set(), "frozen": (), "when": "2000-01-01T00:00:00"}
    assert repr(loaded.replace(**plain)) == repr(config.replace(**plain))
    assert loaded.to_str(format_) == text
    assert Everything.from_dict(config.to_dict(), trust=HERE) == config


@pytest.mark.parametrize("format_", FORMATS)
def test_mapping_order_is_kept(format_: Format) -> None:
    """Hooks run in mapping order, so no format may sort or move entries."""

    class Holder(Config):
        things: dict[str, Any]

    things = {"z": {"b": 1, "a": [{"y": 1}]}, "m": 1, "a": {}, "k": [{"x": {"q": 1}}, {}]}
    loaded = Holder.from_str(Holder(things=things).to_str(format_), format_)
    assert list(loaded.things) == ["z", "m", "a", "k"]
    assert loaded.things == things


@pytest.mark.parametrize("format_", FORMATS)
def test_sign_of_zero_and_number_types_are_kept(format_: Format) -> None:
    """-0.0 stays negative and a float without fraction stays a float."""

    class Numbers(Config):
        zero: float = -0.0
        whole: float = 1

    loaded = Numbers.from_str(Numbers().to_str(format_), format_)
    assert math.copysign(1, loaded.zero) == -1
    assert type(loaded.whole) is float


def test_toml_omits_only_fields_that_are_none_by_default() -> None:
    """Other None values are explicit."""

    class Optionals(Config):
        default: int | None = None
        other: int | None = 3
        items: list[int | None] = pydantic.Field(default=[None, 1])

    config = Optionals(other=None)
    assert config.to_str("toml") == ("other = {__none__ = true}\nitems = [{__none__ = true}, 1]\n")
    assert Optionals.from_str(config.to_str("toml"), "toml") == config


def test_toml_writes_nested_configs_as_tables() -> None:
    """A nested config is a table, in any order of declaration."""

    class Outer(Config):
        inner: Inner = Inner()
        rate: float = 0.5

    assert Outer().to_str("toml") == "rate = 0.5\n\n[inner]\nsize = 1\n"


def test_yaml_1_1_readers_read_identical_values() -> None:
    """Text that YAML 1.1 reads as booleans or numbers is quoted."""
    import yaml

    class Words(Config):
        words: list[str] = pydantic.Field(
            default=["on", "no", "1e3", "null", "12:30", "2024-01-01", "0o7", "=", "~"]
        )
        on: bool = True

    assert yaml.safe_load(Words().to_str("yaml")) == Words().to_dict()


def test_sets_are_written_in_a_stable_order() -> None:
    """Hash seeds don't change the file."""

    class Tags(Config):
        tags: set[str] = pydantic.Field(default={"d", "a", "c", "b"})

    assert Tags().to_dict() == {"tags": ["a", "b", "c", "d"]}


class Odd:
    """Value without a form in documents."""


class Summer(datetime.tzinfo):
    """Time zone with rules, like those of zoneinfo."""

    def utcoffset(self, when: datetime.datetime | None) -> datetime.timedelta | None:
        return None if when is None else datetime.timedelta(hours=1)

    def dst(self, when: datetime.datetime | None) -> datetime.timedelta | None:
        return None

    def tzname(self, when: datetime.datetime | None) -> str | None:
        return None


class Cyclic(Config):
    inners: list[Cyclic] = pydantic.Field(default=[])


def scale(value: float) -> float:
    """Function that a field can refer to."""
    return value


LOST: list[Any] = [
    (Any, (1, 2), "restore this value exactly"),
    (Any, {1: 2}, "restore this value exactly"),
    (Any, Special(), "restore this value exactly"),
    (Any, math.inf, "expected a finite number, found inf"),
    (Any, Odd(), "no document can hold"),
    (Any, scale, "restore this value exactly"),
    (Path | str, Path("a"), "restore this value exactly"),
    (bytes, b"\xff", "no document can hold"),
    (str, "\ud800", "lone surrogate"),
    pytest.param(int, 10**5000, "4300 digits", id="digits"),
    (pydantic.SecretStr, pydantic.SecretStr("x"), "restore this value exactly"),
    (Annotated[tuple[int, ...], pydantic.Field(strict=True)], (1,), "would not be restored"),
    (dict[tuple[int, int], int], {(1, 2): 3}, "would not be restored"),
    (Callable[[float], float], lambda value: value, "can't be found by its name"),
    (list[Any], [[[1, (2,)]]], "restore this value exactly"),
    (Any, frozenset({1}), "restore this value exactly"),
    (
        datetime.datetime,
        datetime.datetime(2024, 1, 1, tzinfo=Summer()),
        "restore this value exactly",
    ),
]


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize(("annotation", "value", "problem"), LOST)
def test_values_that_would_not_round_trip_are_refused(
    annotation: Any, value: Any, problem: str, format_: Format
) -> None:
    """A value that its type or the format would change is not written."""
    holder = pydantic.create_model("Holder", __base__=Config, value=(annotation, ...))

    class Outer(Config):
        holders: dict[str, holder]  # type: ignore[valid-type]  # made from the parameters

    config = Outer(holders={"a": holder.model_validate({"value": value})})
    with pytest.raises(ConfigSaveError, match=re.escape(problem)) as caught:
        config.to_str(format_)
    assert caught.value.location.startswith("holders.a.value")


def test_none_marker_is_refused_in_toml_only() -> None:
    """The mapping that encodes None in TOML is ordinary in other formats."""

    class Holder(Config):
        value: dict[str, Any] = pydantic.Field(default={"x": {"__none__": True}})

    assert Holder.from_str(Holder().to_str("yaml"), "yaml") == Holder()
    with pytest.raises(ConfigSaveError, match=r"value\.x: toml can't hold this value exactly"):
        Holder().to_str("toml")


def test_cyclic_config_is_refused() -> None:
    """A cycle is a ConfigSaveError, not a RecursionError."""
    config = Cyclic()
    config.inners.append(config)
    with pytest.raises(ConfigSaveError, match="nested deeper than 64 levels"):
        config.to_dict()


def test_local_class_is_written_only_if_declared() -> None:
    """A local class needs a declaration in the config's type."""

    class Local(Inner):
        pass

    class Holder(Config):
        kind: type[Inner] = Inner

    class Declares(Config):
        kind: type[Inner] = Local

    assert Declares.from_str(Declares().to_str()) == Declares()
    with pytest.raises(ConfigSaveError, match=r"kind: .*Local' can't be found by its name"):
        Holder(kind=Local).to_str()


def test_ambiguous_local_classes_are_refused() -> None:
    """A reference that leads to another class of equal name is not written."""

    def make() -> type[Inner]:
        class Local(Inner):
            pass

        return Local

    first, second = make(), make()

    class Holder(Config):
        one: type[Inner] = first
        two: type[Inner] = second

    with pytest.raises(ConfigSaveError, match="restore this value exactly"):
        Holder().to_str()


def test_save_skips_post_init() -> None:
    """`__post_init__` may access the disk; saving must not depend on that."""
    calls = []

    class Checked(Config):
        def __post_init__(self) -> None:
            calls.append("post init")

    config = Checked()
    config.to_str()
    assert calls == ["post init"]


def test_excluded_field_is_omitted() -> None:
    """`Field(exclude=True)` applies; a value other than the default is refused."""

    class Hidden(Config):
        cache: dict[str, int] = pydantic.Field(default={}, exclude=True)

    assert Hidden().to_dict() == {}
    with pytest.raises(ConfigSaveError, match="cache: the declared type would not restore"):
        Hidden(cache={"a": 1}).to_dict()


class Hook:
    def __init__(self, cfg: HookConfig) -> None:
        self.cfg = cfg


class HookConfig(ClassConfig[Hook]):
    class_type: type[Hook] = Hook
    every_steps: int = 5


@pytest.mark.parametrize("format_", FORMATS)
def test_declared_class_needs_no_trust(format_: Format) -> None:
    """`class_type: type[Hook] = Hook` round-trips in every format without trust."""
    config = HookConfig(every_steps=3)
    loaded = HookConfig.from_str(config.to_str(format_), format_)
    assert loaded == config
    assert loaded.class_type is Hook


class Precision:
    """User's type unknown to pydantic, like torch's dtypes."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Precision) and other.name == self.name

    __hash__ = None  # type: ignore[assignment]  # as nothing here needs one


AnyPrecision = Annotated[
    Precision,
    pydantic.BeforeValidator(lambda data: Precision(data) if isinstance(data, str) else data),
    pydantic.PlainSerializer(lambda precision: precision.name),
]


def test_custom_serializers_are_used() -> None:
    """A validator and a serializer make any type writable."""

    class Model(Config):
        model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)

        precision: AnyPrecision = Precision("bf16")
        others: dict[str, list[AnyPrecision]] = pydantic.Field(default={"a": [Precision("fp32")]})
        delay: datetime.timedelta = datetime.timedelta(seconds=90)

        @pydantic.field_serializer("delay")
        def _in_seconds(self, delay: datetime.timedelta) -> float:
            return delay.total_seconds()

    document = {"precision": "bf16", "others": {"a": ["fp32"]}, "delay": 90.0}
    assert Model().to_dict() == document
    assert Model.from_dict(document) == Model()


def test_output_of_custom_serializers_is_checked() -> None:
    """A custom serializer can't write data that readers refuse."""

    class Broken(Config):
        rate: Annotated[float, pydantic.PlainSerializer(lambda rate: rate + 1e999)]

    with pytest.raises(ConfigSaveError, match="rate: would not be restored"):
        Broken(rate=0).to_str()


def test_validator_that_changes_its_own_output_is_refused() -> None:
    """A value that changes with each load is not written."""

    class Grows(Config):
        sizes: Annotated[list[int], pydantic.AfterValidator(lambda sizes: [*sizes, 0])]

    with pytest.raises(ConfigSaveError, match="sizes: the declared type would not restore"):
        Grows(sizes=[1]).to_str()


def test_class_of_a_missing_module_is_refused() -> None:
    """A written reference must be resolvable."""
    gone = type("Gone", (Inner,), {"__module__": "gone"})

    class Holder(Config):
        kind: type[Inner] = Inner

    with pytest.raises(ConfigSaveError, match="'gone:Gone' can't be found by its name"):
        Holder(kind=gone).to_str()


def test_document_above_the_size_limit_is_not_written() -> None:
    """The size limit applies to writers too."""

    class Holder(Config):
        text: str

    with pytest.raises(ConfigSaveError, match="json can't hold this: the document is larger"):
        Holder(text="x" * 2**24).to_str()


def test_type_aliases_are_resolved() -> None:
    """`Annotated` and `type` aliases declare their contents."""
    Kinds = TypeAliasType("Kinds", list[Annotated[type[Inner], "note"]])  # noqa: N806 - a type

    class Holder(Config):
        kinds: Kinds = pydantic.Field(default=[Special])
        made: dict[str, Any] = pydantic.Field(default_factory=lambda data: {"n": len(data)})

    assert Holder.from_str(Holder().to_str()) == Holder()


def test_config_type_may_name_the_declared_class() -> None:
    """`config_type` may name the declared class itself."""
    assert Inner.from_dict({"config_type": f"{__name__}:Inner", "size": 2}) == Inner(size=2)


def test_first_difference_returns_the_path() -> None:
    """Documents differ in type, order, length, value, or the sign of a zero."""
    document: Any = {"a": [1, {"b": 0.0}], "c": "x"}
    for other, path in (
        ({"c": "x", "a": [1, {"b": 0.0}]}, ()),
        ({"a": [1], "c": "x"}, ("a",)),
        ({"a": [1.0, {"b": 0.0}], "c": "x"}, ("a", 0)),
        ({"a": [1, {"b": -0.0}], "c": "x"}, ("a", 1, "b")),
        ({"a": [1, {"b": 0.0}], "c": "y"}, ("c",)),
    ):
        assert first_difference(document, other) == path
    assert first_difference(document, document) is None
