"""Parts of a document are built from trusted classes and functions by signature."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from enum import Enum
from fractions import Fraction
from functools import cache, partial
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from robo_orchard_core.utils.config import (
    ClassConfig,
    Config,
    ConfigBuildError,
    ConfigError,
    ConfigFieldError,
    ConfigInstanceOf,
    ConfigReferenceError,
    FieldsOf,
    Format,
    Function,
    Part,
    TrustError,
    config_class_of,
    config_of,
    function_of,
)

HERE = __name__
T = TypeVar("T")
FORMATS: tuple[Format, ...] = ("yaml", "toml", "json")


if TYPE_CHECKING:
    from collections.abc import Iterable

    from nowhere import Unknown  # type: ignore[import-not-found]


class Shape:
    """Declared class of the fields."""


class Square(Shape):
    def __init__(
        self, side: float, *, colour: Literal["red", "blue"] = "red", name: str | None = None
    ) -> None:
        self.given = (side, colour, name)


class Group(Shape):
    def __init__(self, *members: Shape, spaced: float = 1.0) -> None:
        self.members, self.spaced = members, spaced


class Open(Shape):
    def __init__(self, corners: int, **more: Any) -> None:
        self.corners, self.more = corners, more


class Lazily(Shape):
    """Class with annotations that name imports for type checkers."""

    def __init__(self, sides: Iterable[Shape], unknown: Unknown, size: int = 1) -> None:
        self.given = (sides, unknown, size)


class Made(Shape):
    """Class whose constructor returns another class."""

    def __new__(cls, colour: Literal["red", "blue"]) -> Any:
        return Square(1, colour=colour)


class Either(Shape):
    def __init__(self, inner: int | Shape | list[Shape]) -> None:
        self.inner = inner


class Rectangle(Square):
    def __init__(self, side: float, width: float = 1.0) -> None:
        super().__init__(side)
        self.width = width


class Passing(Square):
    def __init__(self, **more: Any) -> None:
        super().__init__(side=1, **more)


class Undeclared(Shape):
    def __init__(self, inner, times=2):  # type: ignore[no-untyped-def]  # as much code is
        self.inner, self.times = inner, times


class Mapped(Shape):
    def __init__(self, via: Callable[[int], int], layers: Sequence[Shape]) -> None:
        self.via, self.layers = via, layers


class Configured(Shape):
    def __init__(self, cfg: ConfiguredConfig) -> None:
        self.cfg = cfg


class ConfiguredConfig(ClassConfig[Configured]):
    class_type: type[Configured] = Configured
    corners: int = 3


class Stretched(Shape):
    """Class with an argument supplied by the caller."""

    def __init__(self, shape: Shape, factor: float) -> None:
        self.shape, self.factor = shape, factor


class Size(Enum):
    SMALL = 1
    LARGE = 2


class Material(Enum):
    """Enum without plain values."""

    WOOD = (1.0, "brown")


class Carved(Shape):
    def __init__(self, wood: Material | None = None) -> None:
        self.wood = Material[str(wood)]  # accepts a name


class Sized(Shape):
    def __init__(self, size: Size, spots: tuple[int, int] = (0, 0)) -> None:
        self.size, self.spots = size, spots


class Box(Shape, Generic[T]):
    pass


class Rock:
    """Unrelated class."""


class Loud(Shape):
    made = 0

    def __init__(self) -> None:
        Loud.made += 1

    def draw(self) -> None: ...


def unit_square(side: float = 1.0) -> Square:
    return Square(side)


def shelf() -> Box[int]:
    return Box()


def a_rock() -> Rock:
    return Rock()


def undeclared_square():  # type: ignore[no-untyped-def]
    return Square(1)


def double(value: int, times: int = 2) -> int:
    return value * times


class Drawing(Config):
    shape: Annotated[Any, Part(Shape)]
    more: dict[str, Annotated[Any, Part(f"{HERE}:Shape")]] = Field(default={})
    later: Annotated[Any, Part(Shape, given=("shape",))] | None = None
    act: Annotated[Any, Part(Shape, functions="call")] | None = None
    function: Function | None = None
    settings: Annotated[Any, FieldsOf(f"{HERE}:ConfiguredConfig")] = Field(default={})


def drawing(shape: Any, **more: Any) -> Drawing:
    return Drawing.from_dict({"shape": shape, **more}, trust=HERE)


def refused(shape: Any, **more: Any) -> ConfigError:
    with pytest.raises(ConfigError) as found:
        drawing(shape, **more)
    return found.value


def part(of: type | Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    key = "class_type" if isinstance(of, type) else "func"
    return {key: f"{HERE}:{of.__qualname__}", **arguments}


def test_class_is_built_with_the_arguments_in_the_document() -> None:
    """Other arguments keep the class's defaults."""
    assert drawing(part(Square, side=2)).shape().given == (2.0, "red", None)


