"""Class configs build their class from the config or from its fields."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, Optional, TypeVar

import pydantic
import pytest

from robo_orchard_core.utils.config import (
    CallableConfig,
    ClassConfig,
    ClassType,
    Config,
    ConfigBuildError,
    ConfigInstanceOf,
    ConfigReferenceError,
)

if TYPE_CHECKING:
    from nowhere import HookConfig as Absent  # type: ignore[import-not-found]  # only a text here

T = TypeVar("T")


class Recorder:
    """Recorder of constructor arguments."""

    def __init__(self, **given: Any) -> None:
        self.given = given


class Hook:
    def __init__(self, cfg: HookConfig) -> None:
        self.cfg = cfg


H = TypeVar("H", bound=Hook, covariant=True)


class BaseHookConfig(ClassConfig[H], Generic[H]):
    """Generic base between ClassConfig and user configs, as in the pipeline."""


class HookConfig(BaseHookConfig[Hook]):
    class_type: type[Hook] = Hook
    every_steps: int = 5


class LoudHook(Hook):
    """Other hook class with the same config."""


class Timer:
    def __init__(self, interval_s: float, unit: str = "s", *more: int, scale: int = 1) -> None:
        self.given = (interval_s, unit, more, scale)


class TimerConfig(ClassConfig[Timer]):
    class_type: type[Timer] = Timer
    interval_s: float = 0.5


def test_class_that_accepts_a_config_receives_it() -> None:
    """The class receives the config itself, not a copy."""
    config = HookConfig()
    assert config().cfg is config


def test_other_classes_receive_fields_as_keywords() -> None:
    """Fields are keyword arguments; arguments of the call override fields."""
    config = TimerConfig(interval_s=2)
    assert config().given == (2.0, "s", (), 1)
    assert config(scale=3, interval_s=1.0).given == (1.0, "s", (), 3)
    assert config(7.0, "ms", 8).given == (7.0, "ms", (8,), 1)


def test_call_keywords_change_fields_of_the_config() -> None:
    """A keyword with the name of a field makes another, validated config."""
    config = HookConfig()
    built = config(every_steps="7")
    assert built.cfg == HookConfig(every_steps=7)
    assert config == HookConfig()
    with pytest.raises(ValueError, match="every_steps: Input should be a valid integer"):
        config(every_steps="x")


def test_call_may_pass_another_config() -> None:
    """The call may pass another config under the parameter's name."""
    other = HookConfig(every_steps=1)
    assert HookConfig()(cfg=other).cfg is other


class Positional:
    def __init__(self, config: Any, /, first: int, second: int = 2) -> None:
        self.given = (config, first, second)


class Untyped:
    def __init__(self, cfg, first=0):  # type: ignore[no-untyped-def]  # as users may write it
        self.given = (cfg, first)


class Late:
    def __init__(self, model: object, settings: BuildConfig) -> None:
        self.given = (settings, model)


class Named:
    def __init__(self, *, settings: Optional[BuildConfig]) -> None:  # noqa: UP045 - as users do
        self.given = (settings,)


class OnlyText:
    def __init__(self, cfg: Absent) -> None:
        self.given = (cfg,)


class OnlyWords:
    def __init__(self, settings: BuildConfig, other: Absent = None) -> None:
        self.given = (settings,)


class Above:
    def __init__(self, cfg: ClassConfig[Any]) -> None:
        self.given = (cfg,)


class Handing(Above):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class BuildConfig(ClassConfig[Any]):
    class_type: type[Any]


CASES: list[tuple[type[Any], tuple[Any, ...], tuple[Any, ...]]] = [
    (Positional, (1,), (1, 2)),
    (Untyped, (), (0,)),
    (Named, (), ()),
    (OnlyText, (), ()),
    (OnlyWords, (), ()),
    (Above, (), ()),
    (Handing, (), ()),
]


@pytest.mark.parametrize(("cls", "args", "rest"), CASES)
def test_config_parameter_is_found_by_name_or_type(
    cls: type[Any], args: tuple[Any, ...], rest: tuple[Any, ...]
) -> None:
    """The parameter is found by name, by type, or in a base class that receives ``**kwargs``."""
    config = BuildConfig(class_type=cls)
    assert config(*args).given == (config, *rest)


