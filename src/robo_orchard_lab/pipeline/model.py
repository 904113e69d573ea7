"""Model helpers: unwrapping, DDP and autocast around batch processors, names, buffers."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatchcase
from functools import cache, partial
from operator import is_
from typing import Any, Protocol, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, get_mixed_precision_context_manager
from torch.nn.parallel import DistributedDataParallel

from robo_orchard_lab.pipeline.batch_processor import BatchProcessor, ForwardResult

NamedParameters: TypeAlias = Sequence[tuple[str, torch.nn.Parameter]]

_COMPILED = "_orig_mod"
"""Submodule of a compiled module, also in the names of its ``state_dict``."""


class ModelOfRun(Protocol):
    """Prepared model of a :class:`PipelineRun`."""

    @property
    def accelerator(self) -> Accelerator: ...

    @property
    def model(self) -> torch.nn.Module: ...

    @property
    def constants(self) -> frozenset[str]: ...


class WeightSet(Protocol):
    """Alternative weights of the model, such as an exponential moving average."""

    def applied(self) -> AbstractContextManager[None]:
        """Return a context manager that swaps these weights into the model."""
        ...

    def weights(self) -> dict[str, torch.Tensor]:
        """Return parameters and buffers by name, in the layout of the model's ``state_dict``."""
        ...


def plain_model(run: ModelOfRun) -> torch.nn.Module:
    """Return the model without the wrappers of DDP and ``torch.compile``.

    Submodules compiled one by one stay compiled; :func:`plain_name` removes their prefix.
    """
    model: torch.nn.Module = run.accelerator.unwrap_model(run.model, keep_torch_compile=False)
    return model


def uncompiled(module: torch.nn.Module) -> torch.nn.Module:
    """Return the module in the wrapper of ``torch.compile``, or the module itself."""
    return dict(module.named_children()).get(_COMPILED, module)


def ddp_of(model: torch.nn.Module) -> DistributedDataParallel | None:
    """Return the DDP wrapper of a model, also inside ``torch.compile``, or None."""
    inner = uncompiled(model)
    return inner if isinstance(inner, DistributedDataParallel) else None


def autocast_context(accelerator: Accelerator | None) -> Callable[[], AbstractContextManager[Any]]:
    """Return a function that returns the accelerator's autocast context, or a null context.

    The context is around all that a batch processor computes, not only calls of the model.
    """
    if accelerator is None or not accelerator.native_amp:
        return nullcontext  # Accelerate's context costs 3 us even without mixed precision
    if not _is_autocast_cache_safe():
        return partial(_autocast_without_cache, accelerator)
    handler = accelerator.autocast_handler
    context = get_mixed_precision_context_manager(accelerator.native_amp, handler)
    return lambda: context  # one object, since a new one costs 5 us more


