"""What a process has done of a run, step by step, in a file."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from robo_orchard_core.utils.hook import HookContext
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.progress import CHANNEL_NAMES, ChannelName
from robo_orchard_lab.pipeline.trainer import HookBasedTrainer
from robo_orchard_lab.testing.resume.run_facts import (
    attribute_facts,
    batch_facts,
    state_facts,
    value_text,
)

NAME = "resume proof"
COMPLETED = "completed"
"""How the event ends in which an epoch is left whose data was passed over to its end."""
Facts = dict[str, str]
Entry = str | Facts
"""An event, as text, or what was found at a moment, by name."""


class RunRecorder(PipelineHooks, AbstractContextManager["RunRecorder"]):
    """Writes down what a trainer does, and has no state of its own.

    It is the innermost hook, draws nothing, publishes nothing and makes no logging point; it reads
    from the device ahead of every step, which takes time and changes nothing.

    Args:
        trainer: whose hooks it joins.
        path: of the file to write; it is written line by line, so that one that is killed leaves
            what it has done.
        stop_after: ask to stop when so many steps of the run are done; None for the run's own end.
    """

    def __init__(self, trainer: HookBasedTrainer, path: Path, stop_after: int | None) -> None:
        super().__init__(NAME)
        self._trainer = trainer
        self._stop_after = stop_after
        self._began_at = time.monotonic()
        self._file: IO[str] = path.open("w", encoding="utf-8")
        for channel in CHANNEL_NAMES:
            self.register_hook(channel, self._recording(channel))
        self.register_hook("on_step", HookContext.from_callable(self._look, self._end_step))
        trainer.hooks += self
        self.write("start", trainer.progress.global_step_id)

    def write(self, kind: str, value: Any) -> None:
        """Add a line, which is there to read at once, whatever happens to this process."""
        step = self._trainer.progress.global_step_id
        self._file.write(json.dumps([step, kind, value]) + "\n")
        self._file.flush()

    def write_end(self) -> None:
        """Write down what the run is when the trainer has returned."""
        self.write("end", state_facts(self._trainer))
        self.write("took_s", time.monotonic() - self._began_at)

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _recording(self, channel: ChannelName) -> HookContext[PipelineHookArgs]:
        def before(args: PipelineHookArgs) -> None:
            self._write_event("before", channel, args)

        def after(args: PipelineHookArgs) -> None:
            self._write_event("after", channel, args)

        return HookContext.from_callable(before, after)

    def _write_event(self, role: str, channel: ChannelName, args: PipelineHookArgs) -> None:
        counters = args.epoch_id, args.step_id, args.global_step_id, args.optimizer_step_id
        words = [role, channel, *map(str, counters)]
        if args.evaluation is not None:
            words.append(args.evaluation)
        if role == "after" and args.epoch_completed:
            words.append(COMPLETED)
        if args.exception is not None:
            words.append(repr(args.exception))
        self.write("event", " ".join(words))

    def _look(self, args: PipelineHookArgs) -> None:
        self.write("facts", {**batch_facts(args), **state_facts(self._trainer)})
        others = (hook for hook in self._trainer.hooks.named_hooks() if hook is not self)
        self.write("attributes", attribute_facts(others))

    def _end_step(self, args: PipelineHookArgs) -> None:
        if args.exception is not None:
            return
        self.write("facts", {"loss": value_text(args.loss)})
        if self._stop_after is not None and args.global_step_id + 1 >= self._stop_after:
            args.requests.stop("the proof of resuming stops here", by=NAME)


@dataclass(slots=True)
class RunRecord:
    """What one process has done of a run."""

    start: int
    """How many steps of the run were done when it began."""
    steps: dict[int, list[Entry]] = field(default_factory=dict)
    """What happened, in the order of time, by the step that was open or to come next."""
    attributes: dict[int, Facts] = field(default_factory=dict)
    """The plain attributes of hooks ahead of each step."""
    end: Facts | None = None
    """What the run was when the trainer had returned; None where it has not."""
    took_s: float = 0.0
    """How long the trainer ran, if it has returned."""

    @property
    def last(self) -> int:
        """The step that was open, or to come next, when it ended."""
        return max(self.steps, default=self.start)


def read_record(path: Path) -> RunRecord | None:
    """The record in a file, without a last line that was cut short; None where there is none."""
    lines = [*_lines(path)] if path.exists() else []
    if not lines:
        return None
    record = RunRecord(start=lines[0][0])
    for step, kind, value in lines:
        if kind in ("event", "facts"):
            record.steps.setdefault(step, []).append(value)
        elif kind == "attributes":
            record.attributes[step] = value
        elif kind == "end":
            record.steps.setdefault(step, [])
            record.end = value
        elif kind == "took_s":
            record.took_s = value
    return record


def _lines(path: Path) -> Iterator[tuple[int, str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                step, kind, value = json.loads(line)
                yield step, kind, value
