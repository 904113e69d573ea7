"""Hook that saves checkpoints, optionally in the background."""

from __future__ import annotations

import logging
import math
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import Field, model_validator
from torch.nn.parameter import is_lazy

from robo_orchard_core.utils.hook import HookContext
from robo_orchard_lab.metric_mode import Mode
from robo_orchard_lab.pipeline.checkpoint import (
    CheckpointInfo,
    CheckpointStore,
    DigestName,
    Ranks,
    Retention,
)
from robo_orchard_lab.pipeline.checkpoint.manifest import CHECKPOINTS_FOLDER
from robo_orchard_lab.pipeline.checkpoint.state_tree import encode_state
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.errors import (
    CheckpointError,
    PipelineConfigError,
    RunPreempted,
    StateError,
    check_state_version,
)
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.job_log import ROUTINE, job_logger
from robo_orchard_lab.pipeline.metrics import MetricValue, number_text
from robo_orchard_lab.pipeline.model import plain_model
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from robo_orchard_lab.pipeline.requests import Request
from robo_orchard_lab.pipeline.run.durable import RetriedWrite
from robo_orchard_lab.pipeline.run.run_path import RunPath
from robo_orchard_lab.pipeline.sharded_tensors import is_sharded, local_tensor
from robo_orchard_lab.pipeline.sharding import non_finite_weights
from robo_orchard_lab.pipeline.state_schema import Real, StateSchema
from robo_orchard_lab.pipeline.trigger import TriggerField

ResultT = TypeVar("ResultT")


