"""Counts of device syncs and collectives, with the line and the hook of each call.

`count_host_reads` counts reads of tensor values, which wait for the device; `count_collectives`
counts calls of ``torch.distributed``.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.overrides import TorchFunctionMode

from robo_orchard_core.utils.hook import HookContextChannel
from robo_orchard_lab.pipeline.checkpoint import CheckpointStore, pack_weights, save_checkpoint
from robo_orchard_lab.pipeline.distributed.agreement import Agreement
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.metrics import MetricsBoard
from robo_orchard_lab.pipeline.metrics.accumulators import host_value
from robo_orchard_lab.pipeline.sharding import non_finite_weights
from robo_orchard_lab.pipeline.trainer.rank_consistency import ReplicaCheck

_HERE = os.path.dirname(__file__)
# Call sites leave out lines of these libraries.
_LIBRARIES = frozenset({"accelerate", "contextlib", "functools", "numpy", "torch", "torchmetrics"})
_COMMIT_FUNCTIONS = (
    Agreement.settle,
    MetricsBoard.flush,
    MetricsBoard.flush_partial,
    MetricsBoard.read_deferred,
    CheckpointStore.prepare,
    ReplicaCheck.check_gradients,
    ReplicaCheck.check_weights,
    non_finite_weights,
    pack_weights,
    save_checkpoint,
)
_AT_COMMIT = frozenset(function.__code__ for function in _COMMIT_FUNCTIONS)


@dataclass(frozen=True, slots=True)
class Place:
    """Source line."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{os.path.basename(self.file)}:{self.line} in {self.function}"


@dataclass(frozen=True, slots=True)
class TracedCall:
    """Counted call and its caller.

    Attributes:
        what: The operation, such as ``item`` or ``all_reduce``.
        places: Lines from the call outwards to the function of the hook; outside of hooks, the
            line of the call alone. Lines of torch, Accelerate and similar libraries are left out.
        hook: Name of the innermost hook around the call; None outside of hooks.
        at_commit: True for a call of the trainer at a commit point: agreement of ranks, metrics of
            a logging point, or a save.
    """

    what: str
    places: tuple[Place, ...]
    hook: str | None
    at_commit: bool

    def __str__(self) -> str:
        by = f"hook {self.hook!r}" if self.hook else "the trainer" if self.at_commit else "no hook"
        return f"{self.what} by {by} at " + ", called from ".join(map(str, self.places))


def trace_call(what: str) -> TracedCall:
    """Describe the current call by the stack outside of this package."""
    frames: list[FrameType] = []
    frame = inspect.currentframe()
    while frame is not None:
        if os.path.dirname(frame.f_code.co_filename) != _HERE:
            frames.append(frame)
        frame = frame.f_back
    # `self` of the method, or of the method around the closure, of each frame
    owners = [frame.f_locals.get("self") for frame in frames]
    for index, (frame, owner) in enumerate(zip(frames, owners, strict=True)):
        if isinstance(owner, PipelineHooks):
            # The outermost method of the hook, by which a channel called the hook.
            channels = (
                i for i, o in enumerate(owners) if i > index and isinstance(o, HookContextChannel)
            )
            end = next(channels, len(frames))
            outermost = max(i for i in range(index, end) if owners[i] is owner)
            return TracedCall(what, _places(frames[: outermost + 1]), owner.name, at_commit=False)
        if isinstance(owner, HookContextChannel):
            found = _hook_function(frames[:index], owner)
            if found is not None:
                inner, label = found
                return TracedCall(what, _places(frames[: inner + 1]), label, at_commit=False)
        if frame.f_code in _AT_COMMIT:
            return TracedCall(what, _places(frames[: index + 1]), None, at_commit=True)
    return TracedCall(what, _places(frames)[:1], None, at_commit=False)


def _places(frames: Iterable[FrameType]) -> tuple[Place, ...]:
    return tuple(
        Place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname)
        for frame in frames
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in _LIBRARIES
    )


def _hook_function(
    frames: Sequence[FrameType], channel: HookContextChannel[Any]
) -> tuple[int, str] | None:
    """Return the index of the frame of a hook of the channel, and the name of the hook.

    The frame of the function itself, or else of the trigger that decides about the function.
    """
    of_trigger: tuple[int, str] | None = None
    for index in range(len(frames) - 1, -1, -1):
        for entry in channel.entries():
            functions = [f for f in (entry.before, entry.after) if f is not None]
            if any(_code_of(function) is frames[index].f_code for function in functions):
                return index, entry.label
            if of_trigger is None and frames[index].f_locals.get("self") is entry.context:
                of_trigger = index, entry.label
    return of_trigger


