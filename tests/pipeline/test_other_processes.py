"""A run goes on in another number of processes as the run of one process that never stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import elastic_run
from robo_orchard_lab.pipeline.sinks import read_metrics
from robo_orchard_lab.testing.resume.fork_server import ForkServer


@pytest.fixture(scope="module")
def servers() -> Iterator[list[ForkServer]]:
    servers = [ForkServer(elastic_run.run, ["torch._dynamo", "torchmetrics"]) for _ in range(3)]
    yield servers
    for server in servers:
        server.close()


def start(servers: list[ForkServer], folder: Path, ranks: int, **order: Any) -> str:
    """Run all ranks to their end; what the first that failed has printed, empty if none did."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"part{len([*folder.glob('part*-0.log')])}"
    order |= {"folder": str(folder), "name": name, "ranks": ranks}
    order["meeting"] = str(folder / f"{name}.meeting")

    def run(rank: int) -> int:
        return servers[rank].run({**order, "rank": rank}, folder / f"{name}-{rank}.log", 120)

    with ThreadPoolExecutor(ranks) as threads:
        codes = [*threads.map(run, range(ranks))]
    failed = [rank for rank, code in enumerate(codes) if code]
    return (folder / f"{name}-{failed[0]}.log").read_text() if failed else ""


def run_in_parts(
    servers: list[ForkServer], folder: Path, ranks: list[int], stops: list[int], **order: Any
) -> None:
    """Each part in as many ranks as said, up to a stop, the last to the end."""
    for seed, (count, stop) in enumerate(zip(ranks, [*stops, None], strict=True), start=5):
        assert start(servers, folder, count, stop_after=stop, seed=seed, **order) == ""


def lines(folder: Path, kind: str) -> Iterator[tuple[int, int, int, Any]]:
    """What was written down: the part, the rank, the step, and it."""
    for path in sorted(folder.glob("part*-*.jsonl")):
        part, rank = path.stem.removeprefix("part").split("-")
        for found, step, value in map(json.loads, path.read_text().splitlines()):
            if found == kind:
                yield int(part), int(rank), step, value


def samples(folder: Path) -> dict[int, list[Any]]:
    """Index and content of the samples of each step, rank after rank."""
    steps: dict[int, list[Any]] = {}
    for _, _, step, value in lines(folder, "samples"):
        steps.setdefault(step, []).extend(value)
    return dict(sorted(steps.items()))


def check_like(straight: Path, folder: Path) -> None:
    """The run in one folder has done what that in the other has."""
    assert samples(folder) == samples(straight)
    expected, found = (read_metrics(path / "metrics.jsonl") for path in (straight, folder))
    assert [
        (r.epoch_id, r.global_step_id, r.optimizer_step_id, [(v.name, v.step) for v in r.values])
        for r in found
    ] == [
        (r.epoch_id, r.global_step_id, r.optimizer_step_id, [(v.name, v.step) for v in r.values])
        for r in expected
    ]
    for one, other in zip(found, expected, strict=True):
        for value, due in zip(one.values, other.values, strict=True):
            assert value.value == pytest.approx(due.value, rel=1e-6, abs=1e-6), (due, value)
    (first,) = straight.glob("part*-0.pt")
    last = max(folder.glob("part*-0.pt"))
    before, after = (torch.load(path, weights_only=True) for path in (first, last))
    assert after["progress"] == before["progress"]
    for name, weight in before["weights"].items():
        torch.testing.assert_close(after["weights"][name], weight, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def straight(servers: list[ForkServer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other_processes") / "straight"
    run_in_parts(servers, folder, [1], [])
    return folder


@pytest.mark.parametrize(
    ("ranks", "stops"),
    [
        pytest.param([1, 2, 1], [1, 5], id="within windows, 1 -> 2 -> 1"),
        pytest.param([2, 3, 2], [2, 4], id="within a window and between epochs, 2 -> 3 -> 2"),
        pytest.param([3, 1, 3], [3, 7], id="between windows, 3 -> 1 -> 3"),
    ],
)
def test_goes_on_in_other_numbers_of_processes(
    ranks: list[int],
    stops: list[int],
    servers: list[ForkServer],
    straight: Path,
    tmp_path: Path,
) -> None:
    """Samples, augmentation, counters, weights and lines of metrics are those of one process."""
    run_in_parts(servers, tmp_path / "parts", ranks, stops)
    check_like(straight, tmp_path / "parts")