def test_annotations_may_name_imports_for_type_checkers() -> None:
    """Abstract standard types are known; other missing names affect one parameter."""
    lazily = drawing(part(Lazily, sides=[part(Square, side=2)], unknown={"any": 1})).shape()
    assert lazily.given[0][0].given == (2.0, "red", None)
    assert lazily.given[1:] == ({"any": 1}, 1)
    assert "size: Input should be a valid integer" in str(
        refused(part(Lazily, sides=[], unknown=1, size="large"))
    )
    error = refused(part(Lazily, sides=[part(Square)], unknown=1))
    assert error.path == ("shape", "sides", 0, "side")


def test_annotations_of_new_are_used() -> None:
    """Parameter types may come from ``__new__``."""
    assert drawing(part(Made, colour="blue")).shape().given == (1, "blue", None)
    assert "'red' or 'blue'" in str(refused(part(Made, colour="green")))


def test_function_with_a_matching_return_annotation_is_a_part() -> None:
    """The return annotation decides."""
    assert drawing(part(unit_square)).shape().given == (1.0, "red", None)
    assert type(drawing(part(shelf)).shape()) is Box


@pytest.mark.parametrize("format_", FORMATS)
def test_parts_round_trip_through_files(format_: Format) -> None:
    """A document with parts is restored as an equal config with an identical document."""
    mine = drawing(
        part(Group, members=[part(Square, side=1), part(Configured, corners=4)], spaced=2),
        more={"open": part(Open, corners=3, weight=0.5, inner=part(Loud)), "bare": part(Loud)},
        later=part(Stretched, factor=2),
        act=part(double, times=3),
        function=f"{HERE}:double",
    )
    again = Drawing.from_str(mine.to_str(format_), format_, trust=HERE)
    assert again == mine
    assert again.to_str(format_) == mine.to_str(format_)


def test_documents_hold_only_arguments_that_were_set() -> None:
    """A default that the class changes later applies, as in a script."""
    document = drawing(part(Square, side=2)).to_dict()
    assert document["shape"] == {"class_type": f"{HERE}:Square", "side": 2.0}


def test_declared_config_class_is_used() -> None:
    """Its fields are keys of the mapping, and ``config_type`` is not needed."""
    config = drawing(part(Configured, corners=5))
    assert config.shape == ConfiguredConfig(corners=5)
    assert config.to_dict()["shape"] == {"class_type": f"{HERE}:Configured", "corners": 5}
    assert config.shape().cfg.corners == 5


class Dot(Shape):
    def __init__(self, cfg: ClassConfig[Any]) -> None:
        self.cfg = cfg


class BigDotConfig(ClassConfig[Dot]):
    class_type: type[Dot] = Dot
    size: int = 9


class DotConfig(ClassConfig[Dot]):
    class_type: type[Dot] = Dot
    size: int = 1


class SmallDotConfig(ClassConfig[Dot]):
    class_type: type[Dot] = Dot
    size: int = 0


def test_config_class_named_after_the_class_is_preferred() -> None:
    """Other config classes are written with their names and restored."""
    assert drawing(part(Dot)).shape == DotConfig()
    big = Drawing(shape=BigDotConfig(size=8))
    assert big.to_dict()["shape"]["config_type"] == f"{HERE}:BigDotConfig"
    assert Drawing.from_dict(big.to_dict(), trust=HERE) == big


def grown(side: float = 1.0) -> Square:
    return Square(2 * side)


