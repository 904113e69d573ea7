"""Position of a run: state, stage, counters and remaining time, from a few small files."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from robo_orchard_core.utils.process_identity import ProcessIdentity
from robo_orchard_lab.experiment.run_folder import RUN_STATE
from robo_orchard_lab.report.files import (
    Problems,
    mapping,
    open_regular,
    parse_json,
    read_bytes,
    read_object,
    text,
    utc_time,
    whole,
)
from robo_orchard_lab.report.story import read_verdict

STAGE_FILE = "stage.json"
_TAIL_BYTES = 1 << 16
_MAX_SECONDS = 3600 * 24 * 366 * 10


@dataclass(frozen=True, slots=True)
class Position:
    """State, stage and counters of a run at one time.

    Attributes:
        verdict: outcome, see `read_verdict`.
        stage: ``starting``, ``training``, ``evaluating`` or ``saving``; "" for a run that ended.
        detail: name of the evaluation; else "".
        since: begin of the stage, in ISO format.
        steps: number of completed steps.
        epochs: number of completed epochs.
        total_steps: steps of the complete run; None if unknown.
        seconds_left: remaining time at ``at``, by the mean pace of this start; None if unknown.
        at: last sign of life, in ISO format.
        host: name of the machine; None if it is this one, or unknown.
    """

    verdict: dict[str, Any]
    stage: str
    detail: str
    since: str | None
    steps: int | None
    epochs: int | None
    total_steps: int | None
    max_epoch: int | None
    seconds_left: float | None
    at: str | None
    host: str | None

    @property
    def is_running(self) -> bool:
        """Return True for a run in progress, as far as known."""
        return bool(self.verdict["state"] == "running")


def read_position(folder: Path, metrics_file: Path, problems: Problems) -> Position:
    """Read the position of a run; never fails."""
    state = read_object(folder / RUN_STATE, problems)
    verdict = read_verdict(folder, state)
    stage = _read_stage(folder)  # also of a killed process
    is_running = verdict["state"] == "running"
    last = last_record(metrics_file)
    # A run state is written at saves alone.
    counters = [
        (whole(found.get(step)), whole(found.get(epoch)))
        for found, step, epoch in (
            (verdict, "steps", "epochs"),
            (stage, "step", "epoch"),
            (last, "global_step_id", "epoch_id"),
        )
    ]
    known = [counter for counter in counters if counter[0] is not None]
    steps, epochs = max(known, key=lambda counter: counter[0] or 0, default=(None, None))
    done, total = whole(stage.get("step")), whole(stage.get("total_steps"))
    return Position(
        verdict=verdict,
        stage=text(stage.get("stage"), limit=40) if is_running else "",
        detail=text(stage.get("detail"), limit=200) if is_running else "",
        since=utc_time(stage.get("since")),
        steps=steps,
        epochs=epochs,
        total_steps=total,
        max_epoch=whole(stage.get("max_epoch")),
        seconds_left=_seconds_left(stage, done, total) if is_running else None,
        at=max(filter(None, (verdict["updated_at"], utc_time(stage.get("at")))), default=None),
        host=_other_host(state) if is_running else None,
    )


def last_record(metrics_file: Path) -> dict[str, Any]:
    """Return the last complete record at the end of a metrics file, or an empty one."""
    with suppress(OSError, ValueError):
        with open(open_regular(metrics_file), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read(_TAIL_BYTES).split(b"\n")
        for line in reversed(lines[:-1]):
            with suppress(ValueError):
                return mapping(parse_json(line))
    return {}


def age_s(at: str | None) -> float | None:
    """Return the age of a time in seconds, by the clock of this machine."""
    if at is None:
        return None
    return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds())


def _read_stage(folder: Path) -> dict[str, Any]:
    """Read stage.json; a file that is torn by a write is read once more."""
    for _ in range(2):
        data = read_bytes(folder / STAGE_FILE, Problems(), 4096)
        if data is None:
            break
        with suppress(ValueError):
            return mapping(parse_json(data))
    return {}


def _seconds_left(stage: dict[str, Any], done: int | None, total: int | None) -> float | None:
    seconds, first = stage.get("loop_seconds"), whole(stage.get("first_step"))
    if done is None or total is None or first is None or not isinstance(seconds, int | float):
        return None
    if done <= first or not 0 <= seconds < _MAX_SECONDS:
        return None
    left = (total - done) * seconds / (done - first)
    return left if 0 <= left < _MAX_SECONDS else None


def _other_host(state: dict[str, Any]) -> str | None:
    with suppress(ValueError, TypeError):
        process = ProcessIdentity.model_validate(state.get("process"))
        return None if process.is_here() else text(process.host, limit=100)
    return None
