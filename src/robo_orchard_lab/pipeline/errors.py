"""The errors that a pipeline raises about what it was given."""

from __future__ import annotations


class PipelineConfigError(ValueError):
    """A trainer or hook can't be built from its arguments; the message names the one to change."""


class BatchProcessorError(TypeError):
    """A batch processor returned something else than ``(outputs, loss)``."""


class DataError(RuntimeError):
    """The data loader gave no batch where an epoch needs at least one."""


class StateError(ValueError):
    """A saved state does not fit what it is loaded into; nothing was changed."""


class CheckpointError(StateError):
    """A checkpoint can't be written or read; the message says which, why, and what to do.

    What was there before a write is still there, and nothing that was loaded into is changed.
    """


class StoreLockedError(CheckpointError):
    """Another process, or another store of this one, writes checkpoints into the same root."""


class PipelineStateError(RuntimeError):
    """A trainer is asked for something that it can't do where it is."""


class RunPreempted(SystemExit):  # an exit, of which it is one kind
    """A run was interrupted, by a signal or a time limit, and is to be started again.

    As an exit that nobody catches, it ends the process with its code and without a traceback, so
    that what follows in a script does not take the model for a trained one.
    """
