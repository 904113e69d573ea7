"""Counting what waits for the device."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from robo_orchard_core.utils.hook import HookContextChannel
from robo_orchard_lab.pipeline.checkpoint import CheckpointStore, save_checkpoint, write_weights
from robo_orchard_lab.pipeline.distributed.agreement import Agreement
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.metrics import MetricsBoard

# --- call site -------------------------------------------------------------------------------
# Where a call was made, and for which hook.


_HERE = os.path.dirname(__file__)
# Who calls through these wants to be shown the own line, not theirs.
_LIBRARIES = frozenset({"accelerate", "contextlib", "functools", "numpy", "torch", "torchmetrics"})
_COMMIT_FUNCTIONS = (
    Agreement.settle,
    MetricsBoard.flush,
    MetricsBoard.flush_partial,
    MetricsBoard.read_deferred,
    CheckpointStore.prepare,
    save_checkpoint,
    write_weights,
)
_AT_COMMIT = frozenset(function.__code__ for function in _COMMIT_FUNCTIONS)


@dataclass(frozen=True, slots=True)
class Place:
    """A line of source."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{os.path.basename(self.file)}:{self.line} in {self.function}"


@dataclass(frozen=True, slots=True)
class TracedCall:
    """One call that was counted, and who made it."""

    what: str
    """The operation, such as ``item`` or ``all_reduce``."""
    places: tuple[Place, ...]
    """The lines that led to it, from the call outwards to the hook's own function; outside of
    hooks, the line of the call alone. Lines of torch, Accelerate and the like are left out."""
    hook: str | None
    """The name of the hook in whose function it was made, the innermost one; None outside."""
    at_commit: bool
    """Whether the trainer made it at a commit point: to agree with other ranks, to read the metrics
    of a logging point, or to save."""

    def __str__(self) -> str:
        by = f"hook {self.hook!r}" if self.hook else "the trainer" if self.at_commit else "no hook"
        return f"{self.what} by {by} at " + ", called from ".join(map(str, self.places))


def trace_call(what: str) -> TracedCall:
    """Describe the call that led here, by the stack outside of this package."""
    frames = [*_frames_outside()]
    for index, frame in enumerate(frames):
        owner = _owner_of(frame)
        if isinstance(owner, PipelineHooks):
            outermost = index + _outermost_of(owner, frames[index:])
            return TracedCall(what, _places(frames[: outermost + 1]), owner.name, at_commit=False)
        if isinstance(owner, HookContextChannel):
            found = _hook_function(frames[:index], owner)
            if found is not None:
                inner, label = found
                return TracedCall(what, _places(frames[: inner + 1]), label, at_commit=False)
        if frame.f_code in _AT_COMMIT:
            return TracedCall(what, _places(frames[: index + 1]), None, at_commit=True)
    return TracedCall(what, _places(frames)[:1], None, at_commit=False)


def _frames_outside() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if os.path.dirname(frame.f_code.co_filename) != _HERE:
            yield frame
        frame = frame.f_back


def _places(frames: Iterable[FrameType]) -> tuple[Place, ...]:
    return tuple(
        Place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname)
        for frame in frames
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in _LIBRARIES
    )


def _owner_of(frame: FrameType) -> Any:
    """The object whose method a frame runs, or a function that was made in one."""
    return frame.f_locals.get("self")


def _outermost_of(hook: PipelineHooks, frames: Sequence[FrameType]) -> int:
    """The index of the method by which a hook was called."""
    outermost = 0
    for index, frame in enumerate(frames):
        owner = _owner_of(frame)
        if owner is hook:
            outermost = index
        elif isinstance(owner, HookContextChannel):
            break
    return outermost


def _hook_function(
    frames: Sequence[FrameType], channel: HookContextChannel[Any]
) -> tuple[int, str] | None:
    """Which of the frames is a hook of the channel, if any is, and the name of the hook.

    It is the function's own, or else that of the schedule that is asked about it.
    """
    asked: tuple[int, str] | None = None
    for index in range(len(frames) - 1, -1, -1):
        for entry in channel.entries():
            functions = [f for f in (entry.before, entry.after) if f is not None]
            if any(_code_of(function) is frames[index].f_code for function in functions):
                return index, entry.label
            if asked is None and _owner_of(frames[index]) is entry.context:
                asked = index, entry.label
    return asked


def _code_of(function: Callable[..., Any]) -> CodeType | None:
    """The code of a function, method or partial, also behind a schedule."""
    function = inspect.unwrap(function)
    while isinstance(function, functools.partial):
        function = function.func
    if not (inspect.isfunction(function) or inspect.ismethod(function)):
        function = type(function).__call__
    code = getattr(function, "__code__", None)
    return code if isinstance(code, CodeType) else None


# --- collectives -----------------------------------------------------------------------------
# Counting what the processes of a job exchange.


COLLECTIVES = (
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_gather_single",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "monitored_barrier",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
)
"""The functions of ``torch.distributed`` that are counted, as far as this torch has them."""


@contextmanager
def count_collectives() -> Iterator[list[TracedCall]]:
    """Record each call of a collective of ``torch.distributed`` that Python code makes.

    >>> with count_collectives() as calls:
    ...     pass  # train
    >>> calls
    []

    The functions are replaced while it lasts, under whatever name a loaded module knows them. One
    that is made of others, such as ``all_gather_object``, counts once. Not seen is what is called
    in C++, such as the exchange of gradients by DDP, and the functional collectives of DTensor.
    """
    calls: list[TracedCall] = []
    within = False

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def count(*args: Any, **kwargs: Any) -> Any:
            nonlocal within
            if within:
                return function(*args, **kwargs)
            calls.append(trace_call(name))
            within = True
            try:
                return function(*args, **kwargs)
            finally:
                within = False

        return count

    counting = {
        id(function): counted(name, function)
        for name in COLLECTIVES
        if (function := getattr(torch.distributed, name, None)) is not None
    }
    places = [
        (namespace, name, value)
        for module in tuple(sys.modules.values())
        for namespace in [getattr(module, "__dict__", {})]
        for name, value in tuple(namespace.items())
        if id(value) in counting
    ]
    for namespace, name, value in places:
        namespace[name] = counting[id(value)]
    try:
        yield calls
    finally:
        for namespace, name, value in places:
            if namespace.get(name) is counting[id(value)]:
                namespace[name] = value


