"""Picture of a run in a terminal: stage, progress, curves, events and hooks, drawn by rich."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from robo_orchard_core.utils.logging import one_line
from robo_orchard_lab.cli.output import age_text, count_text, duration_text
from robo_orchard_lab.report.live import LiveRun
from robo_orchard_lab.report.position import age_s
from robo_orchard_lab.report.series import Curve, downsample

_SNAPSHOT_ROWS = 40
_MIN_CHART_COLUMNS, _MIN_CHART_ROWS, _MAX_CHART_ROWS = 36, 5, 14
_MAX_EVENTS = 8
_LABEL = 9  # columns of the labels of the vertical axis
_GAP = 2
_QUIET_S = 30.0  # an older sign of life is shown
_STYLES = {"completed": "green", "stopped": "green", "failed": "red", "preempted": "yellow"}
_EVENT_STYLES = {"error": "red", "warning": "yellow", "skipped update": "yellow", "save": "green"}
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille cell
_MINOR = ("lr", "grad_norm", "perf")  # groups after the losses and evaluations


class LiveView:
    """Picture of a run that fills the width, and the screen if it is live.

    Args:
        run: the run, updated by the caller.
        metrics: words that names of the shown metrics contain; by default all metrics, the losses
            first.
        is_live: fill the height of the screen; otherwise at most 40 lines.
    """

    def __init__(self, run: LiveRun, metrics: Sequence[str] = (), *, is_live: bool = False) -> None:
        self._run = run
        self._metrics = metrics
        self._is_live = is_live

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(10, options.max_width)
        rows = console.size.height if self._is_live else _SNAPSHOT_ROWS
        head = [*self._head(width, is_ascii=options.ascii_only), *self._costs(), *self._outcome()]
        events = self._events(max(2, min(_MAX_EVENTS, rows // 5)) if rows >= 14 else 0)
        hooks = self._hooks(rows // 4 if rows >= 30 else 1) if rows >= 18 else []
        room = rows - len(head) - len(events) - len(hooks)
        charts = self._charts(width, room, is_ascii=options.ascii_only)
        for line in [*head, *charts, *events, *hooks][:rows]:
            line.truncate(width, overflow="crop" if options.ascii_only else "ellipsis")
            yield line

    def _head(self, width: int, *, is_ascii: bool) -> list[Text]:
        run, now = self._run, self._run.position
        state = now.verdict["state"]
        if run.is_gone:
            state = "the run folder is gone"
        elif now.is_running and now.stage:
            state = f"{now.stage} {now.detail}".strip()
        stage = Text(one_line(state), _STYLES.get(now.verdict["state"], "cyan"))
        age = age_s(now.since)
        if now.is_running and now.stage != "training" and age is not None and now.host is None:
            stage.append(f" for {duration_text(age)}", "dim")
        if now.is_running and now.host is not None:
            stage.append(f" on {one_line(now.host)}", "dim")
        title = Text(one_line(run.name), "bold")
        title.truncate(max(8, width - stage.cell_len - _GAP), overflow="ellipsis")
        title.append(" " * max(_GAP, width - title.cell_len - stage.cell_len))
        return [
            title.append_text(stage),
            self._counters(),
            self._bar(width, "=-" if is_ascii else "━─"),
        ]

    def _counters(self) -> Text:
        now = self._run.position
        parts = []
        if now.epochs is not None:
            # The epoch in progress counts from 1; an ended run shows its completed epochs.
            epoch = now.epochs + (now.is_running and now.epochs != now.max_epoch)
            parts.append(f"epoch {epoch:,}" + (f"/{now.max_epoch:,}" if now.max_epoch else ""))
        if now.steps is not None:
            of = f"/{now.total_steps:,}" if now.total_steps else ""
            parts.append(f"step {now.steps:,}{of}")
            if now.total_steps:
                parts.append(f"{100 * min(now.steps, now.total_steps) // now.total_steps} %")
        age = age_s(now.at)
        if now.seconds_left is not None:
            # Of another machine, the clock may differ.
            passed = age or 0.0 if now.host is None else 0.0
            parts.append(f"ETA {duration_text(max(0.0, now.seconds_left - passed))}")
        if age is not None and (age > _QUIET_S or not now.is_running):
            parts.append(f"last update {age_text(age)}")
        if self._run.is_behind:
            parts.append("reading metrics ...")
        return Text("  ".join(parts) or "no step yet")

    def _bar(self, width: int, marks: str) -> Text:
        now = self._run.position
        style = _STYLES.get(now.verdict["state"], "cyan")
        done = 0
        if now.verdict["state"] == "completed":
            done = width
        elif now.total_steps and now.steps is not None:
            done = min(width, width * now.steps // now.total_steps)
        return Text(marks[0] * done, style).append(marks[1] * (width - done), "dim")

    def _costs(self) -> list[Text]:
        """Return time of a step and the largest shares of stages, of a run with a profiler."""
        run = self._run
        if run.step_seconds is None:
            return []
        largest = sorted(run.stage_shares.items(), key=lambda item: -item[1])[:5]
        shares = [f"{one_line(name)} {100 * share:.0f} %" for name, share in largest]
        return [Text("  ".join([f"{1000 * run.step_seconds:.4g} ms a step", *shares]), "dim")]

    def _outcome(self) -> list[Text]:
        verdict, lines = self._run.position.verdict, []
        if error := verdict["error"]:
            lines.append(Text(one_line(f"{error['type']}: {error['message']}"), "red"))
            if error["hook"]:
                lines.append(Text(one_line(f"in hook {error['hook']}"), "red"))
        elif verdict["reason"]:
            by = f"{verdict['by']}: " if verdict["by"] else ""
            lines.append(Text(one_line(f"{by}{verdict['reason']}"), "yellow"))
        lines += [Text(one_line(problem), "yellow") for problem in self._run.problems[:2]]
        return lines

    def _charts(self, width: int, room: int, *, is_ascii: bool) -> list[Text]:
        """Draw as many curves as fit, in a grid; the axis below is the same for all."""
        names = self._shown_names()
        if not names or room < _MIN_CHART_ROWS + 1:
            known = [*self._run.metrics.curves]
            text = "no metrics yet"
            if known and not names:
                words = ", ".join(self._metrics)
                text = f"no metric contains {words}; there are {', '.join(known)}"
            return [Text(one_line(text), "dim")] if room > 0 and not names else []
        columns = min(len(names), max(1, (width + _GAP) // (_MIN_CHART_COLUMNS + _GAP)), 3)
        rows = min(-(-len(names) // columns), max(1, (room - 1) // _MIN_CHART_ROWS))
        height = min(_MAX_CHART_ROWS, (room - 1) // rows)
        across = (width - _GAP * (columns - 1)) // columns
        shown = names[: rows * columns]
        steps = [step for name in shown for step in self._range(name)]
        low, high = min(steps), max(steps)
        found: list[Text] = []
        for at in range(0, len(shown), columns):
            cells = [
                self._chart(name, (low, high), across, height, is_ascii=is_ascii)
                for name in shown[at : at + columns]
            ]
            gap = Text(" " * _GAP)
            found += [gap.join(parts) for parts in zip(*cells, strict=True)]
        axis = f"steps {low:,} to {high:,}"
        if len(shown) < len(names):
            axis += f"; {count_text(len(names) - len(shown), 'more metric')}: --metric WORD"
        return [*found, Text(axis, "dim")]

    def _shown_names(self) -> list[str]:
        words = self._metrics

        def rank(name: str) -> tuple[int, str]:
            group = name.partition("/")[0]
            if "loss" in name:
                return (group != "loss") + 0, name
            return (3 + _MINOR.index(group) if group in _MINOR else 2), name

        known = self._run.metrics.curves
        return sorted((n for n in known if not words or any(w in n for w in words)), key=rank)

    def _range(self, name: str) -> tuple[int, int]:
        steps = self._run.metrics.curves[name].steps
        return min(steps[0], steps[-1]), max(steps[0], steps[-1])

    def _chart(
        self, name: str, steps: tuple[int, int], width: int, height: int, *, is_ascii: bool
    ) -> list[Text]:
        curve, mode = self._run.metrics.curves[name], self._run.mode(name)
        shown = one_line(name)
        values = Text(_number(curve.values[-1]), "bold")
        lost = sum(not math.isfinite(value) for value in curve.values)
        if lost:
            values.append(f", {lost:,} not finite", "red")
        best = curve.best(mode) if mode is not None and name.startswith("eval/") else None
        if best is not None:
            text = f", best {_number(best[1])} at {best[0]:,}"
            if cell_len(shown) + 1 + values.cell_len + len(text) <= width:
                values.append(text, "green")
        values.truncate(max(6, width - 10), overflow="ellipsis")
        title = Text(set_cell_size(shown, max(1, width - values.cell_len - 1)) + " ")
        lines = [title.append_text(values)]
        finite = [value for value in curve.values if math.isfinite(value)]
        drawn = draw_curve(curve, steps, width - _LABEL - 1, height - 1)
        for row, cells in enumerate(drawn):
            label = ""
            if finite and row in (0, len(drawn) - 1):
                label = _number(min(finite) if row else max(finite))
            text = "".join(" " if cell == " " else "*" for cell in cells) if is_ascii else cells
            line = Text(f"{label:>{_LABEL}}" + ("|" if is_ascii else "│"), "dim")
            lines.append(line.append(text, "cyan"))
        return lines

    def _events(self, count: int) -> list[Text]:
        found = [*self._run.events][-count:] if count else []
        if not found:
            return []
        lines = [Text("events (time in UTC)", "bold")]
        for event in found:
            step = "" if event["step"] is None else f"{event['step']:,}"
            time = (event["at"] or "")[11:19]
            line = Text(f"{step:>10}  {time:8}  ")
            kind = one_line(event["event"])
            line.append(set_cell_size(kind, 14), _EVENT_STYLES.get(event["event"], "cyan"))
            lines.append(line.append(f"  {one_line(event['text'])}"))
        return lines

    def _hooks(self, count: int) -> list[Text]:
        """List the hooks by channel, or, with one row, their names."""
        channels = self._run.hooks
        if not channels:
            return []
        if count < len(channels) + 1:
            names = dict.fromkeys(name for of in channels.values() for name in of)
            return [_named("hooks", names, 0)]
        width = max(map(len, channels))
        return [Text("hooks", "bold"), *(_named(c, of, width) for c, of in channels.items())]


def _named(label: str, names: Iterable[str], width: int) -> Text:
    text = Text(f"{one_line(label):{width}}  ", "bold" if not width else "dim")
    return text.append(one_line(" > ".join(names)), "not bold")


def draw_curve(curve: Curve, steps: tuple[int, int], width: int, height: int) -> list[str]:
    """Return a curve as lines of braille, the largest value on top.

    Args:
        curve: the curve; non-finite values interrupt its line.
        steps: first and last step of the horizontal axis.
        width: number of characters of a line.
        height: number of lines.
    """
    width, height = max(1, width), max(1, height)
    cells = [[0] * width for _ in range(height)]
    columns, rows = 2 * width - 1, 4 * height - 1
    finite = [value for value in curve.values if math.isfinite(value)]
    if finite:
        # Halves, since the difference of two floats may overflow.
        low, high = min(finite) / 2, max(finite) / 2
        span, first, length = high - low, steps[0], max(1, steps[1] - steps[0])
        before: tuple[int, int] | None = None
        for at in downsample(curve.values, 4 * width):
            step, value = curve.steps[at], curve.values[at]
            if not math.isfinite(value):
                before = None
                continue
            x = round(columns * (step - first) / length)
            y = round(rows * ((high - value / 2) / span)) if span else rows // 2
            for dot_x, dot_y in _line(before or (x, y), (x, y)):
                if 0 <= dot_x <= columns:
                    cells[dot_y // 4][dot_x // 2] |= _DOTS[dot_y % 4][dot_x % 2]
            before = x, y
    return ["".join(chr(0x2800 + cell) if cell else " " for cell in row) for row in cells]


def _line(start: tuple[int, int], end: tuple[int, int]) -> Iterable[tuple[int, int]]:
    (x0, y0), (x1, y1) = start, end
    count = max(abs(x1 - x0), abs(y1 - y0), 1)
    for i in range(count + 1):
        yield round(x0 + (x1 - x0) * i / count), round(y0 + (y1 - y0) * i / count)


def _number(value: Any) -> str:
    """Format a value in at most 9 characters.

    >>> [_number(value) for value in (0.123456, 12345.6, 1e-7, float("nan"))]
    ['0.1235', '12346', '1e-07', 'nan']
    """
    text = f"{value:.4g}"
    return text if "e" not in text or abs(value) < 1 or abs(value) >= 1e7 else f"{value:.0f}"