def test_part_from_code_equals_its_loaded_document() -> None:
    """A part from code has the class that its document would be read as."""
    plain: Any = ClassConfig[Shape]
    for mine in (
        Drawing(shape=plain(class_type=Loud)),
        drawing(part(Square, side=2)).replace(**{"shape.class_type": Rectangle}),
        drawing(part(Square, side=2)).replace(shape=config_of(grown)),
    ):
        assert Drawing.from_dict(mine.to_dict(), trust=HERE) == mine


class Times:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, value: int) -> int:
        return self.factor * value


def total(*numbers: int) -> int:
    return sum(numbers)


class Bounded(Shape):
    def __init__(
        self, side: Annotated[float, Field(gt=0)], name: Annotated[str, "of people"] = ""
    ) -> None:
        self.side = side


def test_annotated_constraints_of_parameters_are_checked() -> None:
    """Constraints in ``Annotated`` apply to fields."""
    assert drawing(part(Bounded, side=1, name="x")).shape().side == 1.0
    assert refused(part(Bounded, side=0)).location == "shape.side"
    with pytest.raises(ValidationError, match="greater than 0"):
        config_of(Bounded, side=-1.0)


class Taken(Shape):
    """Class with parameters named like config methods, or with an underscore."""

    def __init__(
        self,
        *copy: Shape,
        schema: type[Shape],
        save: Callable[[int], int] = abs,
        json: int = 1,
        model_config: float = 2,
        required: bool = True,
        _hidden: Shape | None = None,
        plain: int = 0,
    ) -> None:
        self.copy, self.schema, self.save, self.json = copy, schema, save, json
        self.rest = (model_config, required, plain)
        self.hidden = _hidden


TAKEN: dict[str, Any] = {
    "copy": [part(Square, side=1)],
    "schema": f"{HERE}:Square",
    "save": f"{HERE}:double",
    "json": 4,
    "model_config": 3,
    "_hidden": part(Loud),
}


@pytest.mark.parametrize("format_", FORMATS)
def test_parameters_may_have_any_name(format_: Format) -> None:
    """Names that no field can have keep their types."""
    mine = drawing(part(Taken, **TAKEN))
    again = Drawing.from_str(mine.to_str(format_), format_, trust=HERE)
    assert again == mine == pickle.loads(pickle.dumps(mine)) == copy.deepcopy(mine)
    for made in (mine.shape(), again.shape()):
        assert type(made.copy[0]) is Square
        assert (made.schema, made.save, made.json) == (Square, double, 4)
        assert made.rest == (3.0, True, 0)
        assert type(made.hidden) is Loud
    changed = mine.replace(**{"shape.json": 5, "shape.required": False, "shape.copy.0.side": 2})
    assert changed.shape.arguments()["json"] == 5
    assert changed.shape().rest == (3.0, False, 0)
    assert changed.shape().copy[0].given[0] == 2.0
    assert config_of(Taken, schema=Shape)().save is abs


@pytest.mark.parametrize(
    ("changes", "place", "says"),
    [
        ({"jsn": 1}, "shape.jsn", "did you mean 'json'?"),
        ({"json": "x"}, "shape.json", "valid integer"),
        ({"schema": f"{HERE}:Rock"}, "shape.schema", "expected a subclass of"),
        ({"_hidden": part(Rock)}, "shape._hidden.class_type", "expected a Shape"),
        ({"copy": [part(Square, sid=1)]}, "shape.copy.0.sid", "did you mean 'side'?"),
        ({"save": "os:system"}, "shape.save", "outside the trusted"),
        ({"plain": "x"}, "shape.plain", "valid integer"),
    ],
)
def test_parameters_of_any_name_are_validated(
    changes: dict[str, Any], place: str, says: str
) -> None:
    """Parameters of any name don't open the config to unknown arguments."""
    error = refused(part(Taken, **TAKEN | changes))
    assert error.location == place
    assert says in str(error)
    assert refused(part(Taken)).location == "shape.schema"


def test_config_of_equals_the_part_of_a_document() -> None:
    """A part from code equals the part that a document describes."""
    assert Drawing(shape=config_of(Square, side=2)) == drawing(part(Square, side=2))
    assert Drawing(shape=config_of(Loud)) == drawing(part(Loud))
    assert Drawing(shape=config_of(unit_square)) == drawing(part(unit_square))


