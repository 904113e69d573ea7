"""Save and stop when a signal says that the job has to go."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from types import FrameType
from typing import Any

from pydantic import Field, field_validator
from torch.utils.data import DataLoader

from robo_orchard_core.utils.hook import HookContext
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.data.fetching import IgnoreSignals, ignore_signals_in_workers
from robo_orchard_lab.pipeline.distributed.sections import another_failed
from robo_orchard_lab.pipeline.errors import PipelineConfigError, PipelineStateError, RunPreempted
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig

# --- interruption ----------------------------------------------------------------------------
# Ending a run that is to be started again.


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


logger = logging.getLogger(__name__)

_SAME_REQUEST_S = 0.25
_SAME_LAUNCHED_REQUEST_S = 2.0
_CAN_NOT_BE_HANDLED = {"SIGKILL", "SIGSTOP", "SIGCHLD", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL"}


class Preemption(PipelineHooks):
    """Has the run saved, and stopped, when the process gets a signal such as SIGTERM or Ctrl-C.

    The first signal on any rank is granted by all ranks at one commit point: that after the step
    that is open, or next. A checkpoint is saved, and the trainer raises :class:`RunPreempted`,
    which ends the process with the exit code 128 + the signal's number (SIGTERM 143, Ctrl-C 130,
    SIGUSR1 138), or the one that is given. Started again, the run goes on from there.

    A second signal on a rank raises :class:`RunPreempted` there at once, without saving; a third
    one does what it would without this hook. Signals within a quarter of a second of the first are
    the same request; within two seconds where torchrun or SLURM has launched the process, since
    launchers forward what the processes also get themselves. A run whose last step is over when
    the signal comes is completed, and ends as such.

    A job has as long as its scheduler lets it: torchrun kills its processes 30 s after the signal,
    SLURM by default 30 s (``KillWait``). Until then there have to be the rest of a step, the wait
    for one batch, what else is due at that commit point (such as an evaluation), and the save.
    Where that takes longer, have the scheduler send a signal earlier
    (``#SBATCH --signal=SIGUSR1@120``), and torchrun wait longer (``--shutdown-timeout``). Of these
    signals torchrun passes on SIGTERM and Ctrl-C; SIGUSR1 ends it, unless it is started with
    ``--signals-to-handle=SIGTERM,SIGINT,SIGUSR1``. ``examples/slurm/train.sbatch`` does all that.
    torchrun always ends with 1 itself; what became of the run, with the exit code, is in
    ``run_state.json``.

    The handlers are there while the loop runs, and what was there before is put back at its end. A
    Ctrl-C that the process ignores, as what a shell has started in the background, stays ignored.
    Workers of the data loaders outlive the signals meanwhile.

    It costs one process a comparison in each step; several of them exchange numbers now and then
    (:class:`Agreement`), which takes less than a hundredth of the time.

    Raises:
        PipelineStateError: when the loop begins, outside of the main thread, where Python handles
            no signals.
        PipelineConfigError: when the first epoch begins, there is no hook that saves.
    """

    keeps_trajectory = True

    def __init__(self, cfg: PreemptionConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self._signals = [signal.Signals[name] for name in cfg.signals]
        self._received = 0  # the number of the first signal on this rank
        self._received_at = 0.0
        self._stopping = False  # whether the ranks have agreed on it
        self._undo = ExitStack()
        self.register_hook(
            "on_loop", HookContext.from_callable(before=self._begin, after=self._end)
        )
        if cfg.save_checkpoint:
            self.register_hook("on_epoch", HookContext.from_callable(before=self._check_savers))

    def _begin(self, args: PipelineHookArgs) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise PipelineStateError(
                f"{self.name}: signals are handled in the main thread alone, and the trainer was "
                f"called in {threading.current_thread().name!r}; call it in the main thread, or "
                "leave the hook out"
            )
        self._received = 0
        self._stopping = False
        accelerator = args.accelerator
        tells = accelerator is None or accelerator.is_local_main_process
        handle = self._handler(os.getpid(), tells)
        self._undo = ExitStack()
        taken = [number for number in self._signals if not _is_left_alone(number)]
        self._undo.enter_context(ignore_signals_in_workers(taken))
        self._protect_workers(args.dataloader)
        for number in taken:
            self._undo.callback(_restore, number, signal.getsignal(number))
            signal.signal(number, handle)
        args.run.agreement.topic(
            self.name, find=lambda: self._received, tell=partial(self._stop, args)
        )

    def _protect_workers(self, loader: Any) -> None:
        loader = getattr(loader, "base_dataloader", loader)  # what Accelerate has wrapped
        if isinstance(loader, DataLoader) and not isinstance(loader.worker_init_fn, IgnoreSignals):
            self._undo.callback(setattr, loader, "worker_init_fn", loader.worker_init_fn)
            loader.worker_init_fn = IgnoreSignals(loader.worker_init_fn)

    def _end(self, args: PipelineHookArgs) -> None:
        self._undo.close()
        stopped = args.exception
        if isinstance(stopped, RunPreempted) and self._received and not self._stopping:
            # Nothing follows of it any more, but the reason is told.
            first = signal.Signals(self._received).name
            reason = f"received {first}, and a signal to stop at once"
            args.requests.stop(reason, by=self.name, exit_code=self._exit_code(self._received))
        if self._received and not self._stopping and args.exception is None:
            logger.warning(
                "%s: received %s when the last step was over; the run ends as it would without",
                *(self.name, signal.Signals(self._received).name),
            )

    def _check_savers(self, args: PipelineHookArgs) -> None:
        check_savers(args, self.name)

    def _stop(self, args: PipelineHookArgs, received: int) -> None:
        """On all ranks alike, when one of them has received a signal."""
        if not self._stopping:
            self._stopping = True
            interrupt(
                args,
                f"received {signal.Signals(received).name}",
                self.name,
                exit_code=self._exit_code(received),
                save=self.cfg.save_checkpoint,
            )

    def _exit_code(self, number: int) -> int:
        return 128 + number if self.cfg.exit_code is None else self.cfg.exit_code

    def _handler(self, main_process: int, tells: bool) -> Callable[[int, FrameType | None], None]:
        before = {number: signal.getsignal(number) for number in self._signals}
        launched = "WORLD_SIZE" in os.environ or "SLURM_JOB_ID" in os.environ
        same_request_s = _SAME_LAUNCHED_REQUEST_S if launched else _SAME_REQUEST_S

        def handle(number: int, frame: FrameType | None) -> None:
            # Between any two instructions of the main thread: no locks, so no log, in here.
            if os.getpid() != main_process:  # in a fork, which is none of this hook's business
                _restore(signal.Signals(number), before[signal.Signals(number)])
                os.kill(os.getpid(), number)
                return
            if another_failed():  # the launcher ends this process, which ends already
                return
            now = time.monotonic()
            if not self._received:
                self._received, self._received_at = number, now
                if tells:
                    _tell(
                        f"{self.name}: {signal.Signals(number).name}: stopping at the next commit "
                        "point; once more to stop at once\n"
                    )
            elif now - self._received_at > same_request_s:
                for each in self._signals:
                    signal.signal(each, before[each] or signal.SIG_DFL)
                raise RunPreempted(self._exit_code(number))

        return handle


class PreemptionConfig(PipelineHooksConfig[Preemption]):
    """Which signals to take, and how the process then ends.

    >>> PreemptionConfig(signals=("SIGTERM",), exit_code=75)().name
    'Preemption'
    """

    class_type: type[Preemption] = Preemption
    signals: tuple[str, ...] = Field(
        default=tuple(n for n in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, n)),
        min_length=1,
        description="The names of the signals; SIGINT is Ctrl-C.",
    )
    exit_code: int | None = Field(
        default=None,
        ge=0,
        le=255,
        description="What the process ends with; by default 128 + the signal's number. 75 "
        "stands for 'try again' with schedulers that look for it.",
    )
    save_checkpoint: bool = Field(
        default=True,
        description="Whether a checkpoint is saved ahead of the end, by the hooks that save.",
    )

    @field_validator("signals")
    @classmethod
    def _can_be_handled(cls, signals: tuple[str, ...]) -> tuple[str, ...]:
        for name in signals:
            if name not in signal.Signals.__members__:
                raise ValueError(f"this system has no signal {name!r}; SIGTERM, SIGUSR1 are some")
            if name in _CAN_NOT_BE_HANDLED:
                raise ValueError(f"{name} can't be handled; leave it out")
        return tuple(dict.fromkeys(signals))


def _is_left_alone(number: signal.Signals) -> bool:
    """Whether it is a Ctrl-C that is not meant for this process, as a job in a shell's background.

    Its parent then has it ignored, which Python leaves so, too.
    """
    return number == signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN


def _restore(number: signal.Signals, handler: Any) -> None:
    # None stands for a handler that was not installed by Python, which can't be put back.
    signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _tell(text: str) -> None:
    with suppress(OSError):
        os.write(2, text.encode())
