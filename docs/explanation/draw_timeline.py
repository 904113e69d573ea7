"""Draw docs/explanation/timeline.svg from the events of a real run.

    python docs/explanation/draw_timeline.py

A hook in every channel records when it enters and exits. One event is one unit of the time axis.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from torch.utils.data import DataLoader, TensorDataset

from robo_orchard_lab.pipeline import (
    CHANNEL_NAMES,
    ChannelName,
    HookBasedTrainer,
    PipelineHookArgs,
    PipelineHooks,
    SimpleBatchProcessor,
)
from robo_orchard_lab.pipeline.hooks import SaveCheckpointConfig, ValidationHookConfig
from robo_orchard_lab.pipeline.hooks.mixin import HookContext

GREY, BLUE, ORANGE, GREEN = "#808080", "#4c78a8", "#e07b18", "#3f9a5f"


class EventRecorder(PipelineHooks):
    """Records the entry and the exit of every channel, in order.

    ``OptimizerHook`` is outside of this hook, and opens ``on_optimizer_step`` when it exits
    ``on_step``. So a step ends when the next channel enters or exits, and a commit point follows.
    """

    def __init__(self) -> None:
        super().__init__("events")
        self.count = 0
        self.spans: list[tuple[str, int, int]] = []
        self.commit_points: list[int] = []
        self.step_begin = 0  # of a step that this hook has left
        for channel in CHANNEL_NAMES:
            self.register_hook(channel, self._record(channel))

    def _tick(self) -> int:
        self.count += 1
        return self.count

    def _end_step(self) -> None:
        if self.step_begin:
            self.spans.append(("on_step", self.step_begin, self._tick()))
            self.commit_points.append(self._tick())
            self.step_begin = 0

    def _record(self, channel: ChannelName) -> HookContext[PipelineHookArgs]:
        begin = 0

        def before(args: PipelineHookArgs) -> None:
            nonlocal begin
            if channel != "on_optimizer_step":
                self._end_step()
            begin = self._tick()

        def after(args: PipelineHookArgs) -> None:
            if channel == "on_step":
                self.step_begin = begin
                return
            if channel != "on_optimizer_step":
                self._end_step()
            self.spans.append((channel, begin, self._tick()))
            if channel == "on_epoch":
                self.commit_points.append(self._tick())

        return HookContext.from_callable(before, after)


def loss_of(model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = batch
    outputs = model(inputs)
    return outputs, torch.nn.functional.mse_loss(outputs, targets)


def record(folder: Path) -> tuple[EventRecorder, list[int]]:
    """Train two epochs of four steps with accumulation over two; return events and saved steps."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(8, 4), torch.randn(8, 2))
    model = torch.nn.Linear(4, 2)
    events = EventRecorder()
    HookBasedTrainer(
        Accelerator(cpu=True, gradient_accumulation_steps=2),
        model,
        DataLoader(data, batch_size=2),
        SimpleBatchProcessor.from_callable(loss_of),
        torch.optim.SGD(model.parameters(), lr=0.1),
        hooks=[
            ValidationHookConfig(every="1 epoch")(
                dataloaders={"val": DataLoader(data, batch_size=8)}
            ),
            SaveCheckpointConfig(every="1 epoch"),
            events,
        ],
        max_epoch=2,
        run_folder=folder,
    )()
    saved = [int(path.name.split("_")[1]) for path in folder.glob("checkpoints/step_*")]
    return events, sorted(saved)


def draw(events: EventRecorder, saved: list[int], path: Path) -> None:
    rows: dict[str, int] = {name: -row for row, name in enumerate(CHANNEL_NAMES)}
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "timeline", "font.size": 9})
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    for channel, begin, end in events.spans:
        color = {"on_optimizer_step": ORANGE, "on_evaluation": GREEN}.get(channel, BLUE)
        axes.broken_barh(
            [(begin, end - begin)], (rows[channel] - 0.36, 0.72), color=color, alpha=0.55
        )
    axes.vlines(events.commit_points, -len(rows) + 0.6, 0.5, color=GREY, lw=0.7, ls=":")
    axes.set_yticks(list(rows.values()), list(rows), family="monospace")
    axes.set_xticks([])
    axes.tick_params(colors=GREY, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    steps = ", ".join(map(str, saved))
    axes.set_xlabel(
        f"time, in events; dotted: commit points; checkpoints after steps {steps}", color=GREY
    )
    figure.savefig(path, transparent=True, metadata={"Date": None})


def main(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        draw(*record(Path(folder)), path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).with_name("timeline.svg"))
