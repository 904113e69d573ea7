"""Bundles of hooks: registration, nesting, names, state, printing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from robo_orchard_core.utils.hook import HookRegistrationError, HookSignatureError
from robo_orchard_lab.pipeline import CHANNEL_NAMES, PipelineHookArgs
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.hooks import mixin
from robo_orchard_lab.pipeline.hooks.mixin import (
    ChannelName,
    HookContext,
    PipelineHooks,
    PipelineHooksConfig,
)


class Marking(PipelineHooks):
    """Appends its mark to a list in the before of every channel."""

    def __init__(self, marks: list[str], mark: str) -> None:
        super().__init__(mark)
        for channel in CHANNEL_NAMES:
            self.register_hook(
                channel, HookContext.from_callable(before=lambda args: marks.append(mark))
            )


class Counter(PipelineHooks):
    """Counts loops, as its state."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.register_hook("on_loop", HookContext.from_callable(before=self.add))

    def add(self, args: PipelineHookArgs) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]


class Plain(PipelineHooks):
    """Takes its parameters one by one."""

    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.size = size


class PlainConfig(PipelineHooksConfig[Plain]):
    class_type: type[Plain] = Plain
    size: int = 3


class TakesConfig(PipelineHooks):
    def __init__(self, cfg: TakesConfigConfig) -> None:
        super().__init__()
        self.cfg = cfg


class TakesConfigConfig(PipelineHooksConfig[TakesConfig]):
    class_type: type[TakesConfig] = TakesConfig
    size: int = 4


def enter(hooks: PipelineHooks, channel: ChannelName = "on_step") -> None:
    with hooks.begin(channel, PipelineHookArgs()):
        pass


@pytest.mark.parametrize("channel", CHANNEL_NAMES)
def test_bundles_run_in_the_order_of_registration(channel: ChannelName) -> None:
    """Bundles and hooks of one's own run in the order in which they were registered."""
    marks: list[str] = []
    hooks = PipelineHooks()
    hooks += Marking(marks, "a")
    hooks.register_hook(channel, HookContext.from_callable(before=lambda args: marks.append("own")))
    hooks.register_pipeline_hooks(Marking(marks, "b"))
    enter(hooks, channel)
    assert marks == ["a", "own", "b"]


def test_configurations_build_their_hooks() -> None:
    """A configuration is as good as a hook: passed on, or spread over keyword arguments."""
    hooks = PipelineHooks.from_hooks([PlainConfig(size=5), TakesConfigConfig(), Counter()])
    plain, takes, counter = hooks.all_hooks()
    assert isinstance(plain, Plain)
    assert plain.size == 5
    assert isinstance(takes, TakesConfig)
    assert takes.cfg == TakesConfigConfig(size=4)
    assert isinstance(counter, Counter)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (None, []),
        ([], []),
        (PlainConfig(), ["Plain"]),
        ((hook for hook in [PlainConfig(), TakesConfigConfig()]), ["Plain", "TakesConfig"]),
        ({"one": PlainConfig(), "two": PlainConfig()}, ["one", "two"]),
    ],
)
def test_from_hooks_takes_one_many_or_named(given: Any, names: list[str]) -> None:
    """One hook, an iterable or a mapping that names them; or none."""
    assert [hook.name for hook in PipelineHooks.from_hooks(given).all_hooks()] == names


def test_a_removed_bundle_leaves_every_channel() -> None:
    """The handle of a bundle removes all of its hooks, once, and it can be registered again."""
    marks: list[str] = []
    hooks = PipelineHooks()
    bundle = Marking(marks, "a")
    handle = hooks.register_pipeline_hooks(bundle)
    handle()
    handle()
    for channel in CHANNEL_NAMES:
        enter(hooks, channel)
    assert marks == []
    assert list(hooks.all_hooks()) == []
    hooks += bundle
    enter(hooks)
    assert marks == ["a"]
    hooks.unregister_all()
    enter(hooks)
    assert marks == ["a"]
    assert list(hooks.all_hooks()) == []


def test_what_a_bundle_registers_later_runs_where_it_is_registered() -> None:
    """A hook that is added to a bundle afterwards takes its place in the bundle's parents."""
    marks: list[str] = []
    inner = PipelineHooks()
    hooks = PipelineHooks.from_hooks([inner, Marking(marks, "last")])
    handle = inner.register_hook(
        "on_step", HookContext.from_callable(before=lambda args: marks.append("late"))
    )
    enter(hooks)
    handle.remove()
    enter(hooks)
    assert marks == ["late", "last", "last"]


def test_two_hooks_of_one_name_are_refused() -> None:
    """A name is unique in all that is registered together; the remedy is told, and works."""
    with pytest.raises(
        HookRegistrationError, match=r"two hooks have one name: 'Plain'.*hook\.name"
    ):
        PipelineHooks.from_hooks([PlainConfig(), PlainConfig()])
    inner = PipelineHooks.from_hooks([Plain()])
    with pytest.raises(HookRegistrationError, match="'Plain'"):
        PipelineHooks.from_hooks([inner, Plain()])
    other = Plain()
    other.name = "other"
    hooks = PipelineHooks.from_hooks([inner, other])
    assert [hook.name for hook in hooks.named_hooks()] == ["Plain", "other"]


def test_bundles_without_a_name_have_no_identity() -> None:
    """Plain bundles only hold others together: any number of them may be registered."""
    hooks = PipelineHooks.from_hooks([PipelineHooks(), PipelineHooks()])
    assert list(hooks.named_hooks()) == []
    with pytest.raises(HookRegistrationError, match="'a'"):
        PipelineHooks.from_hooks([PipelineHooks("a"), PipelineHooks("a")])


