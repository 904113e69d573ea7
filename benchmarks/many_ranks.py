"""Cost of the job's own protocols by the number of ranks, up to 4,096.

Simulated ranks live in this process and make the requests of real ranks over several connections to
a real `TCPStore` in another process. Exchanges between simulated ranks return equal rows for every
rank without a network, so their rows are the CPU time of one rank. Run real gloo processes by
`python -m benchmarks.many_ranks --processes 8`; 64 work, and need a minute on two cores.
"""

import argparse
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from time import perf_counter, thread_time
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import psutil  # type: ignore[import-untyped]  # accelerate brings it
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # documented

from benchmarks.environment import describe
from benchmarks.report import Report, Row, Table
from benchmarks.timing import Spread
from robo_orchard_core.utils.process_identity import ProcessIdentity
from robo_orchard_lab.pipeline.checkpoint.manifest import (
    FileEntry,
    Manifest,
    ReadLimits,
    parse_manifest,
)
from robo_orchard_lab.pipeline.distributed import agreement, job_store
from robo_orchard_lab.pipeline.distributed.agreement import Agreement
from robo_orchard_lab.pipeline.distributed.failure_watch import LostRankDetector
from robo_orchard_lab.pipeline.distributed.job_store import (
    JobStore,
    RankPosition,
    find_diverged_rank,
)
from robo_orchard_lab.pipeline.metrics import MetricsBoard, WeightedSum
from robo_orchard_lab.pipeline.trainer import rank_consistency

