"""Gradient checkpointing: activations are computed again in the backward pass, not kept."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from robo_orchard_core.utils.config.errors import did_you_mean
from robo_orchard_lab.pipeline.errors import PipelineConfigError

_KINDS = ("activation", "gradient")  # of checkpointing: the name in newer Transformers, and before


def enable_gradient_checkpointing(
    model: torch.nn.Module, modules: Sequence[str] | None = None
) -> None:
    """Keep only the inputs of some modules for the backward pass, in less memory and more time.

    Weights, gradients, random numbers and buffers are those without checkpointing, bit for bit.
    Names of parameters stay the same. Call it before ``torch.compile``.

    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    >>> enable_gradient_checkpointing(model, ["0"])

    Args:
        model: Model, changed in place.
        modules: Patterns of module names: ``*`` matches any text, dots included. None calls the
            model's own ``gradient_checkpointing_enable()``, as of Transformers' models.

    Raises:
        PipelineConfigError: A pattern matches no module, or a module in another matching one; or
            the model has no method of its own.
    """
    if modules is None:
        _call_own_method(model)
        return
    named = {name: module for name, module in model.named_modules() if name}
    found: dict[torch.nn.Module, str] = {}
    for pattern in modules:
        matched = {module: name for name, module in named.items() if fnmatchcase(name, pattern)}
        if not matched:
            advice = did_you_mean(pattern, named) or f"it has {', '.join([*named][:20])}"
            raise PipelineConfigError(f"{pattern!r} matches no module of the model; {advice}")
        found |= matched
    inner = {child for module in found for child in module.modules() if child is not module}
    # Not traced: the repetition is another graph. Graphs of the module's own code are compiled.
    checkpointed = torch.compiler.disable(_checkpointed, recursive=False)
    for module in found:
        if module not in inner:  # its outer module computes it again
            module.forward = partial(checkpointed, module.forward)


def _call_own_method(model: torch.nn.Module) -> None:
    for kind in _KINDS:
        if callable(enable := getattr(model, f"{kind}_checkpointing_enable", None)):
            option = f"{kind}_checkpointing_kwargs"
            has_option = option in inspect.signature(enable).parameters
            enable(**({option: {"use_reentrant": False}} if has_option else {}))
            return
    raise PipelineConfigError(
        f"{type(model).__name__} has no gradient_checkpointing_enable(); name the modules by "
        "patterns, such as ['blocks.*']"
    )


def _checkpointed(forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call a module's forward method; a copy of the module has a copy of the method."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    module: torch.nn.Module = forward.__self__  # type: ignore[attr-defined]  # a bound method
    options: dict[str, Any] = {}
    if next(module.buffers(), None) is not None:
        options["context_fn"] = partial(_buffer_contexts, module)
    # Keyword arguments travel in a positional one: torch saves the RNG states of the devices there.
    return checkpoint(_call, forward, args, kwargs, use_reentrant=False, **options)


def _call(forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return forward(*args, **kwargs)


def _buffer_contexts(
    module: torch.nn.Module,
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return contexts of the forward pass and of its repetition.

    The repetition sees copies of the buffers from before the forward pass, such as the running
    statistics of batch normalization, and changes only the copies.
    """
    copies = [
        (owner, name, buffer.clone())
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
    ]
    return nullcontext(), _with_buffers(copies)


@contextmanager
def _with_buffers(copies: Sequence[tuple[torch.nn.Module, str, torch.Tensor]]) -> Iterator[None]:
    current = [getattr(owner, name) for owner, name, _ in copies]
    for owner, name, copy in copies:
        setattr(owner, name, copy)
    try:
        yield
    finally:
        for (owner, name, _), buffer in zip(copies, current, strict=True):
            setattr(owner, name, buffer)
