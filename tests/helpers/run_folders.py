"""Run folders for tests of reports: recorded by a real run, or made of hostile files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from robo_orchard_lab.pipeline.hooks import (
    LossTrackerConfig,
    MetricsLoggerConfig,
    SaveCheckpointConfig,
    ValidationHookConfig,
)
from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig
from tiny import make_loader, make_trainer

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \u2028 \x1b[31m {0}"


def train(folder: Path, hooks: Mapping[str, Any] | None = None, **options: Any) -> None:
    """Train two epochs of seven steps in a run folder, with metrics, evaluations and saves."""
    all_hooks = {
        "log": MetricsLoggerConfig(
            every="1 step", sinks=[JsonLinesSinkConfig(path=str(folder / "metrics.jsonl"))]
        ),
        "losses": LossTrackerConfig(),
        "validation": ValidationHookConfig(every="1 epoch")(dataloaders={"val": make_loader(2)}),
        "checkpoint": SaveCheckpointConfig(every="1 epoch", keep_last=2),
        **(hooks or {}),
    }
    make_trainer(all_hooks, run_folder=folder, **{"max_epoch": 2, **options})()  # type: ignore[arg-type]  # a mapping is accepted


def record(step: int, **metrics: Any) -> str:
    """Return a line of a metrics file."""
    counters = {"epoch_id": 0, "global_step_id": step, "optimizer_step_id": step}
    return json.dumps({**counters, "metrics": metrics}) + "\n"


def write_metrics(folder: Path, lines: Iterable[str]) -> Path:
    """Write the metrics file of a run folder; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("w") as file:
        file.writelines(lines)
    return folder


class Page(HTMLParser):
    """Tags, attributes and embedded data of a page."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append((self.tags[-1][0] if self.tags else "", data))

    def text_of(self, tag: str) -> list[str]:
        """Return the text of all elements of a kind."""
        return [text for of, text in self.texts if of == tag and text.strip()]

    @property
    def data(self) -> dict[str, Any]:
        """The embedded data."""
        found: dict[str, Any] = json.loads(self.text_of("script")[0])
        return found