def test_the_same_hook_twice_is_refused() -> None:
    """One object is registered once, and not in itself."""
    hooks = PipelineHooks()
    inner = PipelineHooks()
    hooks += inner
    with pytest.raises(HookRegistrationError, match="already registered here"):
        hooks += inner
    with pytest.raises(HookRegistrationError, match="already registered here"):
        hooks += hooks
    with pytest.raises(HookRegistrationError, match="can't be registered in itself"):
        inner += hooks


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (
            lambda hooks: hooks.register_hook("on_steps", HookContext.from_callable(print)),
            "no channel 'on_steps'; did you mean 'on_step'.*on_loop, on_epoch",
        ),
        (
            lambda hooks: hooks.register_hook("zzz", HookContext.from_callable(print)),
            r"no channel 'zzz'\. Channels: on_loop",
        ),
        (lambda hooks: hooks.begin("on_bach", PipelineHookArgs()), "did you mean 'on_batch'"),
        (lambda hooks: hooks.register_hook("on_step", print), "HookContext.from_callable"),
        (
            lambda hooks: hooks.register_pipeline_hooks(HookContext.from_callable(print)),
            "expected a PipelineHooks .*register_hook",
        ),
        (
            lambda hooks: hooks.register_pipeline_hooks(Plain),
            "expected a PipelineHooks .* got type",
        ),
    ],
)
def test_wrong_use_says_what_to_do(use: Callable[[Any], Any], message: str) -> None:
    """A wrong channel name or something that is no hook is an error with the remedy."""
    with pytest.raises(HookRegistrationError, match=message):
        use(PipelineHooks())


def no_argument() -> None: ...


def test_a_callable_that_takes_no_argument_is_refused() -> None:
    """The error comes where the hook is written, and names the callable."""
    with pytest.raises(HookSignatureError, match="one argument"):
        PipelineHooks().register_hook("on_step", HookContext.from_callable(no_argument))  # type: ignore[arg-type]  # what is tested


class Forgetful(PipelineHooks):
    def __init__(self) -> None:
        pass


class TooEarly(PipelineHooks):
    def __init__(self) -> None:
        self.register_hook("on_step", HookContext.from_callable(print))


def test_a_constructor_that_forgets_super_is_told() -> None:
    """Whether it registers hooks itself or is registered, it is told to call super().__init__."""
    with pytest.raises(HookRegistrationError, match=r"Forgetful\.__init__ must call super\(\)"):
        PipelineHooks.from_hooks([Forgetful()])
    with pytest.raises(HookRegistrationError, match=r"TooEarly\.__init__ must call super\(\)"):
        TooEarly()


def test_states_are_saved_by_name() -> None:
    """The states of all bundles in a bundle go by their names, however deep they are."""
    deep = Counter()
    deep.name = "deep"
    hooks = PipelineHooks.from_hooks([Counter(), PipelineHooks.from_hooks(deep), Plain()])
    enter(hooks, "on_loop")
    deep.count = 7
    state = hooks.state_dict()
    assert state == {"Counter": {"count": 1}, "deep": {"count": 7}}
    other_deep = Counter()
    other_deep.name = "deep"
    other = PipelineHooks.from_hooks([other_deep, Counter()])
    other.load_state_dict(state)
    assert other.state_dict() == {"deep": {"count": 7}, "Counter": {"count": 1}}


def test_states_of_other_hooks_are_refused() -> None:
    """Missing and unexpected names are listed, and nothing is loaded."""
    counter = Counter()
    hooks = PipelineHooks.from_hooks([counter])
    with pytest.raises(
        StateError,
        match="registered but not saved: Counter; saved but not registered: Other",
    ):
        hooks.load_state_dict({"Other": {"count": 3}})
    with pytest.raises(StateError, match="saved but not registered: Other"):
        hooks.load_state_dict({"Counter": {"count": 2}, "Other": {}})
    assert counter.count == 0


def test_a_bundle_prints_the_hook_channels_that_have_hooks() -> None:
    """The tree has an entry for each such channel, in the order of the timeline."""
    hooks = PipelineHooks.from_hooks([Counter()])
    hooks.register_hook("on_epoch", HookContext.from_callable(after=print))
    lines = repr(hooks).splitlines()
    assert lines[:3] == [
        "<robo_orchard_lab.pipeline.hooks.mixin.PipelineHooks(",
        "  hooks={",
        "    on_loop: <robo_orchard_core.utils.hook.HookContextChannel(",
    ]
    assert lines[-1] == "  })>"
    assert re.findall(r"^    (\w+):", repr(hooks), re.MULTILINE) == ["on_loop", "on_epoch"]
    assert repr(Counter()).startswith(f"<{__name__}.Counter(\n")
    assert repr(PipelineHooks()).splitlines()[0] == lines[0]


def test_everything_a_hook_needs_comes_from_mixin() -> None:
    """The one module offers what a hook is written with."""
    assert {
        "HookContext",
        "PipelineHookArgs",
        "PipelineHooks",
        "PipelineHooksConfig",
        "RemovableHandle",
        "RemoveableHandle",
    } <= set(mixin.__all__)
    assert all(hasattr(mixin, name) for name in mixin.__all__)
    assert PipelineHooks.__module__ == mixin.__name__


def test_configured_hooks_survive_a_round_trip() -> None:
    """A hook's configuration is the same after JSON, YAML and TOML, without further trust."""
    for text_format in ("json", "yaml", "toml"):
        config = TakesConfigConfig(size=9)
        text = config.to_str(format=text_format)
        assert TakesConfigConfig.from_str(text, format=text_format) == config
