"""Commit point: requests of hooks are executed between two steps and after each epoch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from time import perf_counter
from typing import Any

from robo_orchard_core.utils.config.errors import suggest_name
from robo_orchard_lab.pipeline.checkpoint import pack_weights
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.errors import PipelineStateError, UnknownMetricError
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.job_log import ROUTINE, job_logger
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from robo_orchard_lab.pipeline.progress import remaining_steps
from robo_orchard_lab.pipeline.requests import (
    EvaluateRequest,
    LogRequest,
    Request,
    SaveRequest,
    SaveWeightsRequest,
    WriteRequest,
)
from robo_orchard_lab.pipeline.sharding import gather_weights

logger = job_logger(__name__)
metrics_logger = job_logger("robo_orchard_lab.pipeline.metrics")

_PUBLISHERS = {
    "eval": "ValidationHook",
    "grad_norm": "StatsMonitor",
    "loss": "LossTracker",
    "lr": "StatsMonitor",
    "perf": "StatsMonitor",
    "train": "MetricTracker",
}
"""Hook that publishes the metrics of a group."""


class CommitPoint:
    """Execution of the requests of hooks, and the record of what is logged.

    All scopes are closed and the state is consistent when the trainer calls it. ``on_evaluation``
    opens the channel around an evaluation.
    """

    def __init__(
        self,
        run: PipelineRun,
        on_evaluation: Callable[[PipelineHookArgs, Callable[[PipelineHookArgs], Any]], Any],
    ) -> None:
        self._run = run
        self._on_evaluation = on_evaluation
        self._logged_at: int | None = None
        """Steps done at the last logging point within an epoch."""
        self._all_logged = False
        """True if no metric was published since the last logging point."""
        self._unmet: UnknownMetricError | None = None

    def execute(self) -> None:
        """Execute requests after a step."""
        if self._carry_out():
            self._logged_at = self._run.progress.global_step_id

    def execute_after_epoch(self, completed: bool) -> None:
        """Execute requests after an epoch, or after the part of an epoch before a stop."""
        self._all_logged = self._carry_out() or (
            self._logged_at == self._run.progress.global_step_id and not completed
        )

    def begin_loop(self) -> None:
        """Record the stage ``training``, and the limits of the run."""
        self._run.state_file.stage.begin_loop(self._find_limits)

    def _find_limits(self) -> dict[str, int | None]:
        run = self._run
        per_epoch, window = run.steps_per_epoch, run.accelerator.gradient_accumulation_steps
        left = remaining_steps(run.limits, run.progress, per_epoch, window)
        total = None if left is None else run.progress.global_step_id + left
        return {"total_steps": total, "max_epoch": run.limits.max_epoch}

    def warn_of_unwritten(self) -> None:
        """Warn at the start of the loop of hooks that publish what no hook writes."""
        problem = self._run.metrics.find_unwritten(self._run.evaluations)
        if problem is not None:
            logger.warning("%s", problem)

    def warn_of_metrics(self) -> None:
        """Warn after an epoch of metrics that hooks wait for."""
        if self._unmet is None and (missing := self._run.metrics.find_missing(at_end=False)):
            self._unmet = missing
            logger.warning("after a whole epoch, %s", missing)

    def finish(self) -> None:
        """Log the remaining metrics at the end of the loop, and report a granted stop."""
        run, metrics, stop = self._run, self._run.metrics, self._run.requests.stop_request
        if not self._all_logged:
            with run.stage("logging"):
                metrics.flush_partial(run.accelerator)
        run.retry_writes()
        run.failures += filter(None, (output.error() for output in run.outputs.values()))
        # A stopped run, or a short one, may end before its first evaluation.
        has_evaluated = any(name.startswith("eval/") for name in metrics.names())
        ended_early = stop is not None or (bool(run.evaluations) and not has_evaluated)
        exit_code = None if stop is None else stop.exit_code
        is_preempted = exit_code is not None and not run.limits.reached(run.progress)
        # A preempted run resumes; a missing metric must not change its exit code.
        self._unmet = None if is_preempted else metrics.find_missing(at_end=not ended_early)
        if stop is not None:
            found = run.progress, stop.reason, stop.by
            logger.info("stopped at %s: %s, requested by %s", *found, extra=ROUTINE)

    def raise_unmet(self) -> None:
        """Warn of requests after the last commit point.

        Raises:
            UnknownMetricError: a hook waited for a metric that was never published.
        """
        run = self._run
        for left in run.requests.pop(Request):
            logger.warning(
                "%s made a request after the last commit point, which is not executed: %s",
                *(left.by, left.reason),
            )
        for left in run.requests.pop_rank_local():
            logging.getLogger(__name__).warning(
                "%s made a request on rank %d alone, after the last exchange of the ranks, which "
                "is not executed: %s",
                *(left.by, run.accelerator.process_index, left.reason),
            )
        if self._unmet is not None:
            raise self._unmet

    def _carry_out(self) -> bool:
        """Evaluate, then log, then save, where requested; return True if all metrics are logged.

        A subscriber to a value may make further requests, which are executed as well. Each
        evaluation runs once, and there is one logging point. The trainer itself grants a stop.

        Raises:
            PipelineStateError: no hook can execute a requested evaluation or save.
        """
        run, requests = self._run, self._run.requests
        if not requests.pending and not run.metrics.has_due_metrics():
            return False
        began_at = perf_counter()
        if run.agreement.several:
            requests.begin_commit(run.progress.global_step_id, run.metrics.describe_due())
        evaluated: set[str] = set()
        stage = run.state_file.stage
        logged = all_logged = False
        while True:
            names = _evaluations_to_run(run, requests.pop(EvaluateRequest))
            for name in names:
                if name not in evaluated:
                    evaluated.add(name)
                    args = PipelineHookArgs(run, evaluation=name)
                    stage.enter("evaluating", name)
                    self._on_evaluation(args, run.evaluations[name])
                    run.state_file.events.add("evaluation", name)
            log = bool(requests.pop(LogRequest)) and not logged
            if not names and not log and not run.metrics.has_due_metrics():
                break
            logged, all_logged = logged or log, log
            with run.stage("logging"):
                run.metrics.flush(log, run.accelerator)
        weights, writes = requests.pop(SaveWeightsRequest), requests.pop(WriteRequest)
        if evaluated or weights or writes or requests.pending:  # of a save or a stop
            with run.stage("saving"):
                self._write(weights, writes)
        stage.enter("training")
        run.commit_seconds += perf_counter() - began_at
        return all_logged

    def _write(self, weights: list[SaveWeightsRequest], writes: list[WriteRequest]) -> None:
        """Execute requests to write; checkpoints last. A check may request a rollback instead."""
        run, requests = self._run, self._run.requests
        run.retry_writes()
        if (weights or writes or requests.pending) and not run.should_defer_saves():
            for check in tuple(run.before_saves.values()):
                check()
            if requests.rollback_request is not None:
                return
        stage = run.state_file.stage
        if weights or writes:
            stage.enter("saving")
        for request in weights:
            _save_weights(run, request)
        for write in writes:
            write.write()
            logger.debug("written: %s, requested by %s", write.reason, write.by)
        if not run.should_defer_saves() and (saves := requests.pop(SaveRequest)):
            stage.enter("saving")
            _save(run, saves)


def _evaluations_to_run(run: PipelineRun, requests: list[EvaluateRequest]) -> list[str]:
    """Return the names of requested evaluations, in the order of their hooks."""
    for request in requests:
        if not run.evaluations or request.name not in (None, *run.evaluations):
            name = f"evaluation by {request.name!r}" if request.name else "evaluation"
            hint = suggest_name(str(request.name), list(run.evaluations), "hooks that evaluate:")
            raise PipelineStateError(
                f"{request.by} requested an {name} ({request.reason}), which no hook can execute; "
                + (hint if run.evaluations else "register a ValidationHook")
            )
        logger.debug("evaluation: %s, requested by %s", request.reason, request.by)
    names = {request.name for request in requests}
    return [name for name in run.evaluations if None in names or name in names]


def _save(run: PipelineRun, requests: list[SaveRequest]) -> None:
    if not run.savers:
        raise PipelineStateError(
            f"{requests[0].by} requested a checkpoint ({requests[0].reason}), which no hook can "
            "write; register a SaveCheckpoint"
        )
    for name, save in run.savers.items():
        if own := [request for request in requests if request.name in (None, name)]:
            save(own)


def _save_weights(run: PipelineRun, request: SaveWeightsRequest) -> None:
    kept = run.weight_set(request.weights) if request.weights else None  # an error on all ranks
    weights = gather_weights(run, kept)
    if weights is not None:
        progress = run.progress
        metadata = {
            "epoch_id": str(progress.epoch_id),
            "global_step_id": str(progress.global_step_id),
            "optimizer_step_id": str(progress.optimizer_step_id),
            **request.metadata,
        }
        if run.write_file(request.path, pack_weights(weights, metadata), request.by):
            found = request.path, request.reason, request.by
            logger.info("saved %s: %s, requested by %s", *found, extra=ROUTINE)


def check_metric_names(run: PipelineRun, hooks: PipelineHooks) -> None:
    """Check the names of metrics that hooks wait for, once the loop has begun for all hooks.

    If a hook may publish undeclared metrics, an unknown name is logged: as a warning if the name
    is similar to a known one.

    Raises:
        UnknownMetricError: no hook publishes a metric, and all hooks declare theirs.
    """
    by_name = {hook.name: hook for hook in hooks.all_hooks()}
    declared = [name for hook in by_name.values() for name in hook.published_metrics or ()]
    known = {*declared, *run.metrics.names()}
    others = hooks.undeclared_publishers()
    for name, who in run.metrics.expected_names():
        if name in known or any(fnmatchcase(name, pattern) for pattern in declared):
            continue
        place = run.locate(who, *_setting_of(by_name.get(who), name))
        error = UnknownMetricError(name, known, who, _publisher_hint(name, known), place)
        if not others:
            raise error
        metrics_logger.log(
            logging.WARNING if error.similar else logging.INFO,
            "%s. Hooks may publish undeclared metrics (%s): set published_metrics = [%r] on the "
            "class of such a hook, so that misspelled names are errors before the first step",
            *(error, ", ".join(others), name),
        )


def _publisher_hint(name: str, known: Iterable[str]) -> str:
    """Return the hook to add for a metric of a group that no hook publishes, or ""."""
    group = name.partition("/")[0]
    is_published = any(other.partition("/")[0] == group for other in known)
    return f"Add a {_PUBLISHERS[group]}" if group in _PUBLISHERS and not is_published else ""


def _setting_of(hook: PipelineHooks | None, value: str) -> tuple[str | int, ...]:
    """Return the keys of a value in a hook's configuration."""
    if hook is None:
        return ("monitor",)  # of the LR scheduler
    for name, found in getattr(hook, "cfg", ()):
        if found == value:
            return (name,)
        if isinstance(found, list) and value in found:
            return name, found.index(value)
    return ()