@cache
def _is_autocast_cache_safe() -> bool:
    """Return True if autocast does not reuse weights that were cast without gradients.

    torch 2.8 does: after a call under ``no_grad``, later calls of a model give no gradients.
    """
    weight = torch.zeros(1, 1, dtype=torch.float32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            torch.mm(weight, weight)
        return torch.mm(weight, weight).requires_grad


@contextmanager
def _autocast_without_cache(accelerator: Accelerator) -> Iterator[None]:
    given = accelerator.autocast_handler
    handler = AutocastKwargs(enabled=given is None or given.enabled, cache_enabled=False)
    with accelerator.autocast(handler):
        torch.autocast_decrement_nesting()  # so that each call of a prepared model ends its cache
        try:
            yield
        finally:
            torch.autocast_increment_nesting()


class _DDPWithoutSync(DistributedDataParallel):
    """DDP model whose calls only call the module; shares all state of another DDP model."""

    def __init__(self, ddp: DistributedDataParallel) -> None:
        object.__setattr__(self, "__dict__", ddp.__dict__)

    @property  # precedes an instance's forward, such as Accelerate's
    def forward(self) -> Any:  # type: ignore[override]
        return self.module


class ModuleOfDDP:
    """Module of a DDP model as batch processors see it: the same as in one process.

    Attributes and items are those of the module, so ``model.compute_loss(batch)`` works at any
    world size. Code for DDP works as well: ``model.module`` is the module. Nothing communicates;
    :class:`ForwardInDDP` does.

    Args:
        ddp: DDP model.
        runs_hooks: True if a call runs the forward hooks of the DDP model as well.
    """

    __slots__ = ("_call", "_ddp")

    def __init__(self, ddp: DistributedDataParallel, *, runs_hooks: bool) -> None:
        object.__setattr__(self, "_ddp", ddp)
        object.__setattr__(self, "_call", _DDPWithoutSync(ddp) if runs_hooks else ddp.module)

    @property  # type: ignore[misc]  # for isinstance()
    def __class__(self) -> type[Any]:
        return type(self._ddp.module)

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        return self._call(*inputs, **kwargs)

    def __getattr__(self, name: str) -> Any:
        ddp = self._ddp
        is_of_ddp = name == "module" or (name == "no_sync" and not hasattr(ddp.module, name))
        return getattr(ddp if is_of_ddp else ddp.module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._ddp.module, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._ddp.module[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._ddp.module)

    def __contains__(self, key: Any) -> bool:
        return key in self._ddp.module

    def __len__(self) -> int:
        return len(self._ddp.module)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return repr(self._ddp.module)


class _Call(torch.nn.Module):
    """Module that calls a function, with the parameters and buffers of another module."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self._modules_of = module.named_modules  # parameters and buffers come from there as well

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules_of(*args, **kwargs)

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


class DDPOfCall(DistributedDataParallel):
    """DDP model that calls a function instead of its module; shares all state of another one."""

    __slots__ = ("_call",)

    def __init__(self, ddp: DistributedDataParallel) -> None:
        object.__setattr__(self, "__dict__", ddp.__dict__)
        object.__setattr__(self, "_call", _Call(ddp.module))

    @property
    def module(self) -> Any:
        return self._call


class ForwardInDDP:
    """Batch processor that runs another one inside the forward pass of a DDP model.

    DDP then reduces the gradients however the processor uses the model: by a call, a method, a
    submodule, or a reference of its own. DDP prepares the reduction, and broadcasts buffers, once
    for each batch. The module's forward hooks run when the processor calls the module.
    """

    def __init__(self, processor: BatchProcessor, ddp: DistributedDataParallel) -> None:
        self._processor = processor
        self._ddp = DDPOfCall(ddp)

    def forward(self, model: Any, batch: Any) -> ForwardResult:
        call = partial(self._processor.forward, model, batch)  # DDP copies no arguments of a call
        result: ForwardResult = self._ddp.forward(call)  # type: ignore[no-untyped-call]
        return result


class ForwardInAutocast:
    """Batch processor that runs another one in the contexts of :func:`autocast_context`."""

    def __init__(self, processor: Any, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        self._processor = processor
        self._autocast = autocast

    def forward(self, model: Any, batch: Any) -> ForwardResult:
        with self._autocast():
            result: ForwardResult = self._processor.forward(model, batch)
        return result


def forward_in_context(
    processor: BatchProcessor, model: torch.nn.Module, accelerator: Accelerator | None
) -> tuple[Any, Any]:
    """Return the processor in DDP's forward and in autocast where needed, and its model.

    DDP models that are compiled, have a mixed precision of their own, or were wrapped before
    Accelerate added mixed precision are passed as they are; call them.
    """
    runner: Any = processor
    given: Any = model
    if isinstance(model, DistributedDataParallel) and not (
        getattr(model, "mixed_precision", None) or "forward" in vars(model)
    ):
        runner, given = ForwardInDDP(processor, model), ModuleOfDDP(model, runs_hooks=True)
    autocast = autocast_context(accelerator)
    return (runner if autocast is nullcontext else ForwardInAutocast(runner, autocast)), given


def plain_name(name: str) -> str:
    """Return a parameter or buffer name without the prefix of ``torch.compile``.

    >>> plain_name("encoder._orig_mod.weight")
    'encoder.weight'
    """
    return name.replace(f"{_COMPILED}.", "")


def plain_state(run: ModelOfRun) -> dict[str, Any]:
    """Return the model's ``state_dict`` by plain names, without a copy."""
    return {plain_name(name): value for name, value in plain_model(run).state_dict().items()}


def plain_weights(run: ModelOfRun) -> dict[str, torch.Tensor]:
    """Return the model's parameters and buffers by plain names, without a copy."""
    return {n: value for n, value in plain_state(run).items() if isinstance(value, torch.Tensor)}


def all_named_parameters(model: torch.nn.Module) -> NamedParameters:
    """Return all parameters with plain names; a tied parameter occurs under each of its names."""
    named = model.named_parameters(remove_duplicate=False)
    return [(plain_name(name), parameter) for name, parameter in named]


def match_parameters(pattern: str, named: NamedParameters) -> list[torch.nn.Parameter]:
    """Return parameters by pattern: ``*`` matches any text with dots, ``?`` one character.

    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1, bias=False))
    >>> len(match_parameters("*.weight", all_named_parameters(model)))
    2
    """
    return [parameter for name, parameter in named if fnmatchcase(name, pattern)]


def suggest_pattern(pattern: str, named: NamedParameters) -> str:
    """Return the remedy for a pattern without matches, for error messages."""
    names = [name for name, _ in named]
    parts = [name.split(".") for name in names]
    modules = {".".join(part[:depth]) for part in parts for depth in range(1, len(part))}
    if pattern in modules:
        return f"that is a module; did you mean '{pattern}.*'?"
    near = difflib.get_close_matches(pattern, [*names, *(f"{m}.*" for m in sorted(modules))], n=3)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"the parameters are {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"


def copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy each source into its target, in one kernel where possible; dtypes may differ."""
    if hasattr(torch, "_foreach_copy_"):
        torch._foreach_copy_(targets, sources)
    else:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


class BufferSnapshot:
    """Copies of a model's buffers on their device.

    All buffers are copied: batch normalization changes its running statistics without a trace in
    the version counters of the tensors.
    """

    def __init__(self) -> None:
        self._owners: list[tuple[torch.nn.Module, str, str]] = []
        self._live: list[torch.Tensor] = []
        self._copies: list[torch.Tensor] | None = None
        self._loaded: Mapping[str, torch.Tensor] | None = None

    def attach(self, model: torch.nn.Module) -> None:
        """Collect the buffers of a model."""
        self._owners = [
            (module, name, plain_name(f"{path}.{name}" if path else name))
            for path, module in model.named_modules()
            for name, _ in module.named_buffers(recurse=False)
        ]
        if self._loaded is not None:
            self._live = self._current()
            self._copies = [
                self._loaded[full].to(live.device)
                for (_, _, full), live in zip(self._owners, self._live, strict=True)
            ]
            self._loaded = None

    @torch.no_grad()
    def save(self) -> None:
        """Copy the buffers, without a device sync."""
        live = self._current()
        if self._copies is not None and all(map(is_, live, self._live)):
            if live:
                copy_all(self._copies, live)
        else:  # the first time, or after a forward pass replaced a buffer
            self._live, self._copies = live, [buffer.clone() for buffer in live]

    @torch.no_grad()
    def restore(self) -> None:
        """Copy the saved values back into the model."""
        for (module, name, _), copy in zip(self._owners, self._copies or (), strict=False):
            live = getattr(module, name)
            if live is not None and live.shape == copy.shape:
                live.copy_(copy)
            else:
                setattr(module, name, copy.clone())

    def named(self) -> dict[str, torch.Tensor]:
        """Return the copies by plain name; the next :meth:`save` overwrites the tensors."""
        return {
            full: copy for (_, _, full), copy in zip(self._owners, self._copies or (), strict=False)
        }

    def load(self, named: Mapping[str, torch.Tensor]) -> None:
        """Use copies from :meth:`named` at the next :meth:`attach`."""
        self._loaded = named

    def _current(self) -> list[torch.Tensor]:
        return [getattr(module, name) for module, name, _ in self._owners]
