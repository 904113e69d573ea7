"""Save the run on a schedule, so that it can't be lost."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import Field, model_validator

from robo_orchard_core.utils.hook import HookContext, RemovableHandle
from robo_orchard_lab.pipeline.checkpoint import (
    CheckpointInfo,
    CheckpointStore,
    DigestName,
    Ranks,
    Retention,
)
from robo_orchard_lab.pipeline.context import PipelineHookArgs, PipelineRun
from robo_orchard_lab.pipeline.errors import (
    CheckpointError,
    PipelineConfigError,
    RunPreempted,
    check_state_version,
)
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.hooks.best_value import Mode
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.metrics import MetricValue, number_text
from robo_orchard_lab.pipeline.requests import Request
from robo_orchard_lab.pipeline.run.run_path import RunPath
from robo_orchard_lab.pipeline.trigger import TriggerField

# --- background ------------------------------------------------------------------------------
# One piece of work beside the training.


ResultT = TypeVar("ResultT")


class Background(Generic[ResultT]):
    """Runs one function at a time in a thread; its result, or its error, waits to be collected.

    >>> background = Background("adding")
    >>> background.start(lambda: 1 + 1)
    >>> background.collect()
    2

    The thread does not keep the process alive: collect what must not be lost.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._thread: threading.Thread | None = None
        self._result: ResultT | None = None
        self._error: Exception | None = None

    @property
    def busy(self) -> bool:
        """Whether the function that was started last is still running."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def done(self) -> bool:
        """Whether there is something to collect without waiting."""
        return self._thread is not None and not self._thread.is_alive()

    def start(self, work: Callable[[], ResultT]) -> None:
        """Begin; what was started before must be collected."""
        assert self._thread is None

        def run() -> None:
            try:
                self._result = work()
            except Exception as error:
                self._error = error

        self._thread = threading.Thread(target=run, name=self.name, daemon=True)
        self._thread.start()

    def collect(self) -> ResultT | None:
        """Wait for its end: the result, or its error raised; None if nothing was started."""
        thread, self._thread = self._thread, None
        if thread is None:
            return None
        thread.join()
        result, self._result = self._result, None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return result


logger = job_logger(__name__)

STATE_VERSION = 1
CHECKPOINTS_FOLDER = "checkpoints"
"""Where checkpoints go in the folder of a run."""


class SaveCheckpoint(PipelineHooks):
    """Writes all that a run needs to go on bit for bit, at commit points.

    It does so by its schedule, at the end of the run, and when any hook asks by
    ``args.requests.save(...)``; however many reasons meet at a commit point, there is one save.
    Resume with ``HookBasedTrainer(..., resume_from="auto")``.

    A checkpoint is a folder ``step_00001234`` of safetensors and JSON, which appears when all of
    it is on the disk; ``last`` and ``best`` are links to the newest and to the best. Older ones go
    when the new one is there, but for those that are to be kept; those that a killed run has left
    go when ``"auto"`` has resumed, also where nothing is left to do.

    With ``monitor`` a save is also asked for whenever the metric is among the ``keep_best`` best
    so far, so that the best weights are kept whatever the schedules of saving and evaluating.

    In the background, a step waits only while tensors are copied to memory that is kept for it,
    about the size of a checkpoint; the rest runs beside the training. What fails there is told at
    the next commit point, with several processes after the next exchange (:class:`Agreement`), and
    the end of the run and a preemption wait for it; one that stops at once, by a second signal,
    does not.

    Runs on every rank: each writes what it has for itself, the first one the rest and the commit.
    If any rank fails, there is no new checkpoint, and the older ones stay.

    Raises:
        PipelineConfigError: when the run begins, neither ``folder`` nor the trainer's
            ``run_folder`` is given.
        StoreLockedError: when the run begins, another run saves into the same folder.
        CheckpointError: a save has failed: at once with ``on_failure="stop"``, else at the end of
            the run if it was the last one.
        StateError: a state holds something that can't be saved; the message names it.
    """

    keeps_trajectory = True

    def __init__(self, cfg: SaveCheckpointConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self._store: CheckpointStore | None = None
        self._run: PipelineRun | None = None
        self._subscription: RemovableHandle | None = None
        self._background = Background[CheckpointInfo]("save-checkpoint")
        self._newest: dict[str, Any] | None = None  # the counters at the last save that was begun
        self._best: list[float] = []  # the best values so far, the best one first
        self._failure: CheckpointError | None = None  # of the last save, if that has failed
        self.register_hook(
            "on_loop", HookContext.from_callable(before=self._begin, after=self._end)
        )
        if cfg.every is not None:
            self.register_at_commit(self._ask, cfg.every)

    def root(self, run_folder: Path | None) -> Path:
        """Where the checkpoints are, in a run of that folder.

        Raises:
            PipelineConfigError: there is no folder for them.
        """
        if self.cfg.folder is not None:
            return self.cfg.folder
        if run_folder is not None:
            return run_folder / CHECKPOINTS_FOLDER
        raise PipelineConfigError(
            f"{self.name}.folder: there is no folder for checkpoints; give one, or give the "
            "trainer a run_folder"
        )

    def store(self, run_folder: Path | None, ranks: Ranks) -> CheckpointStore:
        """The checkpoints of a run of that folder, of which those stay that are to be kept.

        Raises:
            PipelineConfigError: there is no folder for them.
        """
        cfg = self.cfg
        return CheckpointStore(
            self.root(run_folder),
            digest=cfg.digest,
            retention=Retention(
                keep_last=cfg.keep_last,
                keep_every=cfg.keep_every,
                keep_best=cfg.keep_best,
                monitor=cfg.monitor,
                mode=cfg.mode or "min",  # given wherever there is a metric
            ),
            ranks=ranks,
        )

    def _begin(self, args: PipelineHookArgs) -> None:
        cfg, run = self.cfg, args.run
        several = args.accelerator.num_processes > 1
        ranks = Ranks.of_job(in_background=cfg.in_background) if several else Ranks.alone()
        self._store = self.store(run.folder, ranks)
        self._store.open()
        self._run = run
        run.savers[self.name] = self._save
        if cfg.in_background:  # what it did is told, and how it failed, when it is over
            run.agreement.topic(
                self.name,
                find=lambda: self._background.done,
                tell=lambda done: run.requests.write(
                    self._collect, "a save in the background is over", by=self.name
                ),
                whose="all",
            )
        if cfg.monitor is not None:
            self._subscription = args.metrics.subscribe(cfg.monitor, self._judge, who=self.name)

    def _end(self, args: PipelineHookArgs) -> None:
        args.run.savers.pop(self.name, None)
        if self._subscription is not None:
            self._subscription.remove()
            self._subscription = None
        store, self._store = self._store, None
        if store is None:
            return
        if isinstance(args.exception, RunPreempted) and self._background.busy:
            # Whoever stops at once, by a second signal, does not wait for what it leaves behind;
            # should the process go on, the folder is free when that is done.
            self._background = Background(self._background.name)
            threading.Thread(target=store.close, name="close-store", daemon=True).start()
            return
        try:
            self._collect(at_the_end=True)
        finally:
            store.close()
            store.ranks.close()
        if self._failure is not None:
            args.run.failures.append(self._failure)
            self._failure = None

    def _ask(self, args: PipelineHookArgs) -> None:
        args.requests.save(f"every {self.cfg.every}", by=self.name, name=self.name)

    def _judge(self, found: MetricValue) -> None:
        """Ask for a save if the value is one of the best so far."""
        if not math.isfinite(found.value):
            return
        sign = 1.0 if self.cfg.mode == "min" else -1.0
        ranked = sorted([*self._best, found.value], key=lambda value: sign * value)
        kept = ranked[: self.cfg.keep_best]
        if kept != self._best:
            self._best = kept
            assert self._run is not None  # it is told within a run
            reason = f"{found.name} is {number_text(found.value)}, one of the best so far"
            self._run.requests.save(reason, by=self.name, name=self.name)

    def _save(self, requests: Sequence[Request]) -> None:
        """At a commit point, on all ranks alike."""
        run, store = self._run, self._store
        assert run is not None  # both are set while it is in run.savers
        assert store is not None
        last = run.requests.stop_request is not None or run.limits.reached(run.progress)
        if last:
            self._collect()  # one of this very step may have failed
        counters = run.progress.state_dict()
        if counters == self._newest and self._failure is None:
            return  # it has just been written
        waits = last or self.cfg.when_busy == "wait" or run.accelerator.num_processes > 1
        if self._background.busy and not waits:
            logger.warning(
                "%s: no save at %s: the one before is still being written",
                *(self.name, run.progress),
            )
            return
        self._collect()
        reasons = "; ".join(dict.fromkeys(f"{r.reason}, asked by {r.by}" for r in requests))
        self._newest = counters
        snapshot = run.take_snapshot()
        pending = self._attempt(
            partial(
                store.prepare,
                run.progress.global_step_id,
                snapshot.parts,
                snapshot.of_rank,
                metrics=self._metrics(run),
                metadata={**snapshot.about, "reason": reasons},
            )
        )
        if pending is not None and self.cfg.in_background:
            self._background.start(pending.commit)
        elif pending is not None:
            self._told(self._attempt(pending.commit))

    def _metrics(self, run: PipelineRun) -> dict[str, float]:
        """The values that were measured of these very weights."""
        step = run.progress.global_step_id
        return {
            found.name: found.value
            for found in run.metrics.last_values()
            if found.step == step and math.isfinite(found.value)
        }

    def _collect(self, at_the_end: bool = False) -> None:
        """Wait for what runs in the background, and tell how it went."""
        self._told(self._attempt(self._background.collect, at_the_end))

    def _told(self, info: CheckpointInfo | None) -> None:
        if info is None or self._run is None:
            return
        logger.info("saved %s: %s", info.path, info.metadata.get("reason", ""))
        self._run.state_file.saved(info.path, info.step)

    def _attempt(self, save: Callable[[], Any], at_the_end: bool = False) -> Any:
        """What a function gives; None where it fails and the run is to go on all the same."""
        try:
            result = save()
        except CheckpointError as error:
            self._newest = None
            if self.cfg.on_failure == "stop" and not at_the_end:
                raise
            self._failure = error
            logger.error(
                "%s: a save has failed; older checkpoints are as they were%s: %s",
                *(self.name, "" if at_the_end else ", and the run goes on", error),
            )
            return None
        if result is not None:
            self._failure = None
        return result

    def state_dict(self) -> dict[str, Any]:
        return {"version": STATE_VERSION, "best": list(self._best)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state_version(state, STATE_VERSION, self.name)
        self._best = list(state["best"])


class SaveCheckpointConfig(PipelineHooksConfig[SaveCheckpoint]):
    """When checkpoints are saved, where, and which are kept."""

    class_type: type[SaveCheckpoint] = SaveCheckpoint
    every: TriggerField | None = Field(
        default="1 epoch",
        description="When, such as '1000 steps | 30 min'; None for the end of the run, and when "
        "a hook asks, alone.",
    )
    folder: Annotated[Path | None, RunPath()] = Field(
        default=None,
        description="Where; by default 'checkpoints' in the trainer's run_folder.",
    )
    keep_last: int | None = Field(
        default=3, ge=1, description="How many of the newest are kept; None for all."
    )
    keep_every: int | None = Field(
        default=None, ge=1, description="Those at every so many steps are kept for good."
    )
    keep_best: int = Field(
        default=0, ge=0, description="How many of those are kept at which the metric was best."
    )
    monitor: str | None = Field(
        default=None, description="The metric for keep_best, such as 'eval/val/loss'."
    )
    mode: Mode | None = Field(
        default=None, description="Whether its smallest ('min') or largest ('max') value is best."
    )
    in_background: bool = Field(
        default=False,
        description="Whether the training goes on while a checkpoint is written; takes memory of "
        "about its size.",
    )
    when_busy: Literal["wait", "skip"] = Field(
        default="wait",
        description="With in_background, what to do when the save before is not over: wait for "
        "it, or leave this one out. Saves at a stop wait; with several processes all do.",
    )
    on_failure: Literal["continue", "stop"] = Field(
        default="continue",
        description="When a save fails, as on a full disk: tell, and go on with the run, or end "
        "it with the error.",
    )
    digest: DigestName = Field(
        default="xxh3_128",
        description="What files are checked by: 'xxh3_128' finds damage, 'sha256' tampering, too, "
        "and takes longer.",
    )

    @model_validator(mode="after")
    def _has_metric_for_best(self) -> Self:
        given = {self.keep_best > 0, self.monitor is not None, self.mode is not None}
        if len(given) > 1:
            raise ValueError(
                "keep_best, monitor and mode go together: how many of the best to keep, by which "
                f"metric, and whether small or large is good; got keep_best={self.keep_best}, "
                f"monitor={self.monitor!r} and mode={self.mode!r}"
            )
        return self