RANKS = (2, 8, 64, 512, 4096)
CONNECTIONS = 8
LOOK_S = 0.5  # between two looks of a rank's watch
LOG_S = 15.0  # between two logging points: 50 steps of 300 ms
STEP_S = 0.3
BAR = 0.01  # of a step
_SERVER = """
import sys
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


def run(*, quick: bool) -> Report:
    counts = RANKS[:3] if quick else RANKS
    with ExitStack() as stack:
        server = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(server.wait)
        stack.callback(server.kill)
        assert server.stdout is not None
        port = int(server.stdout.readline())
        watched = {count: _watch(count, port, server.pid) for count in counts}
    tables = [
        Table(
            "CPU of a rank's watch: heartbeats, failures, positions",
            f"us per look, every {LOOK_S} s",
            [
                Row(f"{who}, {count:,} ranks", _exactly(watched[count][who] * 1e6), bar=bar)
                for who in ("first rank", "another rank")
                for count in counts
                for bar in [LOOK_S * BAR * 1e6]
            ],
            [f"The bar is {BAR:.0%} of a core; it is the share of a step of any length."],
        ),
        Table(
            "Store: time that all ranks' looks occupy it",
            f"% of the {LOOK_S} s between two looks",
            [
                Row(
                    f"{count:,} ranks",
                    _exactly(100 * watched[count]["store"] / LOOK_S),
                    note=f"{watched[count]['requests'] / LOOK_S:,.0f} requests a second",
                )
                for count in counts
            ],
            ["CPU time of the process that hosts the store: the launcher, or the first rank."],
        ),
        _by_ranks("CPU of an exchange of agreed numbers", "us", counts, _agree, 1e6),
        _by_ranks(
            "CPU of a logging point with 14 metrics",
            f"ms, every {LOG_S:.0f} s in a run of {STEP_S} s a step",
            counts,
            _log,
            1e3,
            bar=LOG_S * BAR * 1e3,
        ),
        _by_ranks("Start-up: store entries of all ranks, by the first rank", "ms", counts, _join),
        _by_ranks("Start-up: comparison of the ranks' settings", "ms", counts, _compare),
        _by_ranks("Commit: time to write and verify the manifest", "ms", counts, _commit),
        Table(
            "Commit: size of the manifest",
            "KiB",
            [
                Row(f"{count:,} ranks", _exactly(len(_manifest(count).to_bytes()) / 1024))
                for count in counts
            ],
            [f"At most {ReadLimits().max_manifest_bytes // 1024:,} KiB are read (ReadLimits)."],
        ),
        _notice(),
    ]
    return Report("many_ranks", tables, environment=describe(["torch"]))


def _exactly(number: float) -> Spread:
    return Spread(number, number, number)


def _by_ranks(
    title: str,
    unit: str,
    counts: tuple[int, ...],
    measure: Callable[[int], list[float]],
    scale: float = 1e3,
    bar: float | None = None,
) -> Table:
    rows = [Row.of(f"{count:,} ranks", measure(count), scale=scale, bar=bar) for count in counts]
    return Table(title, unit, rows)


def _repeat(call: Callable[[], object], times: int = 7) -> list[float]:
    call()
    taken = []
    for _ in range(times):
        began_at = thread_time()
        call()
        taken.append(thread_time() - began_at)
    return taken


def _connect(port: int) -> Any:
    return TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=30))


def _processes(count: int) -> list[ProcessIdentity]:
    """Return this process, and ranks on other machines, 8 on each."""
    own = ProcessIdentity.own()
    return [
        own if rank == 0 else own.model_copy(update={"host": f"machine-{rank // 8}"})
        for rank in range(count)
    ]


def _watch(count: int, port: int, server: int) -> dict[str, float]:
    """Let all simulated ranks look once in turn; return CPU seconds of ranks and of the store."""
    connections: list[Any] = [
        PrefixStore(str(count), _connect(port)) for _ in range(min(count, CONNECTIONS))
    ]
    processes = _processes(count)
    stores = [
        JobStore(connections[rank % len(connections)], rank, processes) for rank in range(count)
    ]
    keys = [f"{kind}/{rank}" for kind in ("beat", "position") for rank in range(count)]
    values = ["0 0"] * count + [json.dumps(RankPosition())] * count
    connections[0].multi_set(keys, values)
    # Building the detector of each of 4,096 ranks looks at all processes; three kinds are enough.
    detectors = {rank: LostRankDetector(stores[rank]) for rank in {0, 1, count - 1}}
    of_others = {rank: sorted({0, (rank + 1) % count} - {rank}) for rank in range(count)}
    own: dict[str, list[float]] = {"first rank": [], "another rank": []}
    of_store: list[float] = []
    process = psutil.Process(server)
    for step in range(1, 6):
        before = sum(process.cpu_times()[:2])
        for rank, store in enumerate(stores):
            began_at = thread_time()
            store.beat()
            assert store.failure(1) is None
            if rank in detectors:
                assert detectors[rank].look(1) is None
                ranks = detectors[rank].ranks
            else:
                ranks = of_others[rank]
                store.beats(ranks)
            store.set_position(RankPosition(1, step))
            assert find_diverged_rank(store.positions(ranks), 1) is None
            if rank in detectors:
                who = "another rank" if rank else "first rank"
                own[who].append(thread_time() - began_at)
        of_store.append(sum(process.cpu_times()[:2]) - before)
    return {
        **{who: median(taken) for who, taken in own.items()},
        "store": median(of_store),
        "requests": 5.0 * count,
    }


def _agree(count: int) -> list[float]:
    exchange = Agreement(0, count, every=1)
    for name in ("signal", "time limit", "stop"):
        exchange.topic(name, find=lambda: 0, tell=lambda number: None)

    def rows(numbers: list[int]) -> list[list[int]]:
        own = torch.tensor(numbers).numpy()
        found: list[list[int]] = own[None].repeat(count, 0).tolist()
        return found

    with patch.object(agreement, "gather_numbers", rows):
        return _repeat(lambda: exchange.settle(1))


class _Ranks:
    """Stand-in for an accelerator with many processes."""

    device = torch.device("cpu")

    def __init__(self, count: int) -> None:
        self.num_processes = count


def _log(count: int) -> list[float]:
    """Time a logging point; memory for the rows of all ranks is part of it."""

    def all_gather(rows: list[torch.Tensor], own: torch.Tensor, **options: Any) -> None:
        for row in rows:
            row.copy_(own)

    board, ranks = MetricsBoard(), _Ranks(count)

    def flush() -> None:
        for index in range(13):
            board.publish(f"perf/value_{index}", 1.0 * index)
        total = WeightedSum()
        total.add(torch.tensor(0.5), 8)
        board.publish_total("loss/total", total)
        record = board.flush(log=True, accelerator=ranks)
        assert record is not None
        assert len(record.values) == 14

    with patch.object(dist, "all_gather", all_gather):
        return _repeat(flush, 3)


def _join(count: int) -> list[float]:
    """Time the entries that the first rank makes for all ranks, in its own store."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    of_ranks = [process.model_dump() for process in _processes(count)]

    def gathered(value: tuple[str, object]) -> list[tuple[str, object]]:
        return [(value[0], process) for process in of_ranks]

    with (
        patch.object(dist, "get_rank", lambda: 0),
        patch.object(dist, "get_world_size", lambda: count),
        patch.object(dist, "group", SimpleNamespace(WORLD=_Group(store))),
        patch.object(job_store, "gather_objects", gathered),
    ):
        began = []
        for _ in range(3):
            began_at = perf_counter()
            LostRankDetector(JobStore.of_job())
            began.append(perf_counter() - began_at)
        return began


