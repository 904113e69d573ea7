"""Hook that saves and stops the run before a time limit; `duration_s` parses durations."""

from __future__ import annotations

import math
import os
import re
import subprocess
import time
from functools import partial
from typing import Annotated, Any, Literal, TypeAlias

import psutil  # type: ignore[import-untyped]  # accelerate brings it
from pydantic import BeforeValidator, Field, field_validator

from robo_orchard_core.utils.hook import RemovableHandle
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.hooks.preemption import request_stop, require_saver
from robo_orchard_lab.pipeline.job_log import job_logger

logger = job_logger(__name__)

_EARLY_S = 0.5  # several ranks may stop this early, which saves exchanges near the end
_LONGEST_WAIT_S = 30.0  # between exchanges; steps may become slower


_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_UNITS = re.compile(
    r"(?:(?P<d>[\d.]+)\s*(?:d|days?))?\s*(?:(?P<h>[\d.]+)\s*(?:h|hours?))?\s*"
    r"(?:(?P<m>[\d.]+)\s*(?:m|min|minutes?))?\s*(?:(?P<s>[\d.]+)\s*(?:s|sec|seconds?))?"
)
_CLOCK = re.compile(r"(?:(?P<d>\d+)-(?=\d+:\d+:))?(?:(?P<h>\d+):)?(?P<m>\d+):(?P<s>\d+)")


def duration_s(value: Any) -> float:
    """Return a duration in seconds, given as a number of seconds or as text.

    >>> duration_s("3h30min"), duration_s("1 d 2 h"), duration_s("90 s"), duration_s(2.5)
    (12600.0, 93600.0, 90.0, 2.5)
    >>> duration_s("1-02:00:00"), duration_s("1:30:00"), duration_s("05:00")  # as in SLURM
    (93600.0, 5400.0, 300.0)

    Raises:
        ValueError: the value is of another type or format, not finite, or negative.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected seconds or a text such as '3h30min', got {value!r:.60}")
    text = str(value).strip().lower()
    found = _CLOCK.fullmatch(text) or _UNITS.fullmatch(text)
    parts = found.groupdict(default="0") if found and any(found.groups()) else {"s": text}
    try:
        seconds = sum(float(count) * _SECONDS[unit] for unit, count in parts.items())
    except ValueError:
        raise ValueError(
            f"can't read {value!r:.60} as a length of time; write '3h30min', '90 s', '1:30:00' or "
            "a number of seconds"
        ) from None
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"expected a finite length of time >= 0, got {value!r:.60}")
    return seconds


DurationField: TypeAlias = Annotated[float | str, BeforeValidator(duration_s)]
"""Annotation of a config field that accepts seconds or a text, and holds seconds."""


class TimeLimit(PipelineHooks):
    """Checkpoint and stop before a limit of wall-clock time.

    At the first commit point with less than ``margin`` left, a checkpoint is saved, and the trainer
    raises :class:`RunPreempted`, which exits the process with ``exit_code``: by default 75
    (``EX_TEMPFAIL``, "try again"). Start the script again to resume.
    docs/how_to/resume.md states what the margin must cover.

    The limit counts from the start of the process, loading included. ``limit="slurm"`` uses the end
    of the SLURM job: ``SLURM_JOB_END_TIME`` if set, otherwise the time left according to ``squeue``
    when the loop begins. A job without a limit is not stopped.

    - Ranks: all, by the clock of the first rank (:class:`Agreement`).
    - Requests: a checkpoint and a stop.
    - State: none.

    Raises:
        PipelineConfigError: ``limit="slurm"`` outside of a SLURM job, or its end is unknown, when
            the loop begins; no hook saves checkpoints, when the first epoch begins.
    """

    keeps_trajectory = True
    reads = ()
    changes = ()
    requests = ("stop",)

    def __init__(self, cfg: TimeLimitConfig) -> None:
        super().__init__()
        self.cfg = cfg
        if cfg.save_checkpoint:
            self.declare_effects(requests=["save"])
        self._limit_s = None if cfg.limit == "slurm" else duration_s(cfg.limit)
        self._margin_s = duration_s(cfg.margin)
        self._end_at = float("inf")  # Unix time
        self._is_stopping = False
        self.register_for_loop(self._begin)
        if cfg.save_checkpoint:
            self.on_epoch.before(lambda args: require_saver(args, self.name))

    def _begin(self, args: PipelineHookArgs) -> RemovableHandle:
        self._is_stopping = False
        topic = args.run.agreement.topic(
            self.name,
            find=lambda: self._left_s() <= (_EARLY_S if args.run.agreement.several else 0.0),
            tell=partial(self._stop, args),
            whose="first",
            wait_s=self._wait_s,
        )
        if not args.accelerator.is_main_process:
            return topic  # the first rank's clock counts
        if self._limit_s is None:
            self._end_at = slurm_job_end(self.name)
        else:
            self._end_at = psutil.Process().create_time() + self._limit_s
        left_s = self._end_at - time.time()
        logger.info(
            "%s: %.0f s left, %g s of these for saving", self.name, max(0, left_s), self._margin_s
        )
        return topic

    def _left_s(self) -> float:
        return self._end_at - self._margin_s - time.time()

    def _wait_s(self) -> float:
        # Steps may become slower, so check more often near the end.
        left_s = self._left_s()
        return min(left_s / 2, _LONGEST_WAIT_S) if left_s > 10 * _LONGEST_WAIT_S else 0.0

    def _stop(self, args: PipelineHookArgs, due: int) -> None:
        """Request the stop, on all ranks, when the first rank's clock is due."""
        if not self._is_stopping:
            self._is_stopping = True
            cfg, limit_s = self.cfg, self._limit_s
            limit = "SLURM's limit" if limit_s is None else f"the limit of {limit_s:g} s"
            reason = f"{limit} is near, with {self._margin_s:g} s reserved for saving"
            request_stop(args, reason, self.name, exit_code=cfg.exit_code, save=cfg.save_checkpoint)


