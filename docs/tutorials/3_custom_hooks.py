"""
Write a hook
============

The engine runs the training loop, and nobody edits it. Logic of your own goes into a
*hook*: a ``before`` and an ``after`` around a stage of the loop. This tutorial writes
a hook that logs the mean loss of each epoch, gives it a validated configuration,
finds it in the tree of all hooks, and runs it. The second half is about the rules
that make hooks safe to combine: order, failures, state, requests and triggers.
"""

# sphinx_gallery_thumbnail_path = 'images/channels.svg'

# %%
# A training to extend
# --------------------
# The model learns the line ``y = 3 x + 1``. A *batch processor* turns a batch into
# outputs and a loss; the trainer does everything else.

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from robo_orchard_lab.pipeline import HookBasedTrainer, SimpleBatchProcessor


class LineFit(SimpleBatchProcessor):
    def forward(self, model, batch):
        x, y = batch
        prediction = model(x)
        return prediction, torch.nn.functional.mse_loss(prediction, y)


def make_trainer(hooks, max_epoch=2, **options):
    """Return a trainer for 32 samples in 4 batches; the same seed, the same weights."""
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 32).unsqueeze(1)
    model = torch.nn.Linear(1, 1)
    return HookBasedTrainer(
        accelerator=Accelerator(cpu=True),
        model=model,
        dataloader=DataLoader(TensorDataset(x, 3 * x + 1), batch_size=8, shuffle=True),
        batch_processor=LineFit(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.2),
        hooks=hooks,
        max_epoch=max_epoch,
        **options,
    )


trainer = make_trainer(hooks=[], max_epoch=10)
trainer()
print(f"y = {trainer.model.weight.item():.2f} x + {trainer.model.bias.item():.2f}")

# %%
# See the stages
# --------------
# A stage of the loop is called a *channel*. ``PipelineHooks`` is a named bundle of
# functions on channels, and decorators add functions to it. This bundle prints the
# begin and the end of three channels: the loop, an epoch, a step.

from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks

stages = PipelineHooks("stages")


@stages.on_loop.before
def begin_loop(args: PipelineHookArgs) -> None:
    print("loop begins")


@stages.on_loop.after
def end_loop(args: PipelineHookArgs) -> None:
    print("loop ends")


@stages.on_epoch.before
def begin_epoch(args: PipelineHookArgs) -> None:
    print(f"  epoch {args.epoch_id} begins")


@stages.on_epoch.after
def end_epoch(args: PipelineHookArgs) -> None:
    print(f"  epoch {args.epoch_id} ends")


@stages.on_step.after
def end_step(args: PipelineHookArgs) -> None:
    print(f"    step {args.step_id} ends, {args.global_step_id} in the run")


make_trainer(hooks=[stages])()

# %%
# Every function receives the same ``PipelineHookArgs``. It has the counters (from 0),
# the batch, the loss and the model, and methods to publish metrics and to make
# requests. A field is empty where it has no meaning yet: ``args.loss`` is None before
# the forward pass.
#
# A hook with settings
# --------------------
# A hook for several experiments has two parts:
#
# - **The hook**, a subclass of ``PipelineHooks``. Its constructor registers methods on
#   channels. ``HookContext.from_callable`` joins a ``before`` and an ``after`` to a
#   pair that is entered and exited together, like a context manager.
# - **Its configuration**, a subclass of ``PipelineHooksConfig``. It names the class of
#   the hook in ``class_type``, and validates the settings.
#
# Adding losses needs no wait for the device. Only ``item()`` waits, once an epoch.

import logging
import sys

from pydantic import Field

from robo_orchard_lab.pipeline.hooks.mixin import (
    HookContext,
    PipelineHooksConfig,
)

logger = logging.getLogger("mean_loss")
logger.setLevel(logging.INFO)
logger.handlers = [logging.StreamHandler(sys.stdout)]
logger.propagate = False