class BackgroundTask(Generic[ResultT]):
    """One function at a time in a daemon thread, with its result or error to collect.

    >>> task = BackgroundTask("adding")
    >>> task.start(lambda: 1 + 1)
    >>> task.collect()
    2

    The thread does not keep the process alive; collect results before the exit.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._future: Future[ResultT] | None = None

    @property
    def is_busy(self) -> bool:
        """Return True while the function runs."""
        return self._future is not None and not self._future.done()

    @property
    def is_done(self) -> bool:
        """Return True if a result can be collected without waiting."""
        return self._future is not None and self._future.done()

    def start(self, work: Callable[[], ResultT]) -> None:
        """Start a function; the previous result must have been collected."""
        assert self._future is None
        future = self._future = Future[ResultT]()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:  # else collect() would wait forever
                future.set_exception(error)

        threading.Thread(target=run, name=self.name, daemon=True).start()

    def collect(self) -> ResultT | None:
        """Wait for the function; return its result or raise its error; None if not started."""
        future, self._future = self._future, None
        return None if future is None else future.result()


logger = job_logger(__name__)

STATE_VERSION = 1


class SaveCheckpoint(PipelineHooks):
    """Checkpoints for an exact resume, saved at commit points.

    Checkpoints are saved on the trigger ``every``, at the end of the run, and when a hook calls
    ``args.requests.save(...)``; several requests at one commit point cause one save. Resume with
    ``HookBasedTrainer(..., resume_from="auto")``.

    A checkpoint is a folder ``step_00001234`` of safetensors and JSON files, renamed into place
    when complete on disk; ``last`` and ``best`` link to the newest and the best one. Then older
    ones are pruned, except for those to keep. Remains of a killed run are removed after a resume by
    ``"auto"``. With ``monitor``, each value among the ``keep_best`` best causes a save, too, at the
    commit point of the evaluation or of the step that published the value.

    With ``in_background``, a step waits only for a copy of the tensors to host memory, about the
    size of a checkpoint. Errors are reported at the next commit point; with several processes,
    after the next exchange (:class:`Agreement`). The end of the run and a preemption wait for the
    save; a second signal does not.

    Each checkpoint records if weights, optimizer state and losses are finite. A checkpoint with
    non-finite weights or optimizer state is never the best one, and pruning keeps the newest
    healthy one in addition.

    With several processes and a sharded model, a save that is requested within an accumulation
    window waits for the end of the window.

    - Ranks: all; each writes its own state, the first rank the rest and the commit. If any rank
      fails, there is no new checkpoint, and older ones are untouched.
    - Requests: saves.
    - State: the best values of ``monitor``.

    Raises:
        PipelineConfigError: neither ``folder`` nor the trainer's ``run_folder`` is set, or another
            hook saves in the same folder, when the run begins.
        StoreLockedError: another run saves into the same folder, when the run begins.
        CheckpointError: before the first step, the disk has no room for a checkpoint; later, a save
            failed: at once with ``on_failure="stop"``, otherwise at the end of the run if the last
            save failed.
        StateError: a state contains a value that can't be saved; the message has its path. States
            are checked before the first step.
    """

    keeps_trajectory = True
    reads = ("model.weights", "model.buffers", "optimizer state", "metrics")
    changes = ("files",)
    requests = ()

    def __init__(self, cfg: SaveCheckpointConfig) -> None:
        super().__init__()
        self.cfg = cfg
        if cfg.every is not None or cfg.monitor is not None:
            self.declare_effects(requests=["save"])
        self._store: CheckpointStore | None = None
        self._run: PipelineRun  # set when the loop begins
        self._handles = ExitStack()  # until the loop ends
        self._task = BackgroundTask[CheckpointInfo]("save-checkpoint")
        self._newest: dict[str, Any] | None = None  # counters at the last started save
        self._best: list[float] = []  # best values so far, the best one first
        self._writes = RetriedWrite(self.name, logger)
        self.register_hook("on_loop", HookContext.from_callable(self._begin, self._end))
        if cfg.every is not None:
            reason = f"every {cfg.every}"
            self.register_at_commit(
                lambda args: args.requests.save(reason, self.name, name=self.name), cfg.every
            )

    def root(self, run_folder: Path | None) -> Path:
        """Return the folder of checkpoints; raise PipelineConfigError if none is configured."""
        if self.cfg.folder is not None:
            return self.cfg.folder
        if run_folder is not None:
            return run_folder / CHECKPOINTS_FOLDER
        raise PipelineConfigError(
            f"{self.name}.folder: no folder for checkpoints; set folder here, or run_folder of the "
            "trainer"
        )

    def store(self, run_folder: Path | None, ranks: Ranks) -> CheckpointStore:
        """Return the checkpoint store of a run folder, with this hook's retention."""
        cfg = self.cfg
        return CheckpointStore(
            self.root(run_folder),
            digest=cfg.digest,
            retention=Retention(
                keep_last=cfg.keep_last,
                keep_every=cfg.keep_every,
                keep_best=cfg.keep_best,
                monitor=cfg.monitor,
                mode=cfg.mode or "min",  # always set together with monitor
            ),
            ranks=ranks,
        )

    def _begin(self, args: PipelineHookArgs) -> None:
        cfg, run = self.cfg, args.run
        several = args.accelerator.num_processes > 1
        ranks = Ranks.of_job(in_background=cfg.in_background) if several else Ranks.alone()
        folder = self.root(run.folder).resolve()
        other = run.checkpoint_folders.setdefault(folder, self.name)
        if other != self.name:
            raise PipelineConfigError(
                f"{other} and {self.name} both save checkpoints in {folder}; remove one of the two "
                "hooks (in an experiment file: checkpoint: null, or the hook in hooks), or set "
                f"{self.name}.folder to another folder"
            )
        self._writes.by = self.name
        self._store = self.store(run.folder, ranks)
        self._store.open()
        self._run, self._newest = run, None
        run.savers[self.name] = partial(self._save, self._store)
        run.start_checks.append(partial(self._check_start, run, self._store))
        if cfg.in_background:  # reports the result of a save, or its error
            topic = run.agreement.topic(
                self.name,
                find=lambda: self._task.is_done,
                tell=lambda done: run.requests.write(
                    self._collect, "a background save ended", by=self.name
                ),
                whose="all",
            )
            self._handles.enter_context(topic)
        if cfg.monitor is not None:
            run.metric_modes[cfg.monitor] = cfg.mode or "min"  # always set together
            subscription = args.metrics.subscribe(cfg.monitor, self._judge, who=self.name)
            self._handles.enter_context(subscription)

    def _check_start(self, run: PipelineRun, store: CheckpointStore) -> None:
        """Check before the first step that the state can be saved and resumed, and has room."""
        if run.data is not None:
            run.data.check_first_state(lambda state: _check_state(run, "data", {"data": state}))
            if problem := run.data.resume_problem:
                is_endless = run.steps_per_epoch is None
                level = logging.WARNING if is_endless else logging.INFO
                logger.log(level, "%s: %s", run.locate("data"), problem)
        if any(map(is_lazy, plain_model(run).parameters())) or run.should_defer_saves():
            return  # there is no state to save yet
        snapshot = run.take_snapshot()
        parts, of_rank = snapshot.parts, snapshot.of_rank
        for part in ("data", "lr_scheduler"):
            _check_state(run, part, {part: parts["trainer"][part]})
        for name, state in of_rank["state"]["hooks"].items():
            _check_state(run, name, {"hooks": {name: state}})
        size = store.measure(run.progress.global_step_id, parts, of_rank)
        is_first = store.ranks.index == 0
        size += sum(_missing_optimizer_bytes(each, is_first) for each in run.optimizers.values())
        free = shutil.disk_usage(store.root).free
        if free < size:
            raise CheckpointError(
                f"{run.locate(self.name, 'folder')}: {store.root} has no room for a checkpoint: "
                f"about {size:,} bytes needed, {free:,} free; free space, or set another folder"
            )
        if free < 2 * size and not store.list():
            logger.warning(
                "%s: %s has room for one checkpoint only, and each is written next to the one "
                "before: about %s bytes needed, %s free; free space, or set another folder",
                *(run.locate(self.name, "folder"), store.root, f"{2 * size:,}", f"{free:,}"),
            )

    def _end(self, args: PipelineHookArgs) -> None:
        args.run.savers.pop(self.name, None)
        args.run.checkpoint_folders.pop(self.root(args.run.folder).resolve(), None)
        self._handles.close()
        store, self._store = self._store, None
        if store is None:
            return
        if isinstance(args.exception, RunPreempted) and self._task.is_busy:
            # A second signal does not wait for the save. If the process continues, the store is
            # closed after the save.
            self._task = BackgroundTask(self._task.name)
            threading.Thread(target=store.close, name="close-store", daemon=True).start()
            return
        try:
            self._collect(is_final=True)
        finally:
            store.close()
            store.ranks.close()
        if self._writes.failure is not None:
            args.run.failures.append(self._writes.failure)
            self._writes.failure = None

    def _judge(self, found: MetricValue) -> None:
        """Request a save if the value is among the best so far."""
        if not math.isfinite(found.value):
            return
        ranked = sorted([*self._best, found.value], reverse=self.cfg.mode == "max")
        kept = ranked[: self.cfg.keep_best]
        reason = f"{found.name} is {number_text(found.value)}, one of the best so far"
        if kept != self._best and self._run.should_defer_saves():
            logger.warning(
                "%s: no checkpoint is kept for step %d, where %s: a sharded model is saved between "
                "accumulation windows only; measure every few optimizer steps, such as "
                "every='100 optimizer steps'",
                *(self.name, found.step, reason),
            )
        elif kept != self._best:
            if names := non_finite_weights(self._run, None):  # a collective
                logger.warning(
                    "%s: no checkpoint is kept for step %d, where %s: %s of the weights is not "
                    "finite",
                    *(self.name, found.step, reason, names[0]),
                )
                return
            self._best = kept
            self._run.requests.save(reason, by=self.name, name=self.name)

    def _save(self, store: CheckpointStore, requests: Sequence[Request]) -> None:
        """Save at a commit point, on all ranks."""
        run = self._run
        is_last = run.requests.stop_request is not None or run.limits.reached(run.progress)
        if is_last:
            self._collect()  # a save of this step may have failed
        counters = run.progress.state_dict()
        if counters == self._newest and self._writes.failure is None:
            return  # just saved
        must_wait = is_last or self.cfg.when_busy == "wait" or run.accelerator.num_processes > 1
        if self._task.is_busy and not must_wait:
            logger.warning(
                "%s: no save at %s: the previous save is still running", *(self.name, run.progress)
            )
            return
        self._collect()
        reasons = "; ".join(dict.fromkeys(f"{r.reason}, requested by {r.by}" for r in requests))
        self._newest = counters
        snapshot = run.take_snapshot()
        pending = self._attempt(
            partial(
                store.prepare,
                run.progress.global_step_id,
                snapshot.parts,
                snapshot.of_rank,
                metrics=run.metrics.values_at(run.progress.global_step_id),
                metadata={**snapshot.about, "reason": reasons},
                finite=snapshot.finite,
            )
        )
        if pending is not None and self.cfg.in_background:
            self._task.start(pending.commit)
        elif pending is not None:
            self._report(self._attempt(pending.commit))

    def _collect(self, is_final: bool = False) -> None:
        """Wait for a background save and report its result."""
        self._report(self._attempt(self._task.collect, is_final))

    def _report(self, info: CheckpointInfo | None) -> None:
        if info is None:
            return
        self._writes.succeeded(info.path)
        reason = info.metadata.get("reason", "")
        logger.info("saved %s: %s", info.path, reason, extra=ROUTINE)
        self._run.state_file.saved(info.path, info.step, info.non_finite)

    def _attempt(self, save: Callable[[], Any], is_final: bool = False) -> Any:
        """Return the result of a save; None if the save failed and the run continues."""
        try:
            return save()
        except CheckpointError as error:
            self._newest = None
            if self.cfg.on_failure == "stop" and not is_final:
                raise
            then = "" if is_final else ", and the run continues"
            self._writes.failed("a save", error, f"older checkpoints are untouched{then}")
            return None

    state_schema = StateSchema(STATE_VERSION, best=list[Real])

    def state_dict(self) -> dict[str, Any]:
        return {"version": STATE_VERSION, "best": list(self._best)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state_version(state, STATE_VERSION, self.name)
        self._best = list(state["best"])


def _check_state(run: PipelineRun, owner: str, state: Any) -> None:
    """Raise StateError if a state can't be saved; ``owner`` is as in ``run.locate``."""
    try:
        encode_state(state)
    except StateError as error:
        raise StateError(f"{run.locate(owner)}: {error}") from None


_TWO_MOMENTS = {"Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adadelta"}


def _missing_optimizer_bytes(optimizer: Any, is_first: bool) -> int:
    """Estimate the state that the first updates will add, in bytes of this rank's files.

    Zero for an optimizer of another package.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper
    is_adam = not _TWO_MOMENTS.isdisjoint(cls.__name__ for cls in type(optimizer).__mro__)
    return sum(
        local_tensor(parameter).nbytes * (2 if is_adam else bool(group.get("momentum")))
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
        and parameter not in optimizer.state
        and (is_first or is_sharded(parameter))
    )


class SaveCheckpointConfig(PipelineHooksConfig[SaveCheckpoint]):
    """Trigger, folder and retention of checkpoints."""

    class_type: type[SaveCheckpoint] = SaveCheckpoint
    every: TriggerField | None = Field(
        default="1 epoch",
        description="Trigger, such as '1000 steps | 30 min'; None saves only at the end of the "
        "run and on requests of hooks.",
    )
    folder: Annotated[Path | None, RunPath()] = Field(
        default=None,
        description="Folder for checkpoints; None for 'checkpoints' in the trainer's run_folder.",
    )
    keep_last: int | None = Field(
        default=3, ge=1, description="Number of newest checkpoints to keep; None for all."
    )
    keep_every: int | None = Field(
        default=None, ge=1, description="Also keep checkpoints at multiples of this many steps."
    )
    keep_best: int = Field(
        default=0, ge=0, description="Number of checkpoints with the best metric to keep."
    )
    monitor: str | None = Field(
        default=None, description="Metric for keep_best, such as 'eval/val/loss'."
    )
    mode: Mode | None = Field(
        default=None, description="Best value: the smallest ('min') or the largest ('max')."
    )
    in_background: bool = Field(
        default=False,
        description="Continue training while a checkpoint is written; needs host memory of about "
        "its size.",
    )
    when_busy: Literal["wait", "skip"] = Field(
        default="wait",
        description="With in_background, if the previous save is still running: wait for it, or "
        "skip this save. Saves at a stop always wait, as do all saves of several processes.",
    )
    on_failure: Literal["continue", "stop"] = Field(
        default="continue",
        description="After a failed save, as on a full disk: log the error and continue, or stop "
        "with the error.",
    )
    digest: DigestName = Field(
        default="xxh3_128",
        description="Digest of the files: 'xxh3_128' detects damage; 'sha256' also detects "
        "tampering, but is slower.",
    )

    @model_validator(mode="after")
    def _has_metric_for_best(self) -> Self:
        given = {self.keep_best > 0, self.monitor is not None, self.mode is not None}
        if len(given) > 1:
            raise ValueError(
                "keep_best, monitor and mode must be set together, got "
                f"keep_best={self.keep_best}, monitor={self.monitor!r} and mode={self.mode!r}"
            )
        return self
