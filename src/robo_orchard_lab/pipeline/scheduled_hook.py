"""A hook that runs when its schedule is due."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from robo_orchard_core.utils.hook import HookContext
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.events import ChannelName
from robo_orchard_lab.pipeline.schedule import Schedule

HookFunction = Callable[[PipelineHookArgs], Any]


class ScheduledHook(HookContext[PipelineHookArgs]):
    """Another hook, run when a schedule is due.

    A hook with a ``before`` asks there, once: its ``after`` runs if, and only if, the ``before``
    did. One without asks in its ``after``.

    Raises:
        ScheduleError: the schedule can never be due on this channel.
    """

    def __init__(
        self, hook: HookContext[PipelineHookArgs], when: Schedule, channel: ChannelName
    ) -> None:
        self.hook = hook
        self.when = when
        self.name = hook.name
        before, after = hook.functions()
        self._due = when.bind(channel, "after" if before is None else "before")
        self._entered = False
        self._before = before and self._asking(before)
        self._after = after and (self._asking(after) if before is None else self._if_entered(after))

    def before(self, args: PipelineHookArgs) -> None:
        if self._before is not None:
            self._before(args)

    def after(self, args: PipelineHookArgs) -> None:
        if self._after is not None:
            self._after(args)

    def functions(self) -> tuple[HookFunction | None, HookFunction | None]:
        return self._before, self._after

    def __repr__(self) -> str:
        return f"{self.hook!r} when {self.when}"

    def _asking(self, function: HookFunction) -> HookFunction:
        @functools.wraps(function)  # by which errors find its name and line
        def ask(args: PipelineHookArgs) -> None:
            self._entered = self._due(args)
            if self._entered:
                function(args)

        return ask

    def _if_entered(self, function: HookFunction) -> HookFunction:
        @functools.wraps(function)
        def after(args: PipelineHookArgs) -> None:
            if self._entered:
                function(args)

        return after