class MeanLossHook(PipelineHooks):
    """Log the mean loss of each epoch."""

    def __init__(self, cfg: "MeanLossHookConfig") -> None:
        super().__init__()
        self.cfg = cfg
        hook = HookContext.from_callable
        self.register_hook("on_epoch", hook(before=self.reset, after=self.report))
        self.register_hook("on_step", hook(after=self.add))

    def reset(self, args: PipelineHookArgs) -> None:
        self.total = torch.zeros((), device=args.accelerator.device)

    def add(self, args: PipelineHookArgs) -> None:
        self.total += args.loss

    def report(self, args: PipelineHookArgs) -> None:
        mean = self.total.item() / max(args.step_id, 1)
        logger.info(f"epoch {args.epoch_id}: mean loss {mean:.{self.cfg.digits}f}")


class MeanLossHookConfig(PipelineHooksConfig[MeanLossHook]):
    class_type: type[MeanLossHook] = MeanLossHook
    digits: int = Field(
        default=4, ge=1, le=10, description="Decimal places of the log."
    )


make_trainer(hooks=[MeanLossHookConfig(digits=3)])()

# %%
# The separation has three uses. One hook serves many experiments; a configuration is
# data, so an experiment file can hold it; and a mistake is found when the
# configuration is made, not in hour three of a training.

try:
    MeanLossHookConfig(digits=30)
except ValueError as error:
    print(error)

# %%
print(MeanLossHookConfig(digits=3).to_dict())
print(MeanLossHookConfig(digits=3)())  # a call builds the hook

# %%
# The tree of hooks
# -----------------
# ``print(trainer.hooks)`` shows all hooks of all channels, in order, with the file and
# line of each function. ``OptimizerHook`` is there too: the update of the weights is a
# hook like any other, and the outermost one on a step.

trainer = make_trainer(hooks=[MeanLossHookConfig(digits=3)])
print(trainer.hooks)

# %%
# ``trainer.plan()`` is the same in the order of the loop. It adds the triggers, and
# what each hook says that it reads and changes.

print(trainer.plan())

# %%
# Order: hooks nest
# -----------------
# The first hook in the list is the outermost. ``before`` functions run in the order of
# the list, ``after`` functions in reverse: each hook encloses the next one.


def announce(name: str) -> PipelineHooks:
    """Return a hook that prints when it is entered and exited in the third step."""
    hooks = PipelineHooks(name)

    @hooks.on_step.before(when="at steps 3")
    def enter(args: PipelineHookArgs) -> None:
        print(f"enter {name}")

    @hooks.on_step.after(when="at steps 3")
    def leave(args: PipelineHookArgs) -> None:
        print(f"exit  {name}, loss {args.loss}, error: {args.exception}")

    return hooks


make_trainer(hooks=[announce("outer"), announce("middle"), announce("inner")])()

# %%
# Failures: entered hooks exit
# ----------------------------
# Files are closed and profilers stopped also after an error: every hook that was
# entered exits, in reverse order, and no other. While hooks exit, ``args.exception`` is
# the error. The error has a note with the hook, the channel and the line.

faulty = PipelineHooks("faulty")


@faulty.on_step.before(when="at steps 3")
def read_sensor(args: PipelineHookArgs) -> None:
    raise RuntimeError("the sensor does not answer")


try:
    make_trainer(hooks=[announce("outer"), faulty, announce("inner")])()
except RuntimeError as error:
    print(f"RuntimeError: {error}", *error.__notes__, sep="\n")

# %%
# State: a hook that resumes
# --------------------------
# The hook adds up losses within an epoch. If a run stops in the middle of an epoch and
# resumes, the first half of the sum is lost, unless the hook saves it. ``state_dict``
# and ``load_state_dict`` do that, as in torch: each checkpoint contains the state.


