"""Counting what the processes of a job exchange."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from robo_orchard_lab.testing.call_site import TracedCall, trace_call

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