def _code_of(function: Callable[..., Any]) -> CodeType | None:
    """Return the code of a function, method, partial or callable, unwrapped."""
    function = inspect.unwrap(function)
    while isinstance(function, functools.partial):
        function = function.func
    if not (inspect.isfunction(function) or inspect.ismethod(function)):
        function = type(function).__call__
    code = getattr(function, "__code__", None)
    return code if isinstance(code, CodeType) else None


COLLECTIVES = (
    *("all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object"),
    *("all_gather_single", "all_reduce", "all_reduce_coalesced", "all_to_all", "all_to_all_single"),
    *("barrier", "broadcast", "broadcast_object_list", "gather", "gather_object"),
    *("monitored_barrier", "reduce", "reduce_scatter", "reduce_scatter_single"),
    *("reduce_scatter_tensor", "scatter", "scatter_object_list"),
)
"""Counted functions of ``torch.distributed``, if the installed torch has them."""


@contextmanager
def count_collectives() -> Iterator[list[TracedCall]]:
    """Record the Python calls of collectives of ``torch.distributed`` in a block.

    >>> with count_collectives() as calls:
    ...     pass  # train
    >>> calls
    []

    The functions are replaced in all loaded modules during the block. A collective that calls
    others, such as ``all_gather_object``, counts once. Not counted are calls from C++, such as the
    gradient reduction of DDP, and the functional collectives of DTensor.
    """
    calls: list[TracedCall] = []
    is_nested = False

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def count(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_nested
            if is_nested:
                return function(*args, **kwargs)
            calls.append(trace_call(name))
            is_nested = True
            try:
                return function(*args, **kwargs)
            finally:
                is_nested = False

        return count

    replacements = {
        id(function): counted(name, function)
        for name in COLLECTIVES
        if (function := getattr(torch.distributed, name, None)) is not None
    }
    bindings = [
        (namespace, name, value)
        for module in tuple(sys.modules.values())
        for namespace in [getattr(module, "__dict__", {})]
        for name, value in tuple(namespace.items())
        if id(value) in replacements
    ]
    for namespace, name, value in bindings:
        namespace[name] = replacements[id(value)]
    try:
        yield calls
    finally:
        for namespace, name, value in bindings:
            if namespace.get(name) is replacements[id(value)]:
                namespace[name] = value


# Calls that reach no operator of torch for a CPU tensor.
_READING_CALLS: dict[Any, str] = {
    torch.Tensor.tolist: "tolist",
    torch.Tensor.numpy: "numpy",
    torch.Tensor.__array__: "numpy",
    torch.Tensor.__dlpack__: "dlpack",
    torch.Tensor.__repr__: "repr",
    torch.Tensor.cpu: "cpu",
}
# Tags of operators whose result depends on values.
_VALUE_TAGS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
_INDEXING = frozenset({"aten::index", "aten::index_put", "aten::index_put_"})
_COPIES = frozenset({"aten::_to_copy", "aten::copy_"})
_NAMES = {"_local_scalar_dense": "item", **dict.fromkeys(["_to_copy", "copy_"], "copy to the host")}


@contextmanager
def count_host_reads(device: str | torch.device | None = None) -> Iterator[list[TracedCall]]:
    """Record the reads of tensor values in a block; each read waits for the device.

    >>> with count_host_reads() as reads:
    ...     loss = torch.tensor(2.0).square()
    ...     if loss > 3:
    ...         [number] = loss.reshape(1).tolist()
    >>> [read.what for read in reads]
    ['item', 'tolist']

    Counted are ``item``, ``float``, ``int``, ``bool``, conditions, ``tolist``, ``numpy``, ``cpu``,
    printing, copies from a device to the host, ``torch.tensor`` of tensors, and operators whose
    result is a number or whose shape depends on values (``equal``, ``allclose``, ``nonzero``,
    ``unique``, indexing by a mask). A result of ``cpu``, and any tensor computed from such results
    alone, is on the host: reading it again does not count.

    Not counted are reads of CPU tensors by ``host_value``, which waits for no device, and
    ``torch.cuda.synchronize``, waits for events and streams, other threads, and
    ``.to("cpu")`` of a CPU tensor.

    Args:
        device: count only reads of tensors on this device, such as ``"cuda"``. By default, all
            reads count: on a machine without a device, CPU tensors stand for device tensors.
    """
    recorder = _Recorder(None if device is None else torch.device(device).type)
    with _operator_mode(recorder), _CallMode(recorder):
        yield recorder.reads


class _Recorder:
    def __init__(self, device_type: str | None) -> None:
        self.reads: list[TracedCall] = []
        self._device_type = device_type
        self._on_host: WeakValueDictionary[int, torch.Tensor] = WeakValueDictionary()
        self._is_nested = False

    def run(self, what: str, tensor: torch.Tensor, call: Callable[[], Any]) -> Any:
        """Execute a read; record the read, except a nested read or a read on the host."""
        if self._is_nested:
            return call()
        if (
            self._device_type in (None, tensor.device.type)
            and not self._is_on_host(tensor)
            and not _is_within(host_value.__code__)
        ):
            self.reads.append(trace_call(what))
        self._is_nested = True
        try:
            result = call()
        finally:
            self._is_nested = False
        if what == "cpu":
            if result is tensor:  # a device tensor would be copied
                result = tensor.view_as(tensor)
            self._on_host[id(result)] = result
        return result

    def track(self, arguments: Any, result: Any) -> None:
        """Mark the results of an operation on host tensors alone as host tensors."""
        tensors = [*_tensors_in(arguments)] if self._on_host else []
        if tensors and all(map(self._is_on_host, tensors)):
            self._on_host.update((id(each), each) for each in _tensors_in(result))

    def _is_on_host(self, tensor: torch.Tensor) -> bool:
        return self._on_host.get(id(tensor)) is tensor


def _is_within(code: CodeType) -> bool:
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)


