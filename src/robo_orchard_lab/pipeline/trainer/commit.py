"""The commit point: what hooks have asked for is carried out."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable
from time import perf_counter
from typing import Any

from robo_orchard_lab.pipeline.checkpoint import write_weights
from robo_orchard_lab.pipeline.context import PipelineHookArgs, PipelineRun
from robo_orchard_lab.pipeline.errors import PipelineStateError
from robo_orchard_lab.pipeline.job_log import job_logger
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

OpenScope = Callable[[PipelineHookArgs, Callable[[PipelineHookArgs], Any]], Any]
"""Runs a body inside the hooks of a channel."""


def carry_out_requests(run: PipelineRun, on_evaluation: OpenScope) -> bool:
    """Evaluate, then log, then save, as far as it was asked for; a stop is the trainer's own.

    Who is told of a value may ask for more, which is carried out as well; each evaluation runs
    once, and there is one logging point, however many have asked.

    Returns:
        Whether everything that was published until here is logged.

    Raises:
        PipelineStateError: an evaluation is asked for that no hook can carry out.
    """
    requests = run.requests
    if not requests.pending and not run.metrics.has_due_metrics():
        return False
    began_at = perf_counter()
    if run.agreement.several:
        requests.begin_commit(run.progress.global_step_id)
    evaluated: set[str] = set()
    logged = all_logged = False
    while True:
        names = _wanted(run, requests.pop(EvaluateRequest))
        for name in names:
            if name not in evaluated:
                evaluated.add(name)
                on_evaluation(PipelineHookArgs(run, evaluation=name), run.evaluations[name])
        log = bool(requests.pop(LogRequest)) and not logged
        if not names and not log and not run.metrics.has_due_metrics():
            break
        logged, all_logged = logged or log, log
        run.metrics.flush(log, run.accelerator)
    for request in requests.pop(SaveWeightsRequest):
        _save_weights(run, request)
    for wanted in requests.pop(WriteRequest):
        wanted.write()
        logger.debug("written: %s, asked by %s", wanted.reason, wanted.by)
    if saves := requests.pop(SaveRequest):
        _save(run, saves)
    run.commit_seconds += perf_counter() - began_at
    return all_logged


def tell_what_is_left(run: PipelineRun) -> None:
    """Warn of what was asked for when there was no commit point any more."""
    for left in run.requests.pop(Request):
        logger.warning(
            "%s asked for something after the last commit point, which is not done: %s",
            *(left.by, left.reason),
        )
    for left in run.requests.pop_rank_local():
        logging.getLogger(__name__).warning(
            "%s asked for something on rank %d alone, after the last exchange of the ranks, "
            "which is not done: %s",
            *(left.by, run.accelerator.process_index, left.reason),
        )


def _wanted(run: PipelineRun, requests: list[EvaluateRequest]) -> list[str]:
    """The evaluations to run, in the order in which their hooks are registered."""
    for request in requests:
        if not run.evaluations or request.name not in (None, *run.evaluations):
            near = difflib.get_close_matches(str(request.name), run.evaluations, n=1)
            raise PipelineStateError(
                f"{request.by} asked for an evaluation ({request.reason}), "
                + (f"by {request.name!r}, " if request.name else "")
                + "which no hook can carry out"
                + (f"; did you mean {near[0]!r}?" if near else "; register a ValidationHook.")
                + f" Those that can: {', '.join(run.evaluations) or 'none'}"
            )
        logger.debug("evaluation: %s, asked by %s", request.reason, request.by)
    names = {request.name for request in requests}
    return [name for name in run.evaluations if None in names or name in names]


def _save(run: PipelineRun, requests: list[SaveRequest]) -> None:
    if not run.savers:
        raise PipelineStateError(
            f"{requests[0].by} asked for a checkpoint ({requests[0].reason}), which no hook can "
            "write; register a SaveCheckpoint"
        )
    for name, save in run.savers.items():
        if wanted := [request for request in requests if request.name in (None, name)]:
            save(wanted)


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
        write_weights(request.path, weights, metadata)
        logger.info("saved %s: %s, asked by %s", request.path, request.reason, request.by)