def test_config_parameter_may_follow_other_parameters() -> None:
    """Other required parameters come from the call."""
    config = BuildConfig(class_type=Late)
    assert config(model="m").given == config("m").given == (config, "m")


class OwnConfig:
    def __init__(self, config: dict[str, int], size: int = 1) -> None:
        self.given = (config, size)


class OwnConfigConfig(ClassConfig[OwnConfig]):
    class_type: type[OwnConfig] = OwnConfig
    config: dict[str, int] = pydantic.Field(default={"a": 1})


def test_parameter_named_config_receives_a_field_of_that_name() -> None:
    """`config: dict` with a field of that name is an ordinary parameter."""
    assert OwnConfigConfig()().given == ({"a": 1}, 1)


class Undeclared:
    def __init__(self, config, size=1):  # type: ignore[no-untyped-def]  # as users may write it
        self.given = (config, size)


def test_field_takes_precedence_over_the_name_config() -> None:
    """An undeclared parameter receives the field of its name."""

    class UndeclaredConfig(ClassConfig[Undeclared]):
        class_type: type[Undeclared] = Undeclared
        config: str = "mine"

    assert UndeclaredConfig()().given == ("mine", 1)


def test_parameter_of_another_type_does_not_receive_the_config() -> None:
    """`config: dict` without such a field is a missing argument."""

    class Plain(ClassConfig[OwnConfig]):
        class_type: type[OwnConfig] = OwnConfig

    with pytest.raises(ConfigBuildError, match=r"OwnConfig doesn't accept .* of .*Plain: missing"):
        Plain()()


class Model:
    def __init__(
        self,
        timer: Timer,
        timers: list[Timer],
        by_name: dict[str, tuple[Timer, int]],
        kept: TimerConfig,
        kept_too: list[TimerConfig],
        absent: Optional[Timer] = None,  # noqa: UP045 - as users write it
        data: object = None,
    ) -> None:
        self.__dict__.update({k: v for k, v in locals().items() if k != "self"})


class Data(Config):
    size: int = 1


class ModelConfig(ClassConfig[Model]):
    class_type: type[Model] = Model
    timer: TimerConfig = TimerConfig()
    timers: list[ConfigInstanceOf[ClassConfig[Timer]]] = pydantic.Field(default=[TimerConfig()])
    by_name: dict[str, tuple[TimerConfig, int]] = pydantic.Field(default={"a": (TimerConfig(), 1)})
    kept: TimerConfig = TimerConfig()
    kept_too: list[TimerConfig] = pydantic.Field(default=[TimerConfig()])
    absent: TimerConfig | None = None
    data: Data = Data()


def test_nested_configs_are_built_unless_declared_as_configs() -> None:
    """Nested configs are built, in containers too, unless the parameter is declared as a config."""
    config = ModelConfig()
    built: Any = config()
    assert isinstance(built.timer, Timer)
    assert [type(timer) for timer in built.timers] == [Timer]
    assert isinstance(built.by_name["a"][0], Timer)
    assert built.by_name["a"][1] == 1
    assert built.kept is config.kept
    assert built.kept_too == config.kept_too
    assert built.absent is None
    assert built.data is config.data


class WordsModel:
    def __init__(self, kept: list[TimerConfig], timer: Timer, other: Absent = None) -> None:
        self.given = (kept, timer)


def test_unresolvable_annotation_leaves_other_parameters_declared() -> None:
    """A name that is missing at run time affects only its own parameter."""

    class WordsConfig(ClassConfig[WordsModel]):
        class_type: type[WordsModel] = WordsModel
        kept: list[TimerConfig] = pydantic.Field(default=[TimerConfig()])
        timer: TimerConfig = TimerConfig()

    kept, timer = WordsConfig()().given
    assert kept == [TimerConfig()]
    assert isinstance(timer, Timer)


