"""The team's hooks: one with a config, and one with constructor parameters only."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from robo_orchard_lab.pipeline.hooks.mixin import (
    HookContext,
    PipelineHookArgs,
    PipelineHooks,
    PipelineHooksConfig,
)
from robo_orchard_lab.pipeline.trigger import TriggerField


class Diary(PipelineHooks):
    """Writes words into ``diary.txt``."""

    def __init__(self, cfg: DiaryConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.register_hook("on_step", HookContext.from_callable(after=self._note), when=cfg.every)

    def _note(self, args: PipelineHookArgs) -> None:
        word = self.cfg.words[args.global_step_id % len(self.cfg.words)]
        with Path("diary.txt").open("a", encoding="utf-8") as diary:
            diary.write(f"{args.global_step_id} {word}\n")


class DiaryConfig(PipelineHooksConfig[Diary]):
    """Interval and text of the diary."""

    class_type: type[Diary] = Diary
    every: TriggerField = Field(default="1 epoch", description="When to write.")
    words: list[str] = Field(min_length=1, description="What is written, in turns.")


class Bell(PipelineHooks):
    """Rings at the end of the run."""

    def __init__(self, sound: str, *, times: int = 1) -> None:
        super().__init__()
        self.sound, self.times = sound, times
        self.register_hook("on_loop", HookContext.from_callable(after=self._ring))

    def _ring(self, args: PipelineHookArgs) -> None:
        print(" ".join([self.sound] * self.times))