class _Group:
    def __init__(self, store: Any) -> None:
        self._store = store

    def get_group_store(self) -> Any:
        return self._store


def _compare(count: int) -> list[float]:
    """Compare six descriptions; each rank sends a digest of each."""
    parts = {f"part {index}": "setting: value\n" * 200 for index in range(6)}
    with patch.object(rank_consistency, "gather_objects", lambda value: [value] * count):
        return _repeat(lambda: rank_consistency.check_rank_consistency(parts))


def _manifest(count: int) -> Manifest:
    digits = random.Random(0)

    def entry() -> FileEntry:
        return FileEntry(digits.randrange(1 << 20), f"{digits.getrandbits(128):032x}")

    of_job = ("model.safetensors", "optimizer.safetensors", "optimizer.json", "trainer.json")
    of_ranks = [
        f"state.rank{rank:05d}.{kind}" for rank in range(count) for kind in ("json", "safetensors")
    ]
    return Manifest(
        step=1,
        serial=1,
        saved_at=datetime.now(UTC),
        ranks=count,
        digest_name="xxh3_128",
        metrics={},
        metadata={},
        files={name: entry() for name in sorted([*of_job, *of_ranks])},
    )


def _commit(count: int) -> list[float]:
    manifest, limits = _manifest(count), ReadLimits()
    return _repeat(lambda: parse_manifest(manifest.to_bytes(), limits), 3)


def _notice() -> Table:
    """Count the looks until a rank's death is reported; the number of ranks does not matter."""
    own = ProcessIdentity.own()
    looks = {}
    for where in ("on this machine", "on another machine"):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        identity = own.model_copy(
            update={"pid": child.pid, "started_at": psutil.Process(child.pid).create_time()}
        )
        if where == "on another machine":
            identity = identity.model_copy(update={"host": "elsewhere"})
        store: Any = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        store.multi_set(["beat/0", "beat/1"], ["0 0", "0 0"])
        detector = LostRankDetector(JobStore(store, 0, [own, identity]))
        assert detector.look(1) is None
        child.kill()
        child.wait()
        looks[where] = next(number for number in range(1, 1000) if detector.look(1) is not None)
    rows = [
        Row(f"dead rank {where}", _exactly(count * LOOK_S), note=f"{count} looks")
        for where, count in looks.items()
    ]
    note = "Other ranks read the report at their next look, which is at most 0.5 s later."
    return Table("Time until a dead rank is noticed", "s, at most", rows, [note])


# --- real processes --------------------------------------------------------------------------


def measure_processes(count: int) -> dict[str, float]:
    """Return wall-clock milliseconds of the protocols between real gloo processes."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        fork = multiprocessing.get_context("fork")
        ranks = [
            fork.Process(target=_rank, args=(rank, count, folder, found)) for rank in range(count)
        ]
        for each in ranks:
            each.start()
        for each in ranks:
            each.join()
        results: dict[str, float] = json.loads(found.read_text())
        return results


def _rank(rank: int, count: int, folder: str, result: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count))
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/rendezvous", count)  # type: ignore[attr-defined]
    began_at = perf_counter()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    taken = {"process group": [perf_counter() - began_at]}
    barrier: Any = dist.barrier  # untyped
    destroy: Any = dist.destroy_process_group
    parts = {"settings": "setting: value\n" * 200}
    exchange = Agreement(rank, count, every=1)
    exchange.topic("signal", find=lambda: 0, tell=lambda number: None)
    board, ranks = MetricsBoard(), _Ranks(count)

    def log() -> None:
        for index in range(14):
            board.publish(f"perf/value_{index}", 1.0 * index)
        board.flush(log=True, accelerator=ranks)

    calls: list[tuple[str, Callable[[], object], int]] = [
        ("comparison of settings", lambda: rank_consistency.check_rank_consistency(parts), 3),
        ("agreement", lambda: exchange.settle(1), 20),
        ("logging point", log, 5),
    ]
    for name, call, times in calls:
        taken[name] = []
        for _ in range(times):
            barrier()
            began_at = perf_counter()
            call()
            taken[name].append(perf_counter() - began_at)
    barrier()
    if rank == 0:
        result.write_text(json.dumps({name: median(all_) * 1e3 for name, all_ in taken.items()}))
    destroy()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_ranks", description=__doc__)
    parser.add_argument("--processes", type=int, required=True, help="number of gloo processes")
    for name, milliseconds in measure_processes(parser.parse_args().processes).items():
        print(f"{name:24} {milliseconds:8.2f} ms")


if __name__ == "__main__":
    main()
