"""A hook that runs when its schedule is due."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from robo_orchard_core.utils.hook import HookContext
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.events import ChannelName
from robo_orchard_lab.pipeline.schedule import Due, Schedule

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
        self._entered = False
        self._before = self._after = None
        if before is not None:
            self._before = self._gated_before(before, when.bind(channel, "before"))
            self._after = after and self._gated_after(after)
        elif after is not None:
            self._after = _gated(after, when.bind(channel, "after"))

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

    def _gated_before(self, function: HookFunction, due: Due) -> HookFunction:
        @functools.wraps(function)  # by which errors find its name and line
        def before(args: PipelineHookArgs) -> None:
            self._entered = due(args)
            if self._entered:
                function(args)

        return before

    def _gated_after(self, function: HookFunction) -> HookFunction:
        @functools.wraps(function)
        def after(args: PipelineHookArgs) -> None:
            if self._entered:
                function(args)

        return after


def _gated(function: HookFunction, due: Due) -> HookFunction:
    @functools.wraps(function)
    def after(args: PipelineHookArgs) -> None:
        if due(args):
            function(args)

    return after