class TimeLimitConfig(PipelineHooksConfig[TimeLimit]):
    """Time limit, margin, exit code, and saving.

    >>> TimeLimitConfig(limit="3h30min", margin="5 min").limit
    12600.0
    """

    class_type: type[TimeLimit] = TimeLimit
    limit: Literal["slurm"] | float | str = Field(
        description="Time from the start of the process, in seconds or as text such as "
        "'3h30min'; 'slurm' for the limit of the SLURM job."
    )
    margin: DurationField = Field(
        default=120.0, description="Time reserved for saving, in seconds or as text."
    )
    exit_code: int | None = Field(
        default=75,
        ge=0,
        le=255,
        description="Exit code of the process; None ends the run as completed.",
    )
    save_checkpoint: bool = Field(
        default=True, description="Save a checkpoint before the exit, by the hooks that save."
    )

    @field_validator("limit", mode="before")
    @classmethod
    def _is_duration(cls, limit: Any) -> Any:
        return limit if limit == "slurm" else duration_s(limit)

    def __post_init__(self) -> None:
        if self.limit != "slurm" and duration_s(self.limit) <= duration_s(self.margin):
            raise ValueError(
                f"expected margin < limit, got a margin of {self.margin} s and a limit of "
                f"{self.limit} s; set a smaller margin"
            )


def slurm_job_end(who: str) -> float:
    """Return the Unix time at which this SLURM job ends; infinity without a limit."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        raise PipelineConfigError(
            f"{who}: limit='slurm' outside of a SLURM job (SLURM_JOB_ID is not set); set a time, "
            "such as '3h30min'"
        )
    end_at = os.environ.get("SLURM_JOB_END_TIME", "")
    if end_at.isdecimal():
        return float(end_at)
    try:
        command = ["squeue", "--noheader", "--format=%L", f"--jobs={job}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        left = done.stdout.split("\n")[0].strip()
        return float("inf") if left == "UNLIMITED" else time.time() + duration_s(left)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise PipelineConfigError(
            f"{who}: can't find the end of SLURM job {job}: SLURM_JOB_END_TIME is not set, and "
            f"squeue failed: {error}; set a time, such as '3h30min'"
        ) from error
