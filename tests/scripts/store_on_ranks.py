"""Script for every rank under torchrun: save and load together, and write the results."""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launching import end_group
from robo_orchard_lab.pipeline.checkpoint import (
    CheckpointStore,
    Ranks,
    Retention,
    load_checkpoint,
    save_checkpoint,
)


def error_of(call: Callable[[], Any]) -> list[str]:
    """Return the type and text of the call's error, or an empty list."""
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


def own(rank: int) -> dict[str, Any]:
    return {"random": {"stream": torch.full((4,), rank)}, "data": {"rank": rank}}


def rank_of(index: int, count: int, of_rank: Mapping[str, Any]) -> list[int]:
    return [index, count, of_rank["data"]["rank"]]


def in_the_background(store: CheckpointStore, rank: int) -> float:
    """Return the result of all-reduces that run while a thread saves."""
    pending = store.prepare(2, {"model": {"w": torch.full((1 << 20,), 2.0)}}, own(rank))
    thread = threading.Thread(target=pending.commit)
    thread.start()
    total = torch.zeros(1)
    for _ in range(50):
        one = torch.ones(1)
        dist.all_reduce(one)
        total += one
    thread.join()
    return float(total)


def cannot_write(store: CheckpointStore, rank: int) -> list[str]:
    """Fail to save as on a full disk of the second rank."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        big = {"random": {"stream": torch.zeros(10_000)}}
        return error_of(lambda: store.save(3, {"model": {"w": torch.ones(2)}}, big))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    ranks, rank = Ranks.of_job(), dist.get_rank()
    found: dict[str, Any] = {}
    root = folder / "run"
    with CheckpointStore(root, ranks=ranks) as store:
        saved = store.save(1, {"model": {"w": torch.ones(2)}, "trainer": rank}, own(rank))
        found["saved"] = [saved.step, saved.serial, saved.ranks, saved.path.name]
        state = store.load("last")
        found["loaded"] = [state.parts["trainer"], state.rank_parts["data"]["rank"]]
        found["stream"] = state.rank_parts["random"]["stream"].tolist()
        found["exchanged"] = in_the_background(store, rank)
        found["second"] = float(store.load(2).parts["model"]["w"].sum())
        bad = {"data": object() if rank == 1 else 1}
        found["bad_value"] = error_of(lambda: store.save(3, {}, bad))
        found["cannot_write"] = cannot_write(store, rank)
        dist.barrier()  # the first rank has cleaned up
        found["names"] = sorted(os.listdir(root))
        found["no_step"] = error_of(lambda: store.load(7))
        if rank == 0:
            (root / "step_00000002" / "data.rank00001.json").write_text('{"rank": 7}')
        dist.barrier()
        newest = store.load_newest()
        assert newest is not None
        found["newest"] = [newest.info.step, [path.name for path, _ in newest.skipped]]
        found["verified"] = [item.problem is None for item in store.verify()]
        other = CheckpointStore(root, ranks=ranks)
        found["locked"] = error_of(other.open)[:1]
    alone = save_checkpoint(folder / "one", 5, {"trainer": 1}, own(rank), ranks=ranks)
    found["one"] = load_checkpoint(alone.path, ranks=ranks).rank_parts["data"]["rank"]
    found["exists"] = error_of(lambda: save_checkpoint(alone.path, 5, {}, ranks=ranks))[:1]
    if rank == 0:
        save_checkpoint(folder / "of_one", 5, {"trainer": 1}, own(0))
    dist.barrier()
    fewer = load_checkpoint(folder / "of_one", ranks=ranks, each_rank=rank_of)
    found["fewer"] = {"data": fewer.rank_parts["data"]}
    found["of_ranks"] = list(fewer.rank_results)
    store = CheckpointStore(root, ranks=ranks, retention=Retention(keep_last=1))
    with store:
        found["pruned"] = [decision.removed for decision in store.prune()]
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    end_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