def test_class_without_a_signature_receives_all_fields() -> None:
    """Some classes of C extensions have no signature."""

    class DictConfig(ClassConfig[Any]):
        class_type: type[Any] = dict
        size: int = 1
        timer: TimerConfig = TimerConfig()

    built = DictConfig()(more=2)
    assert (built["size"], built["more"], type(built["timer"])) == (1, 2, Timer)


def test_mismatched_arguments_are_reported_by_name() -> None:
    """Missing or unexpected arguments are reported with class, config and parameter."""

    class TooMany(ClassConfig[Timer]):
        class_type: type[Timer] = Timer
        interval_s: float = 1
        colour: str = "red"

    class TooFew(ClassConfig[Timer]):
        class_type: type[Timer] = Timer

    with pytest.raises(ConfigBuildError, match=r":Timer doesn't .*TooMany: .*'colour'") as caught:
        TooMany()()
    assert "its parameters are interval_s, unit, scale" in str(caught.value)
    with pytest.raises(ConfigBuildError, match=r":Timer doesn't accept .*: .*'interval_s'"):
        TooFew()()
    with pytest.raises(ConfigBuildError, match=r":Hook doesn't accept .*: .*'colour'"):
        HookConfig()(colour="red")


def test_constructor_errors_carry_a_note_with_the_config() -> None:
    """An error of a constructor propagates, with a note."""

    class Failing:
        def __init__(self) -> None:
            raise RuntimeError("no device")

    class FailingConfig(ClassConfig[Failing]):
        class_type: type[Failing] = Failing

    with pytest.raises(RuntimeError, match="no device") as caught:
        FailingConfig()()
    assert "FailingConfig built" in caught.value.__notes__[0]


def test_class_type_admits_only_subclasses() -> None:
    """`class_type` stays of the declared kind, in code and in files."""
    assert type(HookConfig(class_type=LoudHook)()) is LoudHook
    with pytest.raises(pydantic.ValidationError, match="subclass of Hook"):
        HookConfig(class_type=Timer)  # type: ignore[arg-type]  # the error is the point
    config = HookConfig()
    with pytest.raises(pydantic.ValidationError, match="subclass of Hook"):
        config.class_type = Timer  # type: ignore[assignment]  # the error is the point
    with pytest.raises(ConfigReferenceError, match=r"class_type: expected a subclass of .*:Hook"):
        HookConfig.from_dict({"class_type": f"{__name__}:Timer"}, trust=__name__)


class Experiment(Config):
    hooks: dict[str, ConfigInstanceOf[BaseHookConfig[Hook]]]
    plain: BaseHookConfig[Hook] | None = None


class LoudConfig(BaseHookConfig[LoudHook]):
    class_type: type[LoudHook] = LoudHook
    volume: int = 11


class Bare(BaseHookConfig):  # type: ignore[type-arg]  # as users may write it
    class_type: type[Hook] = Hook


@pytest.mark.parametrize("format_", ["json", "yaml", "toml"])
def test_generic_configs_are_covariant(format_: Any) -> None:
    """A config of a subclass keeps its fields where the base class is declared."""
    config = Experiment(hooks={"a": LoudConfig(volume=3), "b": HookConfig()}, plain=LoudConfig())
    assert isinstance(config.plain, LoudConfig)
    loaded = Experiment.from_str(config.to_str(format_), format_, trust=__name__)
    assert loaded == config
    assert list(loaded.hooks) == ["a", "b"]


class AnyParts(Config):
    parts: dict[str, ConfigInstanceOf[ClassConfig[Any]]]


def test_class_config_of_any_admits_all_classes() -> None:
    """A config of any class keeps its fields, also through a file."""
    config = AnyParts(parts={"hook": LoudConfig(volume=3), "timer": TimerConfig(interval_s=2)})
    assert AnyParts.from_str(config.to_str("json"), "json", trust=__name__) == config


def test_configs_of_another_kind_are_refused() -> None:
    """A config of an unrelated class is refused."""
    for other in (TimerConfig(), Data(), Bare()):
        with pytest.raises(pydantic.ValidationError, match=r"hooks\.a"):
            Experiment(hooks={"a": other})  # type: ignore[dict-item]  # the error is the point


