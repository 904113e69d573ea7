"""Hooks as nested contexts around stages of a program.

A :class:`HookContext` is a ``before`` and an ``after``. A :class:`HookContextChannel` is an
ordered list of contexts around one stage:

>>> channel = HookContextChannel[str]("on_step")
>>> handle = channel.register(
...     HookContext.from_callable(
...         before=lambda args: print("before", args), after=lambda args: print("after", args)
...     )
... )
>>> channel.run("step 0", lambda args: print("body of", args))
before step 0
body of step 0
after step 0
"""

from robo_orchard_core.utils.hook.channel import (
    HookContext,
    HookContextChannel,
    HookContextFromCallable,
    HookEntry,
    HookOwner,
    RemovableHandle,
    RemoveableHandle,
)
from robo_orchard_core.utils.hook.errors import (
    FunctionInfo,
    HookRegistrationError,
    HookSignatureError,
    add_origin,
    later_errors,
    origin_of,
    short_location,
)

__all__ = [
    "FunctionInfo",
    "HookContext",
    "HookContextChannel",
    "HookContextFromCallable",
    "HookEntry",
    "HookOwner",
    "HookRegistrationError",
    "HookSignatureError",
    "RemovableHandle",
    "RemoveableHandle",
    "add_origin",
    "later_errors",
    "origin_of",
    "short_location",
]