class _CallMode(TorchFunctionMode):
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
        call = functools.partial(func, *args, **(kwargs or {}))
        what = _READING_CALLS.get(func)
        if what is not None:
            return self._recorder.run(what, args[0], call)
        if func in (torch.tensor, torch.as_tensor) and args and isinstance(args[0], list | tuple):
            inside = next((x for x in args[0] if isinstance(x, torch.Tensor)), None)
            if inside is not None:
                return self._recorder.run("torch.tensor of tensors", inside, call)
        result = call()
        self._recorder.track([args, [*(kwargs or {}).values()]], result)
        return result


def _operator_mode(recorder: _Recorder) -> AbstractContextManager[Any]:
    try:
        # torch's documentation names this module; another release may lack it.
        from torch.utils._python_dispatch import TorchDispatchMode
    except ImportError as error:
        raise RuntimeError(
            "counting host reads needs torch.utils._python_dispatch.TorchDispatchMode, which torch "
            f"{torch.__version__} lacks; install torch 2.8 to 2.15"
        ) from error

    class OperatorMode(TorchDispatchMode):
        def __torch_dispatch__(
            self,
            func: Any,
            types: Iterable[type],
            args: tuple[Any, ...] = (),
            kwargs: Mapping[str, Any] | None = None,
        ) -> Any:
            kwargs = kwargs or {}
            call = functools.partial(func, *args, **kwargs)
            if not _reads(func, args, kwargs):
                return call()
            name = func.name().partition("::")[2].partition(".")[0]
            source = args[1] if name == "copy_" else args[0]
            return recorder.run(_NAMES.get(name, name.strip("_")), source, call)

    mode: AbstractContextManager[Any] = OperatorMode()  # type: ignore[no-untyped-call]  # of torch
    return mode


def _reads(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return True if an operator on device tensors makes the host wait."""
    name = func.name().partition(".")[0]
    if name in _INDEXING:
        masked = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        # Filling one value needs no indices.
        return masked and (name == "aten::index" or args[2].numel() > 1)
    if name not in _COPIES:
        return not _VALUE_TAGS.isdisjoint(func.tags)
    source, target = args[0], kwargs.get("device") or args[0].device
    non_blocking = kwargs.get("non_blocking", False)
    if name == "aten::copy_":
        source, target = args[1], args[0].device
        non_blocking = args[2] if len(args) > 2 else non_blocking
    return target.type == "cpu" and source.device.type != "cpu" and not non_blocking
