"""The engine: from a model, data and hooks to a trained model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LRScheduler

from robo_orchard_lab.pipeline.batch_processor import BatchProcessor
from robo_orchard_lab.pipeline.context import PipelineHookArgs, PipelineRun
from robo_orchard_lab.pipeline.data import DataOrder, TrainingData
from robo_orchard_lab.pipeline.data.loader import explain_no_batch
from robo_orchard_lab.pipeline.distributed.agreement import Agreement
from robo_orchard_lab.pipeline.distributed.job_store import Place
from robo_orchard_lab.pipeline.distributed.sections import end_together
from robo_orchard_lab.pipeline.distributed.stall_clock import StallClock
from robo_orchard_lab.pipeline.errors import (
    DataError,
    PipelineConfigError,
    PipelineStateError,
    RunPreempted,
)
from robo_orchard_lab.pipeline.hook_set import HookLike, PipelineHooks, check_unique_names
from robo_orchard_lab.pipeline.hooks.optimizer import LRSchedulerUnit, OptimizerHook
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.metrics import MetricsBoard, UnknownMetricError
from robo_orchard_lab.pipeline.progress import TrainerLimits, TrainerProgress
from robo_orchard_lab.pipeline.requests import Requests
from robo_orchard_lab.pipeline.run.run_state import RunStateFile
from robo_orchard_lab.pipeline.trainer.accumulation import AccumulationWindows, padding_step
from robo_orchard_lab.pipeline.trainer.commit import carry_out_requests, tell_what_is_left
from robo_orchard_lab.pipeline.trainer.loss_weights import LossWeights, wrong_result
from robo_orchard_lab.pipeline.trainer.rank_consistency import (
    check_rank_consistency,
    hook_text,
    setup_texts,
)
from robo_orchard_lab.pipeline.trainer.rank_state import trained_parameters
from robo_orchard_lab.pipeline.trainer.resume import resume
from robo_orchard_lab.pipeline.trainer.setup import (
    backward_of,
    check_processor,
    no_sync_of,
    prepare_objects,
    synchroniser_of,
)
from robo_orchard_lab.pipeline.trainer.snapshot import RunSnapshots

logger = job_logger(__name__)

_ONE_SAMPLE = (
    "such a layer can't be trained on a batch of one sample, which the last step of an epoch may "
    "leave to a process; drop_last=True in the data loader leaves that step out"
)


class HookBasedTrainer:
    """Trains a model; everything beyond the loop is done by hooks.

    Calling it runs this, where ``with on_x`` stands for the hooks of a channel, the first
    registered outermost::

        with on_loop:
            while no limit is reached and no hook has asked to stop:
                with on_epoch:
                    for batch in dataloader:
                        with on_step:
                            with on_batch:
                                with on_model_forward:
                                    outputs, loss = batch_processor.forward(model, batch)
                                with on_model_backward:
                                    (loss / divisor).backward()
                            # OptimizerHook, the outermost hook of on_step, when it is left
                            # at an accumulation boundary:
                            with on_optimizer_step:
                                optimizer.step(); lr_scheduler.step(); optimizer.zero_grad()
                        progress.finish_step()
                        commit point
                progress.finish_epoch()
                commit point

    With gradient accumulation (``Accelerator(gradient_accumulation_steps=n)``), ``divisor`` weighs
    each batch by its samples in the window of up to n batches that ends in an update. The last
    window of an epoch may be shorter; so may the one in which ``max_step`` is reached, and in a run
    that goes on from there the first, which ends where that one would have. With several processes,
    the window is that of all of them. Where the processor returns ``(outputs, loss, weight)``, the
    update is that of the mean over these weights instead.

    A model in evaluation mode is put in training mode at the start; one in training mode is left
    as it is, so that parts that you have put in evaluation mode stay there.

    Args:
        accelerator: devices, processes and precision.
        model: any module, also compiled; prepared here unless it is prepared already. One that
            torch's ``fully_shard`` has divided among the processes stays so; the optimizer is made
            after it.
        dataloader: a torch ``DataLoader`` or any iterable of batches, iterated once an epoch, in
            the order that ``data_order`` says.
        batch_processor: from a batch to outputs and loss.
        optimizer: needed where the processor needs a backward pass. On devices torch takes its
            ``foreach`` implementation by itself; ``fused=True`` takes one kernel for all of an
            update, also of a sharded model.
        lr_scheduler: moves once for each committed update, whatever the number of processes.
        hooks: bundles of hooks and configurations that build them, in any mixture, or a mapping
            that names them; the first is the outermost.
        max_step: stop after this many batches.
        max_optimizer_step: stop after this many committed updates.
        max_epoch: stop after this many passes over the data.
        lr_scheduler_every: when the schedule moves, see :class:`OptimizerHook`.
        run_folder: where the run keeps what it writes, by hooks that are not told otherwise; made
            when it is needed.
        resume_from: a checkpoint's folder, to go on from there; or ``"auto"`` for the newest whole
            one of the first ``SaveCheckpoint``, or else in ``run_folder/checkpoints``, and for a
            fresh run where there is none yet.
        data_order: what the order of samples and the random numbers of loading follow from.
        agree_every: with how many steps ranks exchange what one of them may have found out alone,
            such as a signal, see :class:`Agreement`; None for as often as takes a hundredth of
            the time. Where no hook needs it, they don't.
        stall_timeout_s: where the run makes no progress for so long, every rank writes the stacks
            of its threads to ``run_folder/stalled`` (without a folder, to the standard error
            output), and the processes end with 1. Steps, updates, batches of evaluations and files
            of checkpoints are progress; a first step that compiles the model, a long commit point
            of a hook's, or a debugger is none, so give it more than the longest of these.

    Raises:
        PipelineConfigError: no limit, no optimizer where one is needed, several launched
            processes that do not know of each other, or ranks that differ in what has to be alike
            on all of them: the message shows in what, and which.
        HookRegistrationError: two hooks of one name, or something that is no hook.
        CheckpointError: ``resume_from`` can't be read or is damaged; with ``"auto"``, there are
            checkpoints, and all of them are.
        StoreLockedError: with ``"auto"``, another run saves in the same folder.
        StateError: ``resume_from`` is that of another model, optimizer, schedule, data or set of
            hooks, or, within an epoch, of another number of samples a step.
    """

    @end_together()
    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        dataloader: Iterable[Any],
        batch_processor: BatchProcessor,
        optimizer: torch.optim.Optimizer | None = None,
        lr_scheduler: LRScheduler | None = None,
        hooks: HookLike | Iterable[HookLike] | Mapping[str, HookLike] | None = None,
        *,
        max_step: int | None = None,
        max_optimizer_step: int | None = None,
        max_epoch: int | None = None,
        lr_scheduler_every: LRSchedulerUnit | None = None,
        run_folder: str | os.PathLike[str] | None = None,
        resume_from: str | os.PathLike[str] | None = None,
        data_order: DataOrder | None = None,
        agree_every: int | None = None,
        stall_timeout_s: float | None = None,
    ) -> None:
        self.limits = TrainerLimits(max_step, max_optimizer_step, max_epoch)
        check_processor(batch_processor, optimizer, self.limits)
        self.accelerator = accelerator
        self.batch_processor = batch_processor
        self.progress = TrainerProgress()
        self.metrics = MetricsBoard(self.progress)
        self._stall_clock = (
            None
            if stall_timeout_s is None
            else StallClock(stall_timeout_s, self.progress, run_folder, accelerator.process_index)
        )
        agreement = Agreement(accelerator.process_index, accelerator.num_processes, agree_every)
        self.requests = Requests(agreement)
        self._hooks = PipelineHooks()

        several = accelerator.num_processes > 1
        if several:
            given = setup_texts(
                *(accelerator, model, optimizer, lr_scheduler, dataloader, batch_processor),
                limits=self.limits,
                lr_scheduler_every=lr_scheduler_every,
                run_folder=run_folder,
                resume_from=resume_from,
                data_order=data_order,
                agree_every=agree_every,
            )
            check_rank_consistency(given)  # ahead of the first collective that relies on it
        prepared = prepare_objects(accelerator, model, optimizer, lr_scheduler, dataloader)
        self.model = prepared.model
        self.dataloader = dataloader
        self._place = prepared.place
        self._no_sync = no_sync_of(accelerator, prepared.model)
        self._tell_shards = synchroniser_of(accelerator, prepared.model)
        self._optimizer_hook: OptimizerHook | None = None
        if batch_processor.need_backward and prepared.optimizer is not None:
            self._optimizer_hook = OptimizerHook(
                accelerator,
                prepared.optimizer,
                prepared.lr_scheduler,
                self.hooks,
                lr_scheduler_every,
            )
            self.hooks += self._optimizer_hook
        self.hooks += PipelineHooks.from_hooks(hooks)
        self.optimizer = self._optimizer_hook.optimizer if self._optimizer_hook else None
        self.lr_scheduler = self._optimizer_hook.lr_scheduler if self._optimizer_hook else None

        self._data = TrainingData(dataloader, data_order or DataOrder(), accelerator, self.progress)
        self._run = PipelineRun(
            progress=self.progress,
            metrics=self.metrics,
            requests=self.requests,
            agreement=agreement,
            batch_processor=batch_processor,
            limits=self.limits,
            accelerator=accelerator,
            model=self.model,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            dataloader=self.dataloader,
            data=self._data,
            folder=None if run_folder is None else Path(run_folder),
            state_file=RunStateFile(
                run_folder,
                self.progress,
                rank=accelerator.process_index,
                processes=accelerator.num_processes,
            ),
        )
        self._weights = LossWeights(
            accelerator,
            accelerator.gradient_accumulation_steps,
            backward_of(accelerator),
            partial(trained_parameters, self._run),
        )
        self._windows = AccumulationWindows(
            accelerator.gradient_accumulation_steps,
            getattr(batch_processor, "count_samples", None),
            self._data.num_processes,
            accelerator.num_processes,
            self._weights,
        )
        self._snapshots = RunSnapshots(self._run, self.hooks, self._data, self._windows)
        self._run.take_snapshot = self._snapshots.take
        self._open = False
        self._resumed = False
        self._synchronising = accelerator.sync_gradients = True
        self._last_loss: torch.Tensor | None = None
        self._unmet: UnknownMetricError | None = None
        self._logged_at: int | None = None
        """How many steps were done at the last logging point within an epoch."""

        channel = self.hooks.get_channel  # looked up once: the step path calls these
        self._on_loop = channel("on_loop").run
        self._on_epoch = channel("on_epoch").run
        self._on_step = channel("on_step").run
        self._on_batch = channel("on_batch").run
        self._on_model_forward = channel("on_model_forward").run
        self._on_model_backward = channel("on_model_backward").run
        self._in_step = self._step_or_padding_step if several else self._step
        self._carry_out = partial(carry_out_requests, self._run, channel("on_evaluation").run)

        if resume_from is not None:
            with self._run.state_file.around_resume(), end_together(self._stall_clock):
                self._check_hooks_alike()
                self._resumed = resume(self._run, self.hooks, self._snapshots, resume_from)

    @property
    def hooks(self) -> PipelineHooks:
        """All hooks of the run; add to them by ``trainer.hooks += hook``."""
        return self._hooks

    @hooks.setter
    def hooks(self, hooks: PipelineHooks) -> None:
        if hooks is not self._hooks:  # which is what += assigns
            raise PipelineConfigError(
                "a trainer's hooks can't be replaced; add to them by trainer.hooks += hook"
            )

    def save_checkpoint(self, folder: str | os.PathLike[str]) -> None:
        """Write all that a trainer needs to go on as this one would, for ``resume_from``.

        That is the model, the optimizer, the schedule, the counters, the place in the data, the
        state of every hook, the random state, and the gradients of an accumulation window that is
        open. The weights stand alone in ``model.safetensors``, those of a sharded model in
        ``model.shard<rank>.safetensors``. All ranks call it alike. While the run goes on, a
        ``SaveCheckpoint`` saves it.

        Args:
            folder: where to write; must not exist. It appears when all of it is on the disk.

        Raises:
            PipelineStateError: the trainer is in the middle of a step.
            FileExistsError: there is something by that name.
            CheckpointError: it can't be written.
            StateError: a hook's or the schedule's state holds something that can't be saved.
        """
        if self._open:
            raise PipelineStateError(
                "the trainer is in the middle of a step; save after it has returned, or ask for "
                "it with args.requests.save(...) and a SaveCheckpoint"
            )
        with end_together(self._stall_clock):
            self._snapshots.save(folder)

    def __call__(self) -> None:
        """Train until a limit is reached or a hook's request to stop is granted.

        Called again after its end, it does nothing. An error gets a note that says where in the
        run it happened; what was in the making then is in no state to go on from.

        Raises:
            PipelineStateError: the trainer has failed before, or is called by one of its hooks.
            PipelineConfigError: the ranks have unlike hooks; the message shows those of each.
            UnknownMetricError: at the end, a hook has waited for a metric that nobody published;
                the trainer can still be saved.
            RunPreempted: at the end, where the request to stop had an exit code.
        """
        if self._open:
            raise PipelineStateError(
                "the trainer is in the middle of a step, where it failed or was called from; "
                "make a new one, and resume from a checkpoint"
            )
        if self._is_over():
            logger.info("nothing left to do at %s; %s", self.progress, self.limits)
            if self._is_at_limit():
                self._run.state_file.nothing_left()
            return
        together = end_together(self._stall_clock, self._place_in_run)
        with self._run.state_file.around_run(self.requests), together:
            self._check_hooks_alike()
            self._train()

    def _place_in_run(self, section: int) -> Place:
        steps = self.progress.steps_done  # first: what they were asked for ahead of it is known
        return Place(section, steps, *self.requests.joint_commits, self._weights.given)

    def _check_hooks_alike(self) -> None:
        if self.accelerator.num_processes > 1:
            check_rank_consistency({"hooks": hook_text(self.hooks)})

    def _train(self) -> None:
        check_unique_names(self.hooks.named_hooks())
        if not self.model.training:
            self.model.train()
        if self._optimizer_hook is not None and not self._resumed:
            self._optimizer_hook.zero_grad()  # a resumed run may be within a window
        self._open = True
        try:
            self._on_loop(PipelineHookArgs(self._run), self._loop)
        except BaseException as error:
            with suppress(Exception):  # not every error takes notes
                error.add_note(f"the run was at {self.progress}")
                if "Expected more than 1 value per channel when training" in str(error):
                    error.add_note(_ONE_SAMPLE)
            raise
        finally:
            self._last_loss = None
            if not self._synchronising:  # as the model was given
                self._synchronise(True)
        self._open = False
        tell_what_is_left(self._run)
        if self._unmet is not None:  # raised here, where the run is whole and can be saved
            raise self._unmet
        failure = self._run.failures[0] if self._run.failures else None
        self._run.failures.clear()
        exit_code = self._interrupted_by()
        if exit_code is not None:
            raise RunPreempted(exit_code) from failure
        if failure is not None:
            raise failure

    def _loop(self, loop_args: PipelineHookArgs) -> None:
        all_logged = False  # whether nothing was published since the last logging point
        if self.progress.step_id == 0:
            self._snapshots.go_on_drawing()
            self._carry_out()  # what hooks have asked for at the start
        while not self._is_over():
            args = PipelineHookArgs(self._run)
            self._on_epoch(args, self._epoch)
            if args.epoch_completed:
                self.progress.finish_epoch()
            all_logged = self._carry_out() or (  # the commit point
                self._logged_at == self.progress.global_step_id and not args.epoch_completed
            )
            if args.epoch_completed and self._unmet is None and not self._is_over():
                self._unmet = self.metrics.find_missing(at_end=False)
                first = self.progress.epoch_id == 1
                problem = self._unmet or (self.metrics.find_unlogged() if first else None)
                if problem is not None:
                    logger.warning("after a whole epoch, %s", problem)
        self._save_the_end()
        if not all_logged:
            self.metrics.flush_partial(self.accelerator)
        # A run that was asked to stop may not have come to its first evaluation.
        # Nor may a short one, whose evaluations were not due.
        evaluated = any(name.startswith("eval/") for name in self.metrics.names())
        cut_short = self.requests.stop_request is not None or (
            bool(self._run.evaluations) and not evaluated
        )
        self._unmet = self.metrics.find_missing(at_end=not cut_short)
        request = self.requests.stop_request
        if request is not None:
            logger.info("stopped at %s: %s, asked by %s", self.progress, request.reason, request.by)

    def _epoch(self, args: PipelineHookArgs) -> None:
        if self._is_over():  # asked for by a hook that is around the epoch
            return
        progress, done, max_step = self.progress, self.progress.step_id, self.limits.max_step
        step = self._on_step if self._windows.length == 1 else self._on_step_in_window
        requests, reached = self.requests, self.limits.reached
        agreement = self._run.agreement if self._run.agreement.is_needed else None
        length = self._run.steps_per_epoch
        limit = None if max_step is None else max_step - progress.global_step_id + done
        over = False
        self._snapshots.go_on_drawing()
        # Kept by no name here: an error that is kept would keep the loader's workers with it.
        for batch, ends_window, divisor in self._windows.micro_batches(
            self._data.epoch(progress.epoch_id, done),
            self._data.step_sizes,
            done,
            limit=None if limit == length else limit,
        ):
            if over:  # and there are more batches than the loader's length says
                break
            if self._place is not None:
                batch = self._place(batch)
            progress.in_step = True
            step(PipelineHookArgs(self._run, batch, ends_window, divisor), self._in_step)
            progress.finish_step()
            if agreement is not None and progress.global_step_id >= agreement.due_at:
                agreement.settle(progress.global_step_id)  # a collective, with several processes
            # The commit point. Spelled out, since a call takes 0.5 us here.
            if requests.pending or reached(progress):
                over = self._is_over()
                if progress.step_id == length:
                    # What was asked for waits for the commit point after the epoch, which is as
                    # near. Some samplers draw once more when they are asked for one batch too many.
                    continue
                if not over and self._carry_out():
                    self._logged_at = progress.global_step_id
                if self._is_over():
                    # Without a length, only asking for one batch more could tell whether this
                    # was the last one; the epoch then counts as open.
                    return
        if progress.step_id == 0:
            raise DataError(
                f"the dataloader gave no batch in epoch {progress.epoch_id}; "
                + explain_no_batch(self.dataloader)
            )
        args.epoch_completed = True

    def _on_step_in_window(
        self, args: PipelineHookArgs, body: Callable[[PipelineHookArgs], None]
    ) -> None:
        """``on_step`` with gradients that travel between ranks only where a window ends."""
        boundary = args.at_accumulation_boundary
        if boundary is not self._synchronising:
            self._synchronise(boundary)
        if boundary or self._no_sync is None:
            self._on_step(args, body)
        else:
            with self._no_sync():
                self._on_step(args, body)

    def _synchronise(self, synchronise: bool) -> None:
        self._synchronising = self.accelerator.sync_gradients = synchronise
        if self._tell_shards is not None:  # which goes through all modules
            self._tell_shards(synchronise)

    def _step_or_padding_step(self, args: PipelineHookArgs) -> None:
        """``_step`` where there are several ranks, of which one may have no data left."""
        if not args.is_padding_step:
            self._step(args)
        else:
            with padding_step(self.model):
                self._step(args)

    def _step(self, args: PipelineHookArgs) -> None:
        self._on_batch(args, self._batch)

    def _batch(self, args: PipelineHookArgs) -> None:
        if self.batch_processor.need_backward:
            self._on_model_forward(args, self._forward)
            self._on_model_backward(args, self._backward)
        else:
            with torch.no_grad():
                self._on_model_forward(args, self._forward)

    def _forward(self, args: PipelineHookArgs) -> None:
        result = self.batch_processor.forward(self.model, args.batch)
        # A tensor of two rows would unpack as well, hence the check of the type.
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            self._weights.take(args, result)
        else:
            args.model_outputs, args.attached_loss = result

    def _backward(self, args: PipelineHookArgs) -> None:
        loss = args.attached_loss
        if not isinstance(loss, torch.Tensor):
            raise wrong_result(args, f"a loss of type {type(loss).__name__}")
        self._weights.backward(args, loss)
        # As a plain loop's variable would: where the graph lives on into the next forward, the
        # parameters' nodes are not made anew, which takes 1 us of a small model's step.
        self._last_loss = loss

    def _save_the_end(self) -> None:
        """Have what a run that is over ends with on the disk, where a hook saves it."""
        if self._run.savers and self._interrupted_by() is None:
            self.requests.save("the run ends", by=type(self).__name__)
            self._carry_out()

    def _is_over(self) -> bool:
        """At a commit point, where scopes are closed and state is consistent: whether to end."""
        return self.requests.stop_request is not None or self._is_at_limit()

    def _interrupted_by(self) -> int | None:
        """The code to exit with where the run is to be started again; None where it is over."""
        stop = self.requests.stop_request
        return None if stop is None or self._is_at_limit() else stop.exit_code

    def _is_at_limit(self) -> bool:
        return self.limits.reached(self.progress)