def test_replace_may_set_any_declared_argument() -> None:
    """Declared arguments can be set, unknown arguments are refused."""
    square = config_of(Square, side=1.0)
    assert square.replace(colour="blue") == config_of(Square, side=1.0, colour="blue")
    assert config_of(Open, corners=3).replace(anything=1) == config_of(Open, corners=3, anything=1)
    with pytest.raises(ConfigFieldError, match="did you mean 'colour'"):
        square.replace(color="blue")


def test_derived_configs_can_be_pickled() -> None:
    """Another process derives the class again, since no module holds it."""
    made: Any = config_class_of(Square, ClassConfig[Shape])
    of_kind = made(class_type=Square, side=1)
    mine = [config_of(Open, corners=3, more=[of_kind]), config_of(double, times=3), of_kind]
    again = pickle.loads(pickle.dumps(mine))
    assert again == copy.deepcopy(mine) == mine
    assert again[0]().more["more"][0].given == (1.0, "red", None)
    script = "import pickle, sys; print(pickle.load(sys.stdin.buffer)())"
    half = pickle.dumps(config_of(Fraction, numerator=1, denominator=2))
    printed = subprocess.run([sys.executable, "-c", script], input=half, stdout=-1, check=True)
    assert printed.stdout.split() == [b"1/2"]


def placed(a: int, b: int = 2, /, c: int = 3, *more: int, d: int = 4) -> tuple[int, ...]:
    return (a, b, c, *more, d)


@pytest.mark.parametrize(
    ("arguments", "result"),
    [
        ({"a": 1}, (1, 2, 3, 4)),
        ({"b": 7, "a": 1}, (1, 7, 3, 4)),
        ({"a": 1, "c": 5, "d": 0}, (1, 2, 5, 0)),
        ({"a": 1, "more": [8, 9]}, (1, 2, 3, 8, 9, 4)),
        ({"a": 1, "c": 5, "more": []}, (1, 2, 5, 4)),
    ],
)
def test_positional_only_and_var_args_are_passed_by_position(
    arguments: dict[str, Any], result: tuple[int, ...]
) -> None:
    """Positional-only parameters, and all parameters before ``*args``, are passed by position."""
    config = drawing(part(Loud), act=part(placed, **arguments)).act
    assert config is not None
    assert config() == function_of(config)() == result
    assert config(0) == (0, *result[1:])


def test_missing_positional_argument_is_reported() -> None:
    """Later arguments don't fill the missing position."""
    for arguments in ({"b": 1}, {"more": [1, 2]}):
        with pytest.raises(ConfigBuildError, match="missing a required argument: 'a'"):
            config_of(placed, **arguments)()


def test_nested_parts_are_built() -> None:
    """Parts in lists, mappings, undeclared parameters and ``*args`` are built."""
    group = drawing(part(Group, members=[part(Square, side=1), part(unit_square)])).shape()
    assert [type(member) for member in group.members] == [Square, Square]
    undeclared = drawing(part(Undeclared, inner={"a": [part(Square, side=3)], "b": 1})).shape()
    assert undeclared.inner["a"][0].given[0] == 3
    assert undeclared.inner["b"] == 1


def test_callable_parameters_accept_names_and_parts() -> None:
    """A name is the function itself; a part with arguments is called later."""
    named = drawing(part(Mapped, via=f"{HERE}:double", layers=[part(Square, side=1)])).shape()
    assert named.via(4) == 8
    assert type(named.layers[0]) is Square
    tuned = drawing(part(Mapped, via=part(double, times=5), layers=[])).shape()
    assert tuned.via(4) == 20
    assert tuned.via.func is double  # a plain partial


def test_function_of_returns_a_callable_for_any_function_field() -> None:
    """Functions by name, functions with arguments, and instances of callable classes."""
    assert function_of(double) is double
    assert function_of(drawing(part(Loud), act=part(double)).act) is double
    assert function_of(drawing(part(Loud), act=part(double, times=3)).act)(5) == 15
    assert function_of(config_of(Times, factor=3))(5) == 15
    assert function_of(config_of(total, numbers=[1, 2]))(5) == 8


