"""Hook that saves and stops the run on a signal.

Other hooks share `require_saver` and `request_stop`.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from types import FrameType
from typing import Any, TypeAlias

from pydantic import Field, field_validator
from torch.utils.data import DataLoader

from robo_orchard_core.utils.hook import HookContext
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.data.workers import IgnoreSignals, ignore_signals_in_workers
from robo_orchard_lab.pipeline.distributed.failure_watch import has_any_rank_failed
from robo_orchard_lab.pipeline.errors import PipelineConfigError, PipelineStateError, RunPreempted
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig

logger = logging.getLogger(__name__)

_Handler: TypeAlias = Callable[[int, FrameType | None], None]

_SAME_REQUEST_S = 0.25
_SAME_LAUNCHED_REQUEST_S = 2.0
_UNSUPPORTED = {"SIGKILL", "SIGSTOP", "SIGCHLD", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL"}


def require_saver(args: PipelineHookArgs, who: str, instead: str = "save_checkpoint=False") -> None:
    """Raise PipelineConfigError if no hook saves, once all hooks have begun the loop."""
    if not args.run.savers:
        raise PipelineConfigError(
            f"{who}: expected a hook that saves checkpoints, found none; register a "
            f"SaveCheckpoint, or set {instead}"
        )


def request_stop(
    args: PipelineHookArgs, reason: str, who: str, *, exit_code: int | None, save: bool
) -> None:
    """Request a stop at the next commit point, and optionally a checkpoint."""
    if save:
        args.requests.save(reason, by=who)
    args.requests.stop(reason, by=who, exit_code=exit_code)


class Preemption(PipelineHooks):
    """Checkpoint and stop on a signal such as SIGTERM or Ctrl-C.

    The first signal on any rank stops all ranks at one commit point: after the open step or the
    next one; with a sharded model, after the open accumulation window. A checkpoint is saved, and
    the trainer raises :class:`RunPreempted`, which exits the process with ``exit_code``; by default
    128 + the signal's number (SIGTERM 143, Ctrl-C 130, SIGUSR1 138). Start the script again to
    resume. A signal after the last step changes nothing: the run is completed.

    A second signal raises :class:`RunPreempted` at once, without saving; a third one has its
    original effect. Signals within 0.25 s of the first are the same request; within 2 s if torchrun
    or SLURM launched the process, since launchers forward signals.

    docs/how_to/resume.md describes torchrun and SLURM: time to save, and exit codes. Signal
    handlers are installed for the loop. An ignored Ctrl-C, as in a shell's background job, stays
    ignored. Workers of data loaders ignore the signals.

    - Ranks: all; ranks agree on the commit point (:class:`Agreement`).
    - Requests: a checkpoint and a stop.
    - State: none.
    - Cost: a comparison per step; with several processes rare exchanges, less than 1 % of the time.

    Raises:
        PipelineStateError: the loop begins outside of the main thread.
        PipelineConfigError: no hook saves checkpoints, when the first epoch begins.
    """

    keeps_trajectory = True
    reads = ()
    changes = ("signal handlers",)
    requests = ("stop",)

    def __init__(self, cfg: PreemptionConfig) -> None:
        super().__init__()
        self.cfg = cfg
        if cfg.save_checkpoint:
            self.declare_effects(requests=["save"])
        self._signals = [signal.Signals[name] for name in cfg.signals]
        self._received = 0  # number of the first signal on this rank
        self._received_at = 0.0
        self._is_stopping = False  # all ranks agreed to stop
        self._undo = ExitStack()
        self.register_hook("on_loop", HookContext.from_callable(self._begin, self._end))
        if cfg.save_checkpoint:
            self.on_epoch.before(lambda args: require_saver(args, self.name))

    def _begin(self, args: PipelineHookArgs) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise PipelineStateError(
                f"{self.name}: signals need the main thread, but the trainer runs in "
                f"{threading.current_thread().name!r}; run the trainer in the main thread, or "
                "remove the hook"
            )
        self._is_stopping = False
        before = {number: signal.getsignal(number) for number in self._signals}
        handle = self._handler(before, args)
        self._undo = ExitStack()
        # A shell's background job ignores Ctrl-C, and keeps ignoring it.
        handled = [
            n for n in self._signals if n != signal.SIGINT or before[n] is not signal.SIG_IGN
        ]
        self._undo.enter_context(ignore_signals_in_workers(handled))
        self._protect_workers(args.dataloader)
        for number in handled:
            self._undo.callback(_restore, number, before[number])
            signal.signal(number, handle)
        topic = args.run.agreement.topic(
            self.name, find=lambda: self._received, tell=partial(self._stop, args)
        )
        self._undo.callback(topic.remove)

    def _protect_workers(self, loader: Any) -> None:
        loader = getattr(loader, "base_dataloader", loader)  # Accelerate's wrapper
        if isinstance(loader, DataLoader) and not isinstance(loader.worker_init_fn, IgnoreSignals):
            self._undo.callback(setattr, loader, "worker_init_fn", loader.worker_init_fn)
            loader.worker_init_fn = IgnoreSignals(loader.worker_init_fn)

    def _end(self, args: PipelineHookArgs) -> None:
        self._undo.close()
        if args.requests.rollback_request is not None:
            return  # the run continues, and obeys the signal
        received, self._received = self._received, 0
        if not received or self._is_stopping:
            return
        first = signal.Signals(received).name
        if isinstance(args.exception, RunPreempted):
            # The run ends anyway; the request records the reason.
            reason = f"received {first}, and a second signal to stop at once"
            args.requests.stop(reason, by=self.name, exit_code=self._exit_code(received))
        elif args.exception is None:
            logger.warning(
                "%s: received %s after the last step; the run is completed", self.name, first
            )

    def _stop(self, args: PipelineHookArgs, received: int) -> None:
        """Request the stop, on all ranks, after a signal on any rank."""
        if not self._is_stopping:
            self._is_stopping = True
            reason, code = f"received {signal.Signals(received).name}", self._exit_code(received)
            request_stop(args, reason, self.name, exit_code=code, save=self.cfg.save_checkpoint)

    def _exit_code(self, number: int) -> int:
        return 128 + number if self.cfg.exit_code is None else self.cfg.exit_code

    def _handler(self, before: Mapping[signal.Signals, Any], args: PipelineHookArgs) -> _Handler:
        """Return the handler of the signals; ``before`` has the replaced handlers."""
        main_process, run = os.getpid(), args.run
        is_reporting = args.accelerator.is_local_main_process
        launched = "WORLD_SIZE" in os.environ or "SLURM_JOB_ID" in os.environ
        same_request_s = _SAME_LAUNCHED_REQUEST_S if launched else _SAME_REQUEST_S

        def handle(number: int, frame: FrameType | None) -> None:
            # Runs between any two instructions of the main thread: no locks, so no logging.
            if os.getpid() != main_process:  # in a forked process
                _restore(number, before[signal.Signals(number)])
                os.kill(os.getpid(), number)
                return
            if has_any_rank_failed():  # the launcher's signal: this process ends already
                return
            now = time.monotonic()
            if not self._received:
                self._received, self._received_at = number, now
                if is_reporting:
                    again = "Ctrl-C again" if number == signal.SIGINT else "send again"
                    if not run.show_notice(f"stopping after this step ... ({again} to stop now)"):
                        _write_stderr(
                            f"{self.name}: {signal.Signals(number).name}: stopping at the next "
                            "commit point; send again to stop at once\n"
                        )
            elif now - self._received_at > same_request_s:
                for each in self._signals:
                    _restore(each, before[each])
                raise RunPreempted(self._exit_code(number))

        return handle


class PreemptionConfig(PipelineHooksConfig[Preemption]):
    """Signals to handle, exit code, and saving.

    >>> PreemptionConfig(signals=("SIGTERM",), exit_code=75)().name
    'Preemption'
    """

    class_type: type[Preemption] = Preemption
    signals: tuple[str, ...] = Field(
        default=tuple(n for n in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, n)),
        min_length=1,
        description="Names of the signals; SIGINT is Ctrl-C.",
    )
    exit_code: int | None = Field(
        default=None,
        ge=0,
        le=255,
        description="Exit code of the process; None for 128 + the signal's number. Some job "
        "schedulers restart jobs that exit with 75.",
    )
    save_checkpoint: bool = Field(
        default=True, description="Save a checkpoint before the exit, by the hooks that save."
    )

    @field_validator("signals")
    @classmethod
    def _can_be_handled(cls, signals: tuple[str, ...]) -> tuple[str, ...]:
        for name in signals:
            if name not in signal.Signals.__members__:
                raise ValueError(f"this system has no signal {name!r}; use names such as SIGTERM")
            if name in _UNSUPPORTED:
                raise ValueError(f"{name} can't be handled; remove it")
        return tuple(dict.fromkeys(signals))


def _restore(number: int, handler: Any) -> None:
    # None means a handler not installed by Python, which can't be restored.
    signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _write_stderr(text: str) -> None:
    with suppress(OSError):
        os.write(2, text.encode())
