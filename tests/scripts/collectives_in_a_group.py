"""Script of test_counting.py: collectives in a process group of one rank."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import all_reduce as known_by_another_name

from launching import end_group
from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks
from robo_orchard_lab.testing import count_collectives, run_hook


def main(file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    tensor = torch.ones(2)
    no_tensor: Any = "no tensor"
    gathered: list[Any] = [None]
    original = dist.all_reduce
    with count_collectives() as calls:
        dist.all_reduce(tensor)
        known_by_another_name(tensor)
        dist.all_gather([torch.empty(2)], tensor)
        dist.all_gather_into_tensor(torch.empty(2), tensor)
        dist.all_gather_object(gathered, {"a": 1})
        dist.broadcast(tensor, src=0)
        dist.broadcast_object_list([1], src=0)
        dist.reduce(tensor, dst=0)
        dist.gather(tensor, [torch.empty(2)])
        dist.scatter(tensor, [torch.ones(2)])
        dist.barrier()
        dist.get_world_size()
        with suppress(TypeError):
            dist.all_reduce(no_tensor)  # fails, and is counted
        dist.distributed_c10d.all_reduce(tensor)
    for call in calls:
        print(call.what, call.places[0].function)
    assert dist.all_reduce is known_by_another_name is original
    dist.all_reduce(tensor)
    assert len(calls) == 13  # no more once it is over

    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))
    with count_collectives() as calls:
        model(torch.ones(3, 2)).sum().backward()
    print("DDP:", *(call.what for call in calls))

    hooks = PipelineHooks("planted")

    @hooks.on_step.after(when="2 steps")
    def exchange(args: PipelineHookArgs) -> None:
        assert args.loss is not None
        dist.all_reduce(args.loss)

    with count_collectives() as calls:
        run_hook(hooks, steps=4)
    print(*calls, sep="\n")
    end_group()


if __name__ == "__main__":
    main(sys.argv[1])
