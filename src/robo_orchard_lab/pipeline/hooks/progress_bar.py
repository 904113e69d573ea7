"""Show how far a run has come."""

from __future__ import annotations

import logging
import random
import sys

from pydantic import Field

from robo_orchard_core.utils.hook import HookContext, RemovableHandle
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.hooks.run_view import Display, RunStatus, RunView

logger = logging.getLogger(__name__)


class ProgressBarHook(PipelineHooks):
    """A progress bar in a terminal, log lines elsewhere: epoch, step, loss, samples/s, time left.

    The bar needs rich, which the extra ``terminal`` brings; without it there are lines as well.

    Register it first: then it shows at the end of an epoch what the other hooks have measured.

    Only the main process shows anything. Where a hook logs metrics (``MetricsLogger``), the loss is
    ``loss/total``, and it and the named metrics are what the last logging point has found; nothing
    is read from the device here. Where none does, the loss is that of the latest batch on this
    rank, and it and the metrics are read, which waits for the device, when they are shown: once in
    ``refresh_seconds``, at the end of an epoch and at the end.

    The samples/s are those of the whole job over the last 10 s, at the end over the whole loop.
    A named metric that nobody publishes is an error when the run is over.
    """

    keeps_trajectory = True

    def __init__(self, cfg: ProgressBarHookConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self._view: RunView | None = None
        self._expected: list[RemovableHandle] = []
        self.register_hook(
            "on_loop", HookContext.from_callable(before=self._open, after=self._close)
        )
        self.register_hook(
            "on_epoch",
            HookContext.from_callable(before=self._begin_epoch, after=self._finish_epoch),
        )
        self.register_hook("on_step", HookContext.from_callable(after=self._finish_step))

    def _open(self, args: PipelineHookArgs) -> None:
        # On every rank, so that all fail alike where nobody publishes one.
        self._expected = [args.metrics.expect(name, self.name) for name in self.cfg.metrics]
        if args.accelerator.is_main_process:
            display = _display(self.cfg.plain)
            self._view = RunView(self.cfg.metrics, self.cfg.refresh_seconds, args, display)

    def _begin_epoch(self, args: PipelineHookArgs) -> None:
        if self._view is not None:
            self._view.begin_epoch()

    def _finish_step(self, args: PipelineHookArgs) -> None:
        if self._view is not None and args.exception is None:
            self._view.finish_step(args)

    def _finish_epoch(self, args: PipelineHookArgs) -> None:
        if self._view is not None and args.exception is None:
            self._view.finish_epoch(args)

    def _close(self, args: PipelineHookArgs) -> None:
        for handle in self._expected:
            handle.remove()
        view, self._view = self._view, None
        if view is not None:
            view.close(args)


class ProgressBarHookConfig(PipelineHooksConfig[ProgressBarHook]):
    """What to show and how often.

    >>> ProgressBarHookConfig(metrics=["grad_norm"])().name
    'ProgressBarHook'
    """

    class_type: type[ProgressBarHook] = ProgressBarHook
    metrics: list[str] = Field(
        default=[], description="Names on the metrics board to show beside the loss."
    )
    refresh_seconds: float | None = Field(
        default=None,
        gt=0,
        description="The least time from one look to the next; by default 0.5 for a bar "
        "and 10 for lines.",
    )
    plain: bool = Field(
        default=False,
        description="Write lines to a terminal, too; a debugger needs it, for example.",
    )


class _LogLines:
    """Lines in the log; on standard error where the log would not show them."""

    refresh_seconds = 10.0
    quick_refresh_seconds = 0.0  # each epoch has its line
    redraws = False

    def open(self, status: RunStatus) -> None:
        """Nothing has happened yet."""

    def show(self, status: RunStatus) -> None:
        if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
            logger.info("%s", status)
        else:
            print(status, file=sys.stderr, flush=True)

    def close(self, status: RunStatus | None) -> None:
        if status is not None:
            self.show(status)


def _display(plain: bool) -> Display:
    if plain or not (sys.stdout.isatty() or sys.stderr.isatty()):
        return _LogLines()
    # Takes 50 ms to import, which a run without a terminal, or without a bar, need not wait.
    drawn = random.getstate()  # rich draws a number when it is imported
    try:
        from robo_orchard_lab.pipeline.hooks.terminal_bar import TerminalBar, find_terminal
    except ImportError:
        logger.info('a progress bar needs rich: pip install "robo-orchard-hooks[terminal]"')
        return _LogLines()
    finally:
        random.setstate(drawn)
    terminal = find_terminal()
    return _LogLines() if terminal is None else TerminalBar(terminal)