class ResumableMeanLossHook(MeanLossHook):
    """Log the mean loss of each epoch, also of an epoch that was interrupted."""

    total = torch.zeros(())

    def reset(self, args: PipelineHookArgs) -> None:
        if args.step_id == 0:  # not where a run resumes within an epoch
            super().reset(args)

    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, state):
        self.total = state["total"]


class ResumableMeanLossHookConfig(MeanLossHookConfig):
    class_type: type[MeanLossHook] = ResumableMeanLossHook


# %%
# The first trainer stops after 6 of 8 steps, in the middle of epoch 1, and logs the
# mean of that half. The second trainer continues from the checkpoint. Its mean of
# epoch 1 is that of the uninterrupted run above.

import tempfile
from pathlib import Path

from robo_orchard_lab.pipeline.hooks import SaveCheckpointConfig

logging.getLogger("robo_orchard_lab").setLevel(logging.WARNING)  # only our lines
folder = Path(tempfile.mkdtemp(prefix="hooks-"))
hooks = [ResumableMeanLossHookConfig(digits=3), SaveCheckpointConfig()]

make_trainer(hooks, run_folder=folder, max_step=6)()
print("resume")
make_trainer(hooks, run_folder=folder, resume_from="auto")()

# %%
# Triggers: when a hook runs
# --------------------------
# A trigger is text, as in ``when="at steps 3"`` above. A hook whose configuration has a
# field ``every: TriggerField`` accepts it from an experiment file. The numbers are the
# steps of three epochs, counted from 0, in which a hook with that trigger runs.


def show_trigger(when: str) -> None:
    steps = []
    hooks = PipelineHooks("recorder")
    hooks.on_step.after(when=when)(lambda args: steps.append(args.global_step_id))
    make_trainer(hooks=[hooks], max_epoch=3)()
    print(f"{when:20} {steps}")


for when in ("5 steps", "5 steps from 0", "at steps 2, 3", "first | last"):
    show_trigger(when)

# %%
# Requests: a hook asks, the trainer acts
# ---------------------------------------
# A hook never stops the loop or saves a checkpoint itself. It makes a request with a
# reason, and the trainer executes requests at the next *commit point*, between two
# steps, when all hooks have exited and all ranks agree. ``args.requests`` has ``stop``,
# ``save``, ``evaluate``, ``log`` and ``rollback``.

from robo_orchard_lab.pipeline.run.run_state import read_run_state

goal = PipelineHooks("goal")


@goal.on_step.after(when="10 steps")
def stop_at_goal(args: PipelineHookArgs) -> None:
    print(f"step {args.global_step_id}: loss {args.loss:.4f}")
    if args.loss < 0.01:
        args.requests.stop("the loss is below 0.01")


folder = Path(tempfile.mkdtemp(prefix="hooks-"))
make_trainer(hooks=[goal], run_folder=folder, max_epoch=100)()
state = read_run_state(folder)
print(f"{state.state}: {state.reason}, requested by {state.by}")

# %%
# Test a hook
# -----------
# ``robo_orchard_lab.testing`` runs a hook in real trainings of a tiny model.
# ``assert_state_round_trip`` stops and resumes at every step; it fails for a hook that
# forgets its state.

from robo_orchard_lab.testing import assert_no_device_sync, assert_state_round_trip

logger.setLevel(logging.WARNING)
assert_state_round_trip(ResumableMeanLossHookConfig())
print("the state survives a resume")

# %%
# ``assert_no_device_sync`` finds every wait for the device in a training. This hook has
# one in each of the two epochs of the test, where it logs; in a step it has none.

try:
    assert_no_device_sync(ResumableMeanLossHookConfig())
except AssertionError as error:
    print(error)

# %%
# Next
# ----
# - :doc:`4_metrics_and_evaluation` publishes values instead of logging them.
# - :doc:`7_own_package` puts a hook into a module with tests, and names it in an
#   experiment file.
# - :doc:`/reference/channels` lists all channels and fields, :doc:`/reference/hooks`
#   the hooks of the package.
