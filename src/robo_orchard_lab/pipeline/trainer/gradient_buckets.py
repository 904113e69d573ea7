"""In which pieces the gradients of several processes are added up."""

from __future__ import annotations

import torch
from torch.nn.parallel import DistributedDataParallel


def settle_buckets(ddp: DistributedDataParallel) -> None:
    """Have DDP divide the gradients, before the first step, into the buckets that it then keeps.

    By itself it divides them anew after its first backward pass, by the order in which they came.
    A run that is resumed would do so after its first step, where the run that never stopped has
    done it long ago; and where three ranks or more add up, the place in a bucket says in which
    order, and so how a sum is rounded. Settled from the start, in the reverse order of the model's
    parameters, a resumed run rounds as the other one does.

    It takes one backward pass of nothing and its exchange: a collective. The parameters have no
    gradients afterwards. Nothing is done where DDP never divides anew (``find_unused_parameters``),
    where a hook of its own adds up, or where gradients are sparse or left to the end.
    """
    parameters = [p for p in ddp.module.parameters() if p.requires_grad]
    others = (
        ddp.find_unused_parameters
        or ddp.static_graph
        or getattr(ddp, "_comm_hooks", None)
        or getattr(ddp, "_delay_all_reduce_params", None)
        or getattr(ddp, "_use_python_reducer", False)
        or any(getattr(module, "sparse", False) for module in ddp.module.modules())
    )
    if others or not parameters:
        return
    device = parameters[0].device
    with torch.enable_grad():
        ddp.reducer.prepare_for_backward([])
        # What is made last is differentiated first, so that these come in the reverse order.
        pieces = [p.reshape(-1)[:1].abs().sum().to(device, torch.float32) for p in parameters]
        (torch.stack(pieces).sum() * 0).backward()
    for parameter in parameters:
        parameter.grad = None