def test_enum_members_and_tuples_are_restored() -> None:
    """A parameter receives its declared type."""
    sized = drawing(part(Sized, size=2, spots=[3, 4])).shape()
    assert (sized.size, sized.spots) == (Size.LARGE, (3, 4))


def test_enum_without_plain_values_is_passed_by_name() -> None:
    """The weights of torchvision's models are such enums."""
    for format_ in FORMATS:
        text = drawing(part(Carved, wood="WOOD")).to_str(format_)
        assert Drawing.from_str(text, format_, trust=HERE).shape().wood is Material.WOOD


def test_part_that_is_called_accepts_arguments() -> None:
    """A function that is called needs no return annotation."""
    act = drawing(part(Loud), act=part(double, times=3)).act
    assert act is not None
    assert act(5) == 15


def test_fields_of_admits_fields_of_a_named_config_class() -> None:
    """The config class is fixed, and imported on demand."""
    assert drawing(part(Loud), settings={"corners": 7}).settings == ConfiguredConfig(corners=7)
    assert refused(part(Loud), settings={"korners": 7}).location == "settings.korners"


@pytest.mark.parametrize(
    ("shape", "place", "says"),
    [
        (part(Square, sid=1), "shape.sid", "did you mean 'side'?"),
        (part(Square), "shape.side", "a value is required"),
        (part(Square, side="wide"), "shape.side", "valid number"),
        (part(Square, side=1, colour="pink"), "shape.colour", "'red' or 'blue'"),
        (part(Group, members=[part(Square, sid=1)]), "shape.members.0.sid", "'side'"),
        (part(Group, members=[part(Rock)]), "shape.members.0.class_type", "Shape"),
        (part(Undeclared, inner={"a": [0, part(Square, sid=1)]}), "shape.inner.a.1.sid", "'side'"),
        (part(Either, inner=part(Square, sid=1)), "shape.inner.sid", "did you mean 'side'?"),
        (part(Either, inner=[part(Square)]), "shape.inner.0.side", "a value is required"),
        (part(Undeclared, inner=[{"func": 3}]), "shape.inner.0.func", "expected a name"),
        ({"side": 1}, "shape", "'class_type' or 'func'"),
        ({**part(Square), "func": "a:b"}, "shape", "found both"),
        ({"class_type": 3}, "shape.class_type", "expected a name"),
        ("Square", "shape", "a mapping with"),
    ],
)
def test_errors_of_parts_have_path_and_expectation(shape: Any, place: str, says: str) -> None:
    """Errors of parts are as precise as errors of declared fields."""
    error = refused(shape)
    assert error.location == place
    assert says in str(error)


class Drawn(Shape, ABC):
    @abstractmethod
    def draw(self) -> None: ...


def test_abstract_classes_are_refused_with_missing_methods() -> None:
    """Abstract classes are refused before any instance is built."""
    error = refused(part(Drawn))
    assert error.location == "shape.class_type"
    assert "is abstract, without draw" in str(error)


@pytest.mark.parametrize("code", [partial(double, times=3), Box[int], cache(double), Loud().draw])
def test_config_of_refuses_code_that_no_file_can_name(code: Any) -> None:
    """The error is raised at once, not when the config is saved."""
    with pytest.raises(ConfigReferenceError, match="a class or function that a file can name"):
        config_of(code)


def test_mapping_in_code_is_not_a_part() -> None:
    """Only documents describe parts as mappings."""
    with pytest.raises(ValidationError, match=r"expected a Shape: a config, as of config_of\(\)"):
        Drawing(shape=part(Square, side=1))


def test_wrong_kind_is_refused_before_any_call() -> None:
    """Classes are checked by bases, functions by return annotation."""
    before = Loud.made
    for other in (part(Rock), part(a_rock), part(undeclared_square), part(double)):
        assert isinstance(refused(other), ConfigReferenceError)
    drawing(part(Loud))
    assert Loud.made == before


def test_untrusted_code_is_refused_at_any_depth() -> None:
    """Untrusted code is refused as a part and inside other parts."""
    for shape in (
        {"class_type": "antigravity:Shape"},
        {"func": "os:system", "command": "true"},
        part(Undeclared, inner=[{"x": {"func": "os:system", "command": "true"}}]),
        part(Mapped, via="os:system", layers=[]),
        part(Open, corners=3, more={"class_type": "antigravity:Shape"}),
    ):
        assert isinstance(refused(shape), TrustError)