# On a CPU tensor these reach no operator of torch, so they are seen as calls.
_READING_CALLS: dict[Any, str] = {
    torch.Tensor.tolist: "tolist",
    torch.Tensor.numpy: "numpy",
    torch.Tensor.__array__: "numpy",
    torch.Tensor.__dlpack__: "dlpack",
    torch.Tensor.__repr__: "repr",
    torch.Tensor.cpu: "cpu",
}
# All others are operators, that torch marks where the host has to know a value.
_VALUE_TAGS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
_INDEXING = frozenset({"aten::index", "aten::index_put", "aten::index_put_"})
_COPIES = frozenset({"aten::_to_copy", "aten::copy_"})
_NAMES = {"_local_scalar_dense": "item", **dict.fromkeys(["_to_copy", "copy_"], "copy to the host")}


@contextmanager
def count_host_reads(device: str | torch.device | None = None) -> Iterator[list[TracedCall]]:
    """Record each time that a value is read from a tensor, which waits for its device.

    >>> with count_host_reads() as reads:
    ...     loss = torch.tensor(2.0).square()
    ...     if loss > 3:
    ...         [number] = loss.reshape(1).tolist()
    >>> [read.what for read in reads]
    ['item', 'tolist']

    Seen are ``item``, ``float``, ``int``, ``bool`` and comparisons in conditions, ``tolist``,
    ``numpy``, ``cpu``, printing, copies from a device to the host, ``torch.tensor`` of tensors,
    and operators that give a number or a tensor whose size follows from values (``equal``,
    ``allclose``, ``nonzero``, ``unique``, a mask as an index). What ``cpu`` has given, and what is
    made of that alone, is on the host, so that to read it counts no more.

    Not seen are ``torch.cuda.synchronize`` and waiting for events and streams, other threads, and
    ``.to("cpu")`` of a tensor that lies there.

    Args:
        device: count only what is read from tensors there, such as ``"cuda"``. By default all
            count: without a device, tensors on the CPU stand for those that would be on it.
    """
    recorder = _Recorder(None if device is None else torch.device(device).type)
    with _SeeOperators(recorder), _SeeCalls(recorder):
        yield recorder.reads


class _Recorder:
    def __init__(self, device_type: str | None) -> None:
        self.reads: list[TracedCall] = []
        self._device_type = device_type
        self._on_host: WeakValueDictionary[int, torch.Tensor] = WeakValueDictionary()
        self._within = False

    def run(self, what: str, tensor: torch.Tensor, call: Callable[[], Any]) -> Any:
        """Do a read, and record it unless it is a part of another, or on the host already."""
        if self._within:
            return call()
        if self._device_type in (None, tensor.device.type) and not self._is_on_host(tensor):
            self.reads.append(trace_call(what))
        self._within = True
        try:
            result = call()
        finally:
            self._within = False
        if what == "cpu":
            if result is tensor:  # on a device it would be another one
                result = tensor.view_as(tensor)
            self._on_host[id(result)] = result
        return result

    def follow(self, given: Any, result: Any) -> None:
        """What is made of tensors on the host alone is on the host."""
        tensors = [*_tensors_in(given)] if self._on_host else []
        if tensors and all(map(self._is_on_host, tensors)):
            self._on_host.update((id(made), made) for made in _tensors_in(result))

    def _is_on_host(self, tensor: torch.Tensor) -> bool:
        return self._on_host.get(id(tensor)) is tensor


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)


class _SeeCalls(TorchFunctionMode):
    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        def call() -> Any:
            return func(*args, **(kwargs or {}))

        what = _READING_CALLS.get(func)
        if what is not None:
            return self._recorder.run(what, args[0], call)
        if func in (torch.tensor, torch.as_tensor) and args and isinstance(args[0], list | tuple):
            inside = next((x for x in args[0] if isinstance(x, torch.Tensor)), None)
            if inside is not None:
                return self._recorder.run("torch.tensor of tensors", inside, call)
        result = call()
        self._recorder.follow([args, [*(kwargs or {}).values()]], result)
        return result


class _SeeOperators(TorchDispatchMode):
    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's carries no annotations
        self._recorder = recorder

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not _reads(func, args, kwargs):
            return func(*args, **kwargs)
        name = func.name().partition("::")[2].partition(".")[0]
        source = args[1] if name == "copy_" else args[0]
        return self._recorder.run(
            _NAMES.get(name, name.strip("_")), source, lambda: func(*args, **kwargs)
        )


def _reads(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the host has to wait for a value, if the tensors are on a device."""
    name = func.name().partition(".")[0]
    if name in _INDEXING:
        masked = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        # One value is filled in where the mask is set, which needs no indexes.
        return masked and (name == "aten::index" or args[2].numel() > 1)
    if name in _COPIES:
        return _leaves_the_device(name, args, kwargs)
    return not _VALUE_TAGS.isdisjoint(func.tags)


def _leaves_the_device(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    if name == "aten::copy_":
        source, target = args[1], args[0].device
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
    else:
        source, target = args[0], kwargs.get("device") or args[0].device
        non_blocking = kwargs.get("non_blocking", False)
    return target.type == "cpu" and source.device.type != "cpu" and not non_blocking