class Speaks:
    """Common base of some configs that is not a config."""


class Quiet(Config, Speaks):
    words: int = 0


class Talk(Config):
    speaker: ConfigInstanceOf[Speaks]


def test_declared_base_need_not_be_a_config() -> None:
    """`ConfigInstanceOf` admits any base class of configs; files name the config."""
    talk = Talk(speaker=Quiet(words=3))
    assert talk.to_dict()["speaker"]["config_type"] == f"{__name__}:Quiet"
    assert Talk.from_str(talk.to_str(), trust=__name__) == talk
    with pytest.raises(pydantic.ValidationError, match="expected a config that is a Speaks"):
        Talk(speaker=Data())  # type: ignore[arg-type]  # the error is the point
    with pytest.raises(ConfigReferenceError, match="speaker: expected 'config_type' to name"):
        Talk.from_dict({"speaker": {"words": 1}})
    with pytest.raises(ConfigReferenceError, match="expected a config class"):
        Talk.from_dict({"speaker": {"config_type": f"{__name__}:Speaks"}}, trust=__name__)


def test_fields_of_a_subclass_are_kept_in_a_base_class_field() -> None:
    """No field of a subclass is lost, even without `ConfigInstanceOf`."""

    class Bigger(Data):
        more: int = 2

    class Holder(Config):
        data: Data = Bigger(more=3)

    assert Holder().to_dict()["data"]["more"] == 3
    assert Holder.from_str(Holder().to_str()) == Holder()


def scaled(value: float, factor: float = 1.0) -> float:
    return value * factor


def shifted(value: float, factor: float = 1.0) -> float:
    return value + factor


class ScaleConfig(CallableConfig[float]):
    func: Callable[[float], float] = scaled
    factor: float = 3.0


def test_callable_config_calls_its_function() -> None:
    """Fields are keyword arguments; arguments of the call override fields."""
    assert ScaleConfig()(2.0) == 6.0
    assert ScaleConfig(func=shifted)(2.0, factor=1.0) == 3.0
    with pytest.raises(
        ConfigBuildError, match=r":scaled doesn't accept .* of ScaleConfig: .*value"
    ):
        ScaleConfig()()


@pytest.mark.parametrize("format_", ["json", "yaml", "toml"])
def test_callable_config_round_trips_through_files(format_: Any) -> None:
    """The declared function needs no trust; another function does."""
    assert ScaleConfig.from_str(ScaleConfig().to_str(format_), format_) == ScaleConfig()
    other = ScaleConfig(func=shifted)
    with pytest.raises(ConfigReferenceError, match=r"func: .* outside the trusted packages"):
        ScaleConfig.from_str(other.to_str(format_), format_)
    assert ScaleConfig.from_str(other.to_str(format_), format_, trust=__name__) == other


def test_class_type_alias_equals_type() -> None:
    """`ClassType[Hook]` admits the classes that `type[Hook]` admits."""

    class Spelled(ClassConfig[Hook]):
        class_type: ClassType[Hook] = LoudHook

    assert Spelled.from_str(Spelled().to_str()) == Spelled()


def test_config_and_class_may_be_defined_in_either_order() -> None:
    """A hook may name its config and the config its hook, in either order."""

    class EarlyConfig(ClassConfig[Any]):
        class_type: type[Any] = Recorder
        size: int = 1

    assert EarlyConfig()(extra=2).given == {"size": 1, "extra": 2}


def test_type_variable_fields_are_limited_to_the_bound() -> None:
    """An open generic config admits the classes of the bound, in files too."""

    class OpenConfig(BaseHookConfig):  # type: ignore[type-arg]  # open on purpose
        every_steps: int = 1

    document = {"class_type": f"{__name__}:LoudHook"}
    assert OpenConfig.from_dict(document, trust=__name__).class_type is LoudHook
    with pytest.raises(ConfigReferenceError, match=r"class_type: expected a subclass of .*:Hook,"):
        OpenConfig.from_dict({"class_type": f"{__name__}:Timer"}, trust=__name__)
