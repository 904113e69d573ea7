"""Ending a run that is to be started again."""

from __future__ import annotations

from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.errors import PipelineConfigError


def check_savers(args: PipelineHookArgs, who: str) -> None:
    """Refuse to wait for the moment at which a checkpoint is needed and nobody saves one.

    Asked when all hooks have opened, ahead of the first step.

    Raises:
        PipelineConfigError: no hook saves checkpoints.
    """
    if not args.run.savers:
        raise PipelineConfigError(
            f"{who}: there is no hook that saves a checkpoint when the run is interrupted; "
            "register a SaveCheckpoint, or set save_checkpoint=False"
        )


def interrupt(
    args: PipelineHookArgs, reason: str, who: str, *, exit_code: int | None, save: bool
) -> None:
    """Ask for a checkpoint, if one is wanted, and for the end, at the next commit point."""
    if save:
        args.requests.save(reason, by=who)
    args.requests.stop(reason, by=who, exit_code=exit_code)
