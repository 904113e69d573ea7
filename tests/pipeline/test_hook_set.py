"""PipelineHooks: registration, nesting, names, states and repr."""

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
    """Hook that appends its mark to a list in the before of every channel."""

    def __init__(self, marks: list[str], mark: str) -> None:
        super().__init__(mark)
        for channel in CHANNEL_NAMES:
            self.register_hook(
                channel, HookContext.from_callable(before=lambda args: marks.append(mark))
            )


class Counter(PipelineHooks):
    """Hook that counts loops in its state."""

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
    """Hook with parameters of its own."""

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
def test_hooks_run_in_registration_order(channel: ChannelName) -> None:
    """Bundles and single hooks run in the order of their registration."""
    marks: list[str] = []
    hooks = PipelineHooks()
    hooks += Marking(marks, "a")
    hooks.register_hook(channel, HookContext.from_callable(before=lambda args: marks.append("own")))
    hooks.register_pipeline_hooks(Marking(marks, "b"))
    enter(hooks, channel)
    assert marks == ["a", "own", "b"]


def test_configs_build_their_hooks() -> None:
    """A config can replace a hook: passed as ``cfg``, or as keyword arguments."""
    hooks = PipelineHooks.from_hooks([PlainConfig(size=5), TakesConfigConfig(), Counter()])
    plain, with_config, counter = hooks.all_hooks()
    assert isinstance(plain, Plain)
    assert plain.size == 5
    assert isinstance(with_config, TakesConfig)
    assert with_config.cfg == TakesConfigConfig(size=4)
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
def test_from_hooks_accepts_one_many_or_named(given: Any, names: list[str]) -> None:
    """from_hooks accepts one hook, an iterable, a mapping with names, or None."""
    assert [hook.name for hook in PipelineHooks.from_hooks(given).all_hooks()] == names


def test_handle_removes_bundle_from_every_channel() -> None:
    """The handle works once, and the bundle can be registered again."""
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


def test_hook_registered_later_runs_in_bundle_order() -> None:
    """A hook added to a registered bundle runs in the position of the bundle."""
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


def test_duplicate_names_are_refused() -> None:
    """Duplicate names are refused with a remedy."""
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


def test_unnamed_bundles_may_repeat() -> None:
    """Any number of plain bundles without a name may be registered."""
    hooks = PipelineHooks.from_hooks([PipelineHooks(), PipelineHooks()])
    assert list(hooks.named_hooks()) == []
    with pytest.raises(HookRegistrationError, match="'a'"):
        PipelineHooks.from_hooks([PipelineHooks("a"), PipelineHooks("a")])


def test_same_hook_twice_is_refused() -> None:
    """An object is registered once, and not in itself."""
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
def test_wrong_use_has_remedy(use: Callable[[Any], Any], message: str) -> None:
    """A wrong channel name or object is an error with the remedy."""
    with pytest.raises(HookRegistrationError, match=message):
        use(PipelineHooks())


def no_argument() -> None: ...


def test_function_without_argument_is_refused() -> None:
    """The error comes at registration, and names the function."""
    with pytest.raises(HookSignatureError, match="one argument"):
        PipelineHooks().register_hook("on_step", HookContext.from_callable(no_argument))  # type: ignore[arg-type]  # what the test is about


class Forgetful(PipelineHooks):
    def __init__(self) -> None:
        pass


class TooEarly(PipelineHooks):
    def __init__(self) -> None:
        self.register_hook("on_step", HookContext.from_callable(print))


def test_missing_super_init_is_refused() -> None:
    """The error comes when the hook registers methods, or is registered."""
    with pytest.raises(HookRegistrationError, match=r"Forgetful\.__init__ must call super\(\)"):
        PipelineHooks.from_hooks([Forgetful()])
    with pytest.raises(HookRegistrationError, match=r"TooEarly\.__init__ must call super\(\)"):
        TooEarly()


def test_states_are_saved_by_name() -> None:
    """The states of all nested bundles are stored by name."""
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
    """The error lists missing and unexpected names, and nothing is loaded."""
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


def test_repr_shows_channels_with_hooks() -> None:
    """The channels are in the order of the loop."""
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


def test_mixin_exports_everything_for_hooks() -> None:
    """One module exports everything that a hook author needs."""
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


def test_config_round_trips() -> None:
    """A config is equal after JSON, YAML and TOML, without further trust."""
    for text_format in ("json", "yaml", "toml"):
        config = TakesConfigConfig(size=9)
        text = config.to_str(format=text_format)
        assert TakesConfigConfig.from_str(text, format=text_format) == config
