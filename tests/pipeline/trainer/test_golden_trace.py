"""The events of a run, compared line by line with the traces in ``golden/``.

A line is ``before|after channel epoch step global_step optimizer_step``, indented by nesting; an
after with an error ends with the error. After an intended change, rewrite the files with
``UPDATE_GOLDEN=1 pytest tests/pipeline/trainer/test_golden_trace.py`` and read the difference.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from robo_orchard_lab.pipeline import CHANNEL_NAMES, ChannelName, PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.hooks.mixin import HookContext, RemovableHandle
from tiny import make_loader, make_trainer

GOLDEN = Path(__file__).parent / "golden"
TRAINING_CHANNELS = [name for name in CHANNEL_NAMES if name != "on_evaluation"]


class Recorder(PipelineHooks):
    """Records every event as a line."""

    def __init__(self, name: str = "recorder") -> None:
        super().__init__(name)
        self.lines: list[str] = []
        self.depth = 0
        for channel in CHANNEL_NAMES:
            label = "" if name == "recorder" else f" ({name})"
            self.register_hook(channel, self.recording(channel, label))

    def recording(self, channel: ChannelName, label: str = "") -> HookContext[PipelineHookArgs]:
        def before(args: PipelineHookArgs) -> None:
            self.write(f"before {channel}{label}", args)
            self.depth += 1

        def after(args: PipelineHookArgs) -> None:
            self.depth -= 1
            error = f" {args.exception!r}" if args.exception else ""
            self.write(f"after {channel}{label}", args, error)

        return HookContext.from_callable(before, after)

    def write(self, event: str, args: PipelineHookArgs, rest: str = "") -> None:
        counters = (args.epoch_id, args.step_id, args.global_step_id, args.optimizer_step_id)
        self.lines.append("  " * self.depth + event + " " + " ".join(map(str, counters)) + rest)


def check(name: str, lines: list[str]) -> None:
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text("\n".join(lines) + "\n")
    assert lines == file.read_text().splitlines()


def test_plain() -> None:
    """Two epochs of two batches open every channel in the order of the timeline."""
    recorder = Recorder()
    make_trainer(recorder, loader=make_loader(2), max_epoch=2)()
    check("plain", recorder.lines)


def test_accumulation() -> None:
    """Seven batches in windows of three make three updates, the last one after one batch."""
    recorder = Recorder()
    make_trainer(recorder, accumulate=3, max_epoch=1)()
    check("accumulation", recorder.lines)


def test_max_step_in_the_middle_of_an_epoch() -> None:
    """The run ends after step 3 of 2 to an epoch, with the second epoch open."""
    recorder = Recorder()
    trainer = make_trainer(recorder, loader=make_loader(2), max_step=3)
    trainer()
    check("max_step", [*recorder.lines, repr(trainer.progress)])


@pytest.mark.parametrize("role", ["before", "after"])
@pytest.mark.parametrize("channel", TRAINING_CHANNELS)
def test_an_error_in_each_channel(channel: ChannelName, role: str) -> None:
    """An error in the second step (or the first epoch) closes every scope that was open."""

    def fail(args: PipelineHookArgs) -> None:
        if args.global_step_id == 1 or channel in ("on_loop", "on_epoch"):
            raise ValueError(f"{role} {channel}")

    failing = PipelineHooks("failing")
    failing.register_hook(
        channel,
        HookContext.from_callable(
            before=fail if role == "before" else None, after=fail if role == "after" else None
        ),
    )
    recorder = Recorder()
    inner = Recorder("inner")
    inner.lines = recorder.lines  # both write one trace, each with its own depth
    trainer = make_trainer([recorder, failing, inner], loader=make_loader(2), max_epoch=1)
    with pytest.raises(ValueError, match=f"^{role} {channel}") as raised:
        trainer()
    notes = raised.value.__notes__
    assert notes[0].startswith(f"raised in hook 'failing' ({channel}, {role}): function ")
    assert notes[-1] == f"the run was at {trainer.progress}"
    check(f"error_{role}_{channel}", [*recorder.lines, repr(trainer.progress)])


def test_hooks_added_and_removed_while_running() -> None:
    """An added hook runs from the channel's next entry, and a removed hook until its exit."""
    recorder = Recorder()
    handles: list[RemovableHandle] = []

    def change(args: PipelineHookArgs) -> None:
        if args.global_step_id == 1:
            added: list[ChannelName] = ["on_step", "on_batch", "on_epoch"]
            handles.extend(
                recorder.register_hook(channel, recorder.recording(channel, " (added)"))
                for channel in added
            )
        if args.global_step_id == 2:
            for handle in handles:
                handle.remove()

    changing = PipelineHooks("changing")
    changing.register_hook("on_step", HookContext.from_callable(before=change))
    make_trainer([recorder, changing], loader=make_loader(4), max_epoch=1)()
    check("added_and_removed", recorder.lines)
