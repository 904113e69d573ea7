"""A run that is followed while its files change: position, curves, events and hooks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

from robo_orchard_lab.experiment.run_folder import CONFIG_FILE
from robo_orchard_lab.report.files import LineReader, Problems, items, mapping, read_object, text
from robo_orchard_lab.report.position import Position, read_position
from robo_orchard_lab.report.series import Metrics, Mode, downsample, guess_mode
from robo_orchard_lab.report.story import event_of, read_configuration

_MAX_EVENTS = 200
_MAX_POINTS = 8_000
"""Points of a curve in memory; of more, about half are kept, the extremes among them."""
_MAX_HOOKS = 2_000


class LiveRun:
    """A run whose files are read again where they changed.

    `update` reads what was added to metrics.jsonl and events.jsonl, and the small files. A folder
    that is gone leaves the last values; a folder that is back is read from the start.

    Args:
        folder: run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.resolve().name
        self.is_gone = False
        self.is_behind = False
        """True if the last update ended before the end of the metrics."""
        self.metrics = Metrics()
        self.events: deque[dict[str, Any]] = deque(maxlen=_MAX_EVENTS)
        self.hooks: dict[str, list[str]] = {}
        """Names of hooks by channel, the outermost first."""
        self.step_seconds: float | None = None
        """Time of a step, measured by a HookProfiler; None without one."""
        self.stage_shares: dict[str, float] = {}
        """Share of each stage in the time of the run, measured by a HookProfiler."""
        self.problems = Problems()
        self.position: Position = read_position(folder, folder / "metrics.jsonl", Problems())
        self._modes: dict[str, Mode] = {}
        self._stamps: dict[str, object] = {}
        self._metrics = LineReader(folder / "metrics.jsonl", follow=True)
        self._pending: Iterator[dict[str, Any]] | None = None
        self._events = LineReader(folder / "events.jsonl", follow=True)

    def update(self, seconds: float | None = None) -> None:
        """Read what changed; never fails.

        Args:
            seconds: time after which reading metrics stops until the next update.
        """
        if self._pending is None:
            self.problems = Problems()
        self.is_gone = not self.folder.is_dir()
        if self.is_gone:
            return
        self._read_small_files()
        self._read_events()
        self.is_behind = not self._read_metrics(None if seconds is None else monotonic() + seconds)
        self.position = read_position(self.folder, self._metrics.path, self.problems)

    def mode(self, name: str) -> Mode | None:
        """Return whether small or large values of a metric are good, or None."""
        return self._modes.get(name) or guess_mode(name)

    def _read_small_files(self) -> None:
        if self._is_changed(CONFIG_FILE):
            config = read_configuration(self.folder, self.problems)
            self.name = text(config.document.get("name"), limit=200) or self.folder.resolve().name
            self._modes = config.modes()
            path = config.metrics_file(self.folder)
            if path != self._metrics.path:
                self._metrics = LineReader(path, follow=True)
                self._pending, self.metrics = None, Metrics()
        if self._is_changed("profile.json"):
            profile = read_object(self.folder / "profile.json", self.problems)
            self.step_seconds = _finite(profile.get("step_seconds"))
            shares = {
                text(name, limit=40): _finite(mapping(stage).get("share"))
                for name, stage in mapping(profile.get("stages")).items()
            }
            self.stage_shares = {name: share for name, share in shares.items() if share}
        if self._is_changed("plan.json"):
            self.hooks = {}
            plan = read_object(self.folder / "plan.json", self.problems)
            for hook in map(mapping, items(plan.get("hooks"))[:_MAX_HOOKS]):
                names = self.hooks.setdefault(text(hook.get("channel"), "?", 60), [])
                name = text(hook.get("hook"), "?", 100)
                if name not in names:
                    names.append(name)

    def _is_changed(self, name: str) -> bool:
        try:
            found = (self.folder / name).stat()
            stamp: object = (found.st_mtime_ns, found.st_size, found.st_ino)
        except OSError:
            stamp = None
        is_changed = self._stamps.get(name, None) != stamp
        self._stamps[name] = stamp
        return is_changed

    def _read_events(self) -> None:
        found = [event_of(record) for record in self._events.read(self.problems)]
        if self._events.restarted:
            self.events.clear()
        self.events.extend(found)

    def _read_metrics(self, until: float | None) -> bool:
        """Read new records until a time; return True at the end of the file."""
        if self._pending is None:
            self._pending = self._metrics.read(self.problems)
        for number, record in enumerate(self._pending):
            self._restart()
            self.metrics.add(record)
            if number % 1000 == 999:
                self._thin_out()
                if until is not None and monotonic() > until:
                    return False
        self._pending = None
        self._restart()
        self._thin_out()
        return True

    def _restart(self) -> None:
        if self._metrics.restarted:
            self._metrics.restarted = False
            self.metrics = Metrics()

    def _thin_out(self) -> None:
        for curve in self.metrics.curves.values():
            if len(curve.steps) > _MAX_POINTS:
                kept = downsample(curve.values, _MAX_POINTS // 2)
                steps, values = curve.steps, curve.values
                curve.steps = steps[:0]
                curve.values = values[:0]
                curve.steps.extend(steps[i] for i in kept)
                curve.values.extend(values[i] for i in kept)


def _finite(value: Any) -> float | None:
    """Return a finite number that is not negative, or None."""
    is_number = type(value) in (int, float) and 0 <= value < 1e9
    return float(value) if is_number else None
