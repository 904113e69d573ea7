"""Training engine: loop, epoch, step and commit point, with hooks around each of them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LRScheduler

from robo_orchard_core.utils.hook.errors import CONFIGURED_AT, origin_of
from robo_orchard_lab.pipeline.batch_processor import BatchProcessor
from robo_orchard_lab.pipeline.context import SKIP_TOO_LATE, PipelineHookArgs
from robo_orchard_lab.pipeline.data import DataOrder, TrainingData
from robo_orchard_lab.pipeline.data.loader import explain_no_batch
from robo_orchard_lab.pipeline.distributed.agreement import Agreement
from robo_orchard_lab.pipeline.distributed.failure_watch import fail_together
from robo_orchard_lab.pipeline.distributed.job_store import RankPosition
from robo_orchard_lab.pipeline.distributed.stall_clock import StallClock
from robo_orchard_lab.pipeline.errors import (
    CheckpointError,
    DataError,
    PipelineConfigError,
    PipelineStateError,
    RunPreempted,
)
from robo_orchard_lab.pipeline.hook_set import HookLike, PipelineHooks, check_unique_names
from robo_orchard_lab.pipeline.hooks.optimizer import (
    LRSchedulerUnit,
    NamedOptimizersHook,
    OptimizerHook,
)
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.metrics import MetricsBoard
from robo_orchard_lab.pipeline.model import forward_in_context
from robo_orchard_lab.pipeline.out_of_memory import FittingBatch
from robo_orchard_lab.pipeline.pipeline_run import Locate, PipelineRun, dotted_setting
from robo_orchard_lab.pipeline.plan import RunPlan, write_plan
from robo_orchard_lab.pipeline.progress import TrainerLimits, TrainerProgress
from robo_orchard_lab.pipeline.requests import Requests
from robo_orchard_lab.pipeline.run.durable import OutputFile
from robo_orchard_lab.pipeline.run.run_info import describe_run
from robo_orchard_lab.pipeline.run.run_state import RunStateFile
from robo_orchard_lab.pipeline.trainer import setup
from robo_orchard_lab.pipeline.trainer.accumulation import AccumulationWindows, padding_step
from robo_orchard_lab.pipeline.trainer.commit import CommitPoint, check_metric_names
from robo_orchard_lab.pipeline.trainer.evaluation import EvaluationMethods
from robo_orchard_lab.pipeline.trainer.loss_weights import LossWeights, wrong_result
from robo_orchard_lab.pipeline.trainer.named_losses import NamedLosses
from robo_orchard_lab.pipeline.trainer.rank_consistency import (
    ReplicaCheck,
    check_rank_consistency,
    describe_hooks,
    describe_setup,
)
from robo_orchard_lab.pipeline.trainer.rank_state import trained_names, trained_parameters
from robo_orchard_lab.pipeline.trainer.resume import AUTO, LRChange, resume
from robo_orchard_lab.pipeline.trainer.skipped_batches import SkippedBatches
from robo_orchard_lab.pipeline.trainer.snapshot import RunSnapshots
from robo_orchard_lab.pipeline.trainer.updates import prepare_updates

logger = job_logger(__name__)

_CHANGED_WEIGHTS = (
    "weights or buffers changed between a forward pass and its backward pass: compute a loss after "
    "the yields that update its networks, and enter args.evaluating(weights=...) in an after of "
    "on_step, where no backward pass follows"
)
_ONE_SAMPLE = (
    "BatchNorm can't train on a batch of one sample, which the last step of an epoch may leave to "
    "a process; pass drop_last=True to the data loader to leave that step out"
)


class HookBasedTrainer(EvaluationMethods):
    """Trainer of a model; hooks do everything beyond the loop.

    Calling the trainer runs this, where ``with on_x`` stands for the hooks of a channel, the first
    registered outermost::

        with on_loop:
            while no limit is reached and no hook has requested a stop:
                with on_epoch:
                    for batch in dataloader:
                        with on_step:
                            with on_batch:
                                with on_model_forward:
                                    outputs, loss = batch_processor.forward(model, batch)
                                with on_model_backward:
                                    (loss / divisor).backward()
                            # OptimizerHook, the outermost hook of on_step, at its exit, at an
                            # accumulation boundary:
                            with on_optimizer_step:
                                optimizer.step(); lr_scheduler.step(); optimizer.zero_grad()
                        progress.finish_step()
                        commit point
                progress.finish_epoch()
                commit point

    With gradient accumulation (``Accelerator(gradient_accumulation_steps=n)``), ``divisor`` weights
    each batch by its samples in the accumulation window of up to n batches. The last window of an
    epoch may be shorter, and so may the window in which ``max_step`` is reached; a run that resumes
    from there completes that window first. With several processes, a window spans all processes.
    With several processes and a sharded model, a save or a stop that is requested within a window
    waits for the end of the window.
    If the processor returns ``(outputs, loss, weight)``, the optimizer step uses the mean over
    these weights instead.

    With ``optimizer={"g": ..., "d": ...}``, the batch processor names its losses: it yields
    ``"d", loss`` from a generator, or returns ``(outputs, {"d": loss, ...})``; see
    :class:`NamedLosses`. Each loss drives its own optimizer only.

    A model in evaluation mode is put in training mode at the start. A model in training mode keeps
    the modes of its submodules.

    Args:
        accelerator: devices, processes and precision.
        model: any module, also compiled; prepared here unless already prepared. A model sharded by
            torch's ``fully_shard`` stays sharded; create the optimizer after sharding.
        dataloader: a torch ``DataLoader`` or any iterable of batches, iterated once an epoch in
            the order of ``data_order``.
        batch_processor: computes outputs and loss of a batch.
        optimizer: required if the processor needs a backward pass. ``fused=True`` uses one kernel
            for an optimizer step, also for a sharded model. A mapping has several optimizers by
            name; each trainable parameter then belongs to exactly one of them.
        lr_scheduler: steps once per committed optimizer step, at any world size. With several
            optimizers, a mapping by their names.
        hooks: bundles of hooks and configurations of bundles, in any mixture, or a mapping that
            names them; the first is the outermost. None uses ``hooks.default_hooks()``, which show
            the progress and the losses; ``[]`` uses no hook.
        max_step: stop after this many steps.
        max_optimizer_step: stop after this many committed optimizer steps.
        max_epoch: stop after this many epochs.
        lr_scheduler_every: when the LR scheduler steps, see :class:`OptimizerHook`; or a mapping
            by the names of several optimizers.
        lr_scheduler_monitor: metric that ``ReduceLROnPlateau`` follows instead of the mean loss;
            or a mapping by name.
        run_folder: directory for the files of hooks without a path of their own; created on
            demand.
        resume_from: directory of a checkpoint, or ``"auto"`` for the newest intact checkpoint of
            the first ``SaveCheckpoint`` hook, else of ``run_folder/checkpoints``, whose weights and
            optimizer state are finite. With ``"auto"`` and no checkpoint, the run starts fresh.
        data_order: source of the sample order and of the RNG in data loading.
        agree_every: number of steps between exchanges of rank-local requests, such as signals, see
            :class:`Agreement`; None adapts the interval to cost 1 % of the time. Ranks exchange
            nothing if no hook needs the exchange.
        stall_timeout_s: time without progress, in seconds, after which every rank writes the
            stacks of its threads to ``run_folder/stalled`` (without a run folder, to standard
            error) and exits with code 1. Steps, optimizer steps, batches of an evaluation and
            files of a checkpoint count as progress. Allow for a first step that compiles the
            model, for a hook's long work at a commit point, and for a debugger.
        default_hooks: False uses no hook if ``hooks`` is None.
        lr_settings: plain data that identifies the learning rates and LR schedulers, such as
            ``{"lr": 0.1, "schedule": "cosine"}``; saved in checkpoints. A run that resumes with
            other settings than the checkpoint's keeps its own learning rates and LR schedulers,
            the latter stepped to the counters, and logs both. By default, and with equal settings,
            a resume restores those of the checkpoint.
        locate: returns the place of a setting in an experiment's file, for messages.

    Raises:
        PipelineConfigError: no limit, an argument of the wrong type, a missing optimizer, a
            parameter of several optimizers or of none of several, an LR scheduler of another
            optimizer, ``lr_scheduler_every`` without an LR scheduler, several
            launched processes without a process group, or ranks with different settings; the
            message shows the difference.
        HookRegistrationError: two hooks with one name, or an object that is not a hook.
        CheckpointError: ``resume_from`` can't be read or is damaged; with ``"auto"``, all
            checkpoints are damaged or non-finite.
        StoreLockedError: with ``"auto"``, another run saves in the same directory.
        StateError: ``resume_from`` belongs to a different model, optimizer, LR scheduler, data or
            set of hooks, or, within an epoch, to a different number of samples per step.
    """

    @setup.refuse_foreign_arguments
    @fail_together()
    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        dataloader: Iterable[Any],
        batch_processor: BatchProcessor,
        optimizer: torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer] | None = None,
        lr_scheduler: LRScheduler | Mapping[str, LRScheduler] | None = None,
        hooks: HookLike | Iterable[HookLike] | Mapping[str, HookLike] | None = None,
        *,
        max_step: int | None = None,
        max_optimizer_step: int | None = None,
        max_epoch: int | None = None,
        lr_scheduler_every: LRSchedulerUnit | Mapping[str, LRSchedulerUnit] | None = None,
        lr_scheduler_monitor: str | Mapping[str, str] | None = None,
        run_folder: str | os.PathLike[str] | None = None,
        resume_from: str | os.PathLike[str] | None = None,
        data_order: DataOrder | None = None,
        agree_every: int | None = None,
        stall_timeout_s: float | None = None,
        default_hooks: bool = True,
        lr_settings: Mapping[str, Any] | None = None,
        locate: Locate | None = None,
    ) -> None:
        self.limits = TrainerLimits(max_step, max_optimizer_step, max_epoch)
        objects = accelerator, model, dataloader, batch_processor, optimizer, lr_scheduler
        setup.check_objects(*objects, self.limits)
        self.accelerator = accelerator
        self.model = model
        self.dataloader = dataloader
        self.batch_processor = batch_processor
        self.progress = TrainerProgress()
        rank, world_size = accelerator.process_index, accelerator.num_processes
        self._agreement = Agreement(rank, world_size, agree_every)
        self.requests = Requests(self._agreement)
        self.metrics = MetricsBoard(self.progress, self.requests.require_commit)
        self._hooks = PipelineHooks()
        self._stall_clock: StallClock | None = None
        if stall_timeout_s is not None:
            self._stall_clock = StallClock(stall_timeout_s, self.progress, run_folder, rank)
        self._last_loss: torch.Tensor | None = None
        self._fitting = FittingBatch()
        self._is_open = self._resumed = False
        options = {
            "limits": self.limits,
            "lr_scheduler_every": lr_scheduler_every,
            "lr_scheduler_monitor": lr_scheduler_monitor,
            "run_folder": run_folder,
            "resume_from": resume_from,
            "data_order": data_order,
            "agree_every": agree_every,
            "lr_settings": lr_settings,
        }
        self._locate = locate
        self._set_up(optimizer, lr_scheduler, hooks, default_hooks, options)

    def _set_up(
        self,
        optimizer: torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer] | None,
        lr_scheduler: LRScheduler | Mapping[str, LRScheduler] | None,
        hooks: HookLike | Iterable[HookLike] | Mapping[str, HookLike] | None,
        default_hooks: bool,
        options: Mapping[str, Any],
    ) -> None:
        """Prepare the objects with Accelerate, connect hooks, data and run, and resume.

        Collectives in a job of several ranks.
        """
        accelerator, world_size = self.accelerator, self.accelerator.num_processes
        if world_size > 1:  # before the first collective that relies on equal settings
            objects = self.model, self.dataloader, self.batch_processor
            updates = optimizer, lr_scheduler
            check_rank_consistency(describe_setup(accelerator, *objects, *updates, options))

        self.model, self._optimizer_hook, scalers = prepare_updates(
            accelerator,
            self.model,
            optimizer,
            lr_scheduler,
            self.hooks,
            options,
            need_backward=self.batch_processor.need_backward,
        )
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.lr_schedulers: dict[str, LRScheduler] = {}
        if self._optimizer_hook is not None:
            self.optimizers = self._optimizer_hook.optimizers
            self.lr_schedulers = self._optimizer_hook.lr_schedulers
            self.progress.optimizer_steps = {name: 0 for name in self.optimizers if name}
            self.hooks += self._optimizer_hook
        self._processor, self._processed_model = forward_in_context(
            self.batch_processor, self.model, accelerator
        )
        self._place = setup.batch_placement(accelerator, self.dataloader)
        self._no_sync = setup.no_sync_context(accelerator, self.model)
        self._set_sharded_sync = setup.gradient_sync_switch(accelerator, self.model)
        self._engine_backward = setup.engine_backward(accelerator)
        self._engine_divides = accelerator.distributed_type in setup.ENGINES
        self._synchronising = accelerator.sync_gradients = True

        if hooks is None and default_hooks:
            from robo_orchard_lab.pipeline import hooks as built_in  # imports three more modules

            hooks = built_in.default_hooks()
        self.hooks += PipelineHooks.from_hooks(hooks)

        run_folder = options["run_folder"]
        self._data = TrainingData(
            self.dataloader,
            options["data_order"] or DataOrder(),
            accelerator,
            self.progress,
            getattr(self.batch_processor, "count_samples", None),
        )
        self._run = PipelineRun(
            accelerator=accelerator,
            model=self.model,
            batch_processor=self.batch_processor,
            limits=self.limits,
            progress=self.progress,
            metrics=self.metrics,
            agreement=self._agreement,
            requests=self.requests,
            optimizers=self.optimizers,
            lr_schedulers=self.lr_schedulers,
            scalers=scalers,
            dataloader=self.dataloader,
            data=self._data,
            folder=None if run_folder is None else Path(run_folder),
            state_file=RunStateFile(
                run_folder, self.progress, rank=accelerator.process_index, processes=world_size
            ),
            lr_settings=json.loads(json.dumps(options["lr_settings"])),  # as a checkpoint has them
            locate=self._locate or dotted_setting,
        )
        self.report, self.scalers = self._run.report, self._run.scalers
        window = accelerator.gradient_accumulation_steps
        self._loss_weights = LossWeights(
            accelerator, window, partial(trained_parameters, self._run)
        )
        self._windows = AccumulationWindows(
            window,
            self._data.counter,
            self._data.num_processes,
            world_size,
            self._loss_weights,
            self._data.loads_ahead,
        )
        self._skipped = SkippedBatches(
            self._run,
            self._windows,
            self._loss_weights,
            partial(trained_parameters, self._run),
            self._zero_grad,
        )
        self._replicas = ReplicaCheck(self._run, partial(trained_names, self._run))
        self._snapshots = RunSnapshots(
            self._run, self.hooks, self._data, self._windows, self._replicas.check_weights
        )
        self._lr_change = LRChange(self._run, self.hooks)
        self._batch_body = self._batch
        if isinstance(self._optimizer_hook, NamedOptimizersHook):
            self._named_losses = NamedLosses(self._run, self.hooks, self._optimizer_hook)
            self._batch_body = self._named_batch
        elif self._optimizer_hook is not None:
            self._optimizer_hook.before_first_update(self._replicas.check_gradients)
        self._run.take_snapshot = self._snapshots.take
        self._run.describe = partial(describe_run, self._run, self.hooks)
        self._run.should_defer_saves = self._has_unreduced_gradients

        channel = self.hooks.get_channel  # looked up once: the step path calls these
        self._on_loop = channel("on_loop").run
        self._on_epoch = channel("on_epoch").run
        self._on_step = channel("on_step").run
        self._on_batch = channel("on_batch").run
        self._on_model_forward = channel("on_model_forward").run
        self._on_model_backward = channel("on_model_backward").run
        self._step_body = self._step if world_size == 1 else self._step_or_padding_step
        self._commit_point = CommitPoint(self._run, channel("on_evaluation").run)

        resume_from = options["resume_from"]
        if resume_from is not None:
            with self._run.state_file.around_resume(), fail_together(self._stall_clock):
                self._check_hooks_consistent()
                self._resumed = resume(
                    self._run, self.hooks, self._snapshots, resume_from, self._lr_change
                )

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """Optimizer as it is stepped; None without a backward pass, and with several optimizers.

        ``trainer.optimizers`` has several optimizers by name.
        """
        return self.optimizers.get("")

    @property
    def lr_scheduler(self) -> LRScheduler | None:
        """LR scheduler of :attr:`optimizer`, or None; see ``trainer.lr_schedulers``."""
        return self.lr_schedulers.get("")

    @property
    def hooks(self) -> PipelineHooks:
        """All hooks of the run; add a hook by ``trainer.hooks += hook``."""
        return self._hooks

    @hooks.setter
    def hooks(self, hooks: PipelineHooks) -> None:
        if hooks is not self._hooks:  # += assigns the same object
            raise PipelineConfigError(
                "a trainer's hooks can't be replaced; add to them by trainer.hooks += hook"
            )

    @property
    def resumed(self) -> bool:
        """True if the run was restored from a checkpoint."""
        return self._resumed

    def plan(self) -> RunPlan:
        """Return the hooks of the run in the order of execution, with their declared effects.

        ``print(trainer.plan())`` prints a tree, and ``rich.print`` nested boxes. A run with a
        ``run_folder`` writes the plan to ``plan.json``, and a resume logs the differences.
        """
        return RunPlan.of(self.hooks)

    def keep_files(self, *paths: str | os.PathLike[str]) -> None:
        """Write small files again during the run if they disappear, as with the run folder."""
        for path in paths:
            output = OutputFile(path, type(self).__name__, is_required=False, restore=True)
            output.write(Path(path).read_bytes())
            self._run.outputs[Path(os.path.abspath(path))] = output

    def save_checkpoint(self, folder: str | os.PathLike[str]) -> None:
        """Write a checkpoint of the run, for ``resume_from``. All ranks call it.

        The checkpoint holds the model, optimizer, LR scheduler, counters, data position, hook
        states, RNG states, and the gradients of an open accumulation window. The weights are in
        ``model.safetensors``, those of a sharded model in ``model.shard<rank>.safetensors``. While
        the run is in progress, use a ``SaveCheckpoint`` hook instead.

        Args:
            folder: directory to create; it appears when all files are on disk.

        Raises:
            PipelineStateError: the trainer is in the middle of a step.
            FileExistsError: the path exists.
            CheckpointError: the checkpoint can't be written.
            StateError: a hook or the LR scheduler has a state that can't be saved.
        """
        if self._is_open:
            raise PipelineStateError(
                "the trainer is in the middle of a step; save after it has returned, or request a "
                "save with args.requests.save(...) and a SaveCheckpoint hook"
            )
        with fail_together(self._stall_clock):
            self._snapshots.save(folder)

    def __call__(self) -> None:
        """Train until a limit is reached or a hook's request to stop is granted.

        A second call after the end returns at once. An error carries a note with the position in
        the run; the trainer can't continue after an error.

        Raises:
            PipelineStateError: the trainer failed before, or one of its hooks calls it.
            PipelineConfigError: ranks have different hooks; the message shows those of each rank.
            UnknownMetricError: before the first step, a hook waits for a metric that no hook
                publishes, see ``PipelineHooks.published_metrics``; or at the end, for a metric
                that was never published, and the trainer can still be saved.
            StateError: before the first step, a ``SaveCheckpoint`` can't save a state.
            CheckpointError: before the first step, there is no room for a checkpoint.
            RunPreempted: at the end, if the request to stop had an exit code.
            BatchProcessorError: in a step, losses of the wrong type, or for an unknown optimizer;
                or at the end, no loss for one of several optimizers.
        """
        if self._is_open:
            raise PipelineStateError(
                "the trainer is in the middle of a step, where it failed or was called from; "
                "create a new one, and resume from a checkpoint"
            )
        if self._is_over():
            logger.info("nothing left to do at %s; %s", self.progress, self.limits)
            if self._is_at_limit():
                self._run.state_file.nothing_left()
                self._check_optimizers_used()
            return
        failing_together = fail_together(self._stall_clock, self._rank_position)
        with self._run.state_file.around_run(self.requests), failing_together:
            self._check_hooks_consistent()
            if self._run.folder is not None and self.accelerator.is_main_process:
                done, events = self.progress.global_step_id, self._run.state_file.events
                write_plan(self._run.folder, self.plan(), done, events)
            self._train()

    def _rank_position(self, section: int) -> RankPosition:
        steps = self.progress.steps_done  # first: requests made before it are known
        return RankPosition(
            section, steps, *self.requests.joint_commits, self._loss_weights.are_used
        )

    def _check_hooks_consistent(self) -> None:
        if self.accelerator.num_processes > 1:
            check_rank_consistency({"hooks": describe_hooks(self.hooks)})

    def _train(self) -> None:
        check_unique_names(self.hooks.named_hooks())
        if not self.model.training:
            self.model.train()
        if self._optimizer_hook is not None:
            if isinstance(self._optimizer_hook, OptimizerHook):
                self._optimizer_hook.drop_gradients_outside(self.model)
            if not self._resumed:
                self._optimizer_hook.zero_grad()  # a resumed run may be within a window
        self._is_open = True
        self.report.begin()
        try:
            self._on_loop(PipelineHookArgs(self._run), self._loop)
            while self._is_rolling_back():
                self._roll_back()
                self.report.begin()
                self._on_loop(PipelineHookArgs(self._run), self._loop)
            self._replicas.check_weights(again=True)  # a collective
        except BaseException as error:
            with suppress(Exception):  # some errors refuse notes
                self._add_notes(error)
            raise
        finally:
            self._last_loss = None
            if not self._synchronising:  # restore the model's setting
                self._synchronise(True)
        self._is_open = False
        self._commit_point.raise_unmet()  # here, where the run is complete and can be saved
        failure = self._run.failures[0] if self._run.failures else None
        self._run.failures.clear()
        exit_code = self._preemption_exit_code()
        if exit_code is not None:
            raise RunPreempted(exit_code) from failure
        if failure is not None:
            raise failure
        if self._is_at_limit():
            self._check_optimizers_used()

    def _add_notes(self, error: BaseException) -> None:
        """Add position, place in the experiment's file, and known causes to an error."""
        error.add_note(f"the run was at {self.progress}")
        origin = origin_of(error) or ""
        for hook in self.hooks.all_hooks():
            if self._locate is not None and origin.startswith(repr(hook.name)):
                owners = [hook.name]
                if hook is self._optimizer_hook:
                    owners = ["optimizer", *["lr_scheduler"] * bool(self.lr_schedulers)]
                error.add_note(f"{CONFIGURED_AT}{' and '.join(map(self._locate, owners))}")
        if "Expected more than 1 value per channel when training" in str(error):
            error.add_note(_ONE_SAMPLE)
        if "has been modified by an inplace operation" in str(error):
            error.add_note(_CHANGED_WEIGHTS)

    def _check_optimizers_used(self) -> None:
        if isinstance(self._optimizer_hook, NamedOptimizersHook):
            self._optimizer_hook.check_used(self._run)

    def _loop(self, loop_args: PipelineHookArgs) -> None:
        commit_point = self._commit_point
        self._skipped.begin_loop()
        self.report.begun()
        commit_point.begin_loop()
        commit_point.warn_of_unwritten()
        for check in self._run.start_checks:
            check()
        self._run.start_checks.clear()
        check_metric_names(self._run, self.hooks)  # by then, evaluations know their names
        if self.progress.step_id == 0:
            self._snapshots.rank_states.restore_rng()
            commit_point.execute()  # requests made at the start of the loop
        self.requests.require_commit()  # after the first step, to record the sizes of its batch
        while not self._is_over():
            args = PipelineHookArgs(self._run)
            self._on_epoch(args, self._epoch)
            if self._is_rolling_back():
                return
            if args._epoch_completed:
                self.progress.finish_epoch()
                self._replicas.check_weights()  # a collective, with DDP
            commit_point.execute_after_epoch(args._epoch_completed)
            if self._is_rolling_back():
                return
            if args._epoch_completed and not self._is_over():
                commit_point.warn_of_metrics()
        if self._run.savers and self._preemption_exit_code() is None:
            self.requests.save("the run ends", by=type(self).__name__)
            commit_point.execute()
            if self._is_rolling_back():
                return
        commit_point.finish()

    def _is_rolling_back(self) -> bool:
        return self.requests.rollback_request is not None

    def _roll_back(self) -> None:
        """Load the newest healthy checkpoint on request, as a resumed run does; a collective.

        Raises:
            CheckpointError: there is no healthy checkpoint.
        """
        run, request = self._run, self.requests.pop_rollback()
        assert request is not None  # checked by the caller
        step = self.progress.global_step_id
        failed = (
            f"{request.by} requested a rollback at step {step} ({request.reason}), which failed"
        )
        try:
            self._resumed = resume(run, self.hooks, self._snapshots, AUTO, self._lr_change)
        except CheckpointError as error:
            raise CheckpointError(f"{failed}: {error}") from error
        if not self._resumed:
            raise CheckpointError(
                f"{failed}: there is no checkpoint yet; save earlier, as by every='first | 1 epoch'"
            )
        self._replicas.check_weights(again=True)  # a collective; the step was compared before
        self._commit_point = CommitPoint(run, self.hooks.get_channel("on_evaluation").run)
        logger.warning(
            "rolled back from step %d to step %d: %s, requested by %s",
            *(step, self.progress.global_step_id, request.reason, request.by),
        )
        run.state_file.rolled_back(step, request.reason)

    def _epoch(self, args: PipelineHookArgs) -> None:
        if self._is_over():  # requested by a hook around the epoch
            return
        progress, done, max_step = self.progress, self.progress.step_id, self.limits.max_step
        on_step = self._on_step if self._windows.length == 1 else self._on_step_in_window
        requests, reached, commit_point = self.requests, self.limits.reached, self._commit_point
        agreement = self._agreement if self._agreement.is_needed else None
        length = self._run.steps_per_epoch
        limit = None if max_step is None else max_step - progress.global_step_id + done
        over = False
        max_epoch = self.limits.max_epoch
        last_epoch = None if max_epoch is None else max_epoch - 1
        self._snapshots.rank_states.restore_rng()
        # No variable keeps the iterator: an error would keep the loader's workers with it.
        for batch, ends_window, divisor in self._windows.micro_batches(
            self._data.epoch(progress.epoch_id, done, last_epoch=last_epoch),
            self._data.step_sizes,
            done,
            limit=None if limit == length else limit,
        ):
            if over:  # and there are more batches than the loader's length
                break
            try:
                if self._place is not None:
                    batch = self._place(batch)
                progress.in_step = True
                on_step(PipelineHookArgs(self._run, batch, ends_window, divisor), self._step_body)
            except Exception as error:
                self._fitting.explain(error, batch, self._run)
                raise
            progress.finish_step()
            if agreement is not None and progress.global_step_id >= agreement.due_at:
                agreement.settle(progress.global_step_id)  # a collective
            # The commit point. Inlined, since a call costs 0.5 us here.
            if requests.pending or reached(progress):
                self._fitting.record(batch, progress.global_step_id)
                if self._is_rolling_back():
                    return
                over = self._is_over()
                if progress.step_id == length:
                    # Requests wait for the commit point after the epoch, which follows at once.
                    # Some samplers draw from the RNG again when asked for one batch too many.
                    continue
                if not over:
                    commit_point.execute()
                if self._is_over() or self._is_rolling_back():
                    # Without a length, only the next batch shows whether this was the last one;
                    # the epoch then counts as open.
                    return
        if progress.step_id == 0:
            raise DataError(
                f"the dataloader gave no batch in epoch {progress.epoch_id + 1}; "
                + explain_no_batch(self.dataloader)
            )
        args._epoch_completed = True

    def _on_step_in_window(
        self, args: PipelineHookArgs, body: Callable[[PipelineHookArgs], None]
    ) -> None:
        """Run ``on_step``, and reduce gradients between ranks only where a window ends."""
        boundary = args._at_accumulation_boundary
        if boundary is not self._synchronising:
            self._synchronise(boundary)
        if boundary:
            self._on_step(args, self._last_step_of_window)
        elif self._no_sync is None:
            self._on_step(args, body)
        else:
            with self._no_sync():
                self._on_step(args, body)

    def _synchronise(self, synchronise: bool) -> None:
        self._synchronising = self.accelerator.sync_gradients = synchronise
        if self._set_sharded_sync is not None:  # visits all modules
            self._set_sharded_sync(synchronise)

    def _step_or_padding_step(self, args: PipelineHookArgs) -> None:
        """Run ``_step`` in a job of several ranks, where one rank may have no data left."""
        if args._loss_divisor != math.inf:
            self._step(args)
        else:
            with padding_step(self.model):
                self._step(args)
        if self._skipped.are_joint:
            self._skipped.end_joint_step(args)

    def _last_step_of_window(self, args: PipelineHookArgs) -> None:
        self._step_body(args)
        if self._windows.skipped_batches:
            self._skipped.end_window(args)

    def _zero_grad(self) -> None:
        if self._optimizer_hook is not None:
            self._optimizer_hook.zero_grad()

    def _step(self, args: PipelineHookArgs) -> None:
        self._on_batch(args, self._batch_body)

    def _batch(self, args: PipelineHookArgs) -> None:
        if args._batch_skip_reason is not None and args._loss_divisor != math.inf:
            self._skipped.run_step(args, self._batch)
        elif self.batch_processor.need_backward:
            self._on_model_forward(args, self._forward)
            self._on_model_backward(args, self._backward)
        else:
            with torch.no_grad():
                self._on_model_forward(args, self._forward)

    def _named_batch(self, args: PipelineHookArgs) -> None:
        if args._batch_skip_reason is None:
            self._named_losses.run_batch(args)
        else:
            self._skipped.run_step(args, self._named_losses.run_batch)

    def _forward(self, args: PipelineHookArgs) -> None:
        if args._batch_skip_reason is not None and args._loss_divisor != math.inf:
            raise PipelineStateError(SKIP_TOO_LATE)
        result = self._processor.forward(self._processed_model, args.batch)
        # A tensor of two rows would unpack as well, hence the check of the type.
        is_pair = isinstance(result, (tuple, list)) and len(result) == 2
        if not is_pair or self._loss_weights.uses_samples:
            self._loss_weights.take(args, result)
        else:
            args.model_outputs, args.attached_loss = result

    def _backward(self, args: PipelineHookArgs) -> None:
        loss = args.attached_loss
        if not isinstance(loss, torch.Tensor):
            raise wrong_result(args, f"a loss of type {type(loss).__name__}")
        weight = args._given_loss_weight
        if (weight is not None) is not self._loss_weights.are_used:  # the first step, or an error
            self._loss_weights.decide(args)
        if weight is not None:
            scaled = self._loss_weights.scale(loss, weight)
        elif args._loss_divisor == 1.0 or self._engine_divides:
            scaled = loss
        else:
            scaled = loss / args._loss_divisor
        try:
            if self._engine_backward is None:
                scaled.backward()
            else:
                self._engine_backward(scaled)
        except RuntimeError as error:
            if loss.numel() == 1:
                raise
            raise wrong_result(
                args, f"a loss of shape {tuple(loss.shape)}; reduce it, such as by loss.mean()"
            ) from error
        if weight is not None and args._at_accumulation_boundary:
            args._loss_weighting = self._loss_weights.end_window()
        # Kept until the next backward pass, as a plain loop's variable is: the parameters' graph
        # nodes live on into the next forward pass, which saves 1 us of a small model's step.
        self._last_loss = loss

    def _has_unreduced_gradients(self) -> bool:
        """Return True within a window of a sharded model, whose gradients can't be saved.

        FSDP2 keeps these gradients outside of ``parameter.grad``, in a place of its own.
        """
        return self._set_sharded_sync is not None and not self._synchronising

    def _is_over(self) -> bool:
        """Return True if the run ends at this commit point."""
        is_ending = self.requests.stop_request is not None or self._is_at_limit()
        return is_ending and not self._has_unreduced_gradients()

    def _preemption_exit_code(self) -> int | None:
        """Return the exit code of a run that is to be started again; None if it is complete."""
        stop = self.requests.stop_request
        return None if stop is None or self._is_at_limit() else stop.exit_code

    def _is_at_limit(self) -> bool:
        return self.limits.reached(self.progress)
