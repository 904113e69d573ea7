"""Counting what waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from robo_orchard_lab.testing.call_site import TracedCall, trace_call

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