def test_arguments_supplied_by_the_caller_are_refused_in_documents() -> None:
    """Arguments passed by the caller are neither required nor admitted in documents."""
    later = drawing(part(Loud), later=part(Stretched, factor=2)).later
    assert later is not None
    assert later(shape=Square(1)).factor == 2
    error = refused(part(Loud), later=part(Stretched, factor=2, shape=part(Loud)))
    assert error.location == "later.shape"


def test_arguments_refused_by_the_class_are_reported_at_the_build() -> None:
    """A signature with ``**kwargs`` leaves the check to the class."""
    with pytest.raises(TypeError, match="'wide'") as found:
        drawing(part(Passing, wide=1)).shape()
    assert found.value.__notes__ == [f"while PassingConfig built {HERE}:Passing"]


def test_class_type_alone_selects_the_config_class() -> None:
    """``class_type`` is sufficient for a declared base config."""

    class Album(Config):
        shapes: list[ConfigInstanceOf[ClassConfig[Shape]]]

    album = Album.from_dict(
        {"shapes": [part(Square, side=1), part(Configured, corners=4), part(Loud)]}, trust=HERE
    )
    assert [type(config()) for config in album.shapes] == [Square, Configured, Loud]
    assert Album.from_dict(album.to_dict(), trust=HERE) == album
    with pytest.raises(ConfigFieldError, match="did you mean 'side'"):
        Album.from_dict({"shapes": [part(Square, sid=1)]}, trust=HERE)
    in_code = Album(
        shapes=[config_of(Square, side=1), ConfiguredConfig(corners=4), config_of(Loud)]
    )
    assert in_code == album
    with pytest.raises(ValidationError, match="subclass of Shape"):
        Album(shapes=[config_of(Rock)])  # type: ignore[list-item]  # which mypy sees as well


class FrameConfig(ClassConfig[T]):
    """Base config with a field in addition to parameters."""

    width: int = 1


class Wall(Config):
    frame: ConfigInstanceOf[FrameConfig[Any]]


def test_config_from_code_is_converted_to_the_declared_base() -> None:
    """A derived config receives the fields of the declared base."""
    made: Any = config_of(Square, side=2)
    wall = Wall(frame=made)
    assert wall == Wall.from_dict({"frame": part(Square, side=2)}, trust=HERE)
    assert wall.replace(**{"frame.width": 3}).frame.width == 3
    assert pickle.loads(pickle.dumps(wall)) == wall
    assert wall.frame().given[0] == 2.0


def test_configs_from_code_are_validated_like_documents() -> None:
    """A wrong kind or an unknown argument is refused in code as well."""
    with pytest.raises(ValidationError, match="expected a Shape"):
        Drawing(shape=config_of(Rock))
    with pytest.raises(ValidationError, match="sid"):
        config_of(Square, sid=1)


@given(
    side=st.floats(allow_nan=False, allow_infinity=False),
    colour=st.sampled_from(["red", "blue", None]),
    name=st.none() | st.text(st.characters(codec="utf-8"), max_size=8),
)
def test_any_arguments_round_trip(side: float, colour: str | None, name: str | None) -> None:
    """Any arguments are restored and reach the class."""
    arguments = {"side": side, "name": name} | ({"colour": colour} if colour else {})
    mine = Drawing(shape=config_of(Square, **arguments))
    again = Drawing.from_str(mine.to_str(), trust=HERE)
    assert again == mine
    assert again.shape().given == (side, colour or "red", name)


class Gem:
    """Another unrelated class."""


class GemConfig(ClassConfig[Gem]):
    class_type: type[Gem] = Gem

    def __post_init__(self) -> None:
        raise AssertionError("nobody asked for a gem")


def test_configs_of_wrong_kinds_are_never_constructed() -> None:
    """A config class of the wrong kind runs no validators."""
    error = refused({"config_type": f"{HERE}:GemConfig"})
    assert isinstance(error, ConfigReferenceError)
    assert "expected a Shape, found" in error.problem
