"""Script of ``test_exchange.py`` on each rank: publish, read, write the values to a file.

Every call into torch.distributed is counted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from launching import end_group
from robo_orchard_lab.pipeline.metrics import MetricsBoard
from robo_orchard_lab.pipeline.metrics.exchange import StateReduction

COLLECTIVES = ("all_gather_into_tensor", "all_gather", "all_reduce", "broadcast", "barrier")


class Counts:
    """States with every kind of reduction, different on each rank."""

    def __init__(self, rank: int, rows: int) -> None:
        self._states: list[tuple[torch.Tensor, StateReduction]] = [
            (torch.tensor(2**53 + rank), "sum"),
            (torch.tensor([1.0, float(rank)], dtype=torch.bfloat16), "max"),
            (torch.arange(rows, dtype=torch.int32) + 10 * rank, "cat"),
            (torch.tensor([rank == 1]), None),
        ]

    def names(self) -> list[str]:
        return ["eval/val/count", "eval/val/rows"]

    def states(self) -> list[tuple[torch.Tensor, StateReduction]]:
        return self._states

    def values(self, reduced: Any) -> dict[str, float]:
        count, largest, rows, stacked = reduced
        assert largest.tolist() == [1.0, 1.0]
        assert stacked.tolist() == [[False], [True]]
        assert rows.dtype == torch.int32
        return {"eval/val/count": count.item() - 2**54, "eval/val/rows": float(rows.sum())}


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    calls: list[str] = []
    for name in COLLECTIVES:
        setattr(torch.distributed, name, _counted(getattr(torch.distributed, name), calls))

    board = MetricsBoard()
    received: list[float] = []
    board.subscribe("both", lambda value: received.append(value.value))
    points: list[Any] = []

    def logging_point() -> None:
        calls.clear()
        record = board.flush(log=True, accelerator=accelerator)
        assert record is not None
        points.append([{value.name: value.value for value in record.values}, list(calls)])

    # Batches of different sizes: 3 samples of value 1 on the first rank, 1 of value 5 on the other.
    board.publish("both", torch.tensor(1.0 + 4 * rank), weight=3 - 2 * rank)
    board.publish("numbers", 1.0 + 4 * rank, weight=torch.tensor(3 - 2 * rank))
    board.publish("highest", float(rank), reduce="max")
    board.publish("lowest", torch.tensor(rank, dtype=torch.int64), reduce="min")
    board.publish("total", torch.tensor(True), reduce="sum")
    board.publish("first", 7.0 + rank, reduce="last")
    if rank == 1:
        board.publish("only/second", torch.tensor(0.5, dtype=torch.float16))
    board.defer(Counts(rank, rows=2 + rank))
    logging_point()
    logging_point()  # no new values
    for value in range(3):
        board.publish("both", torch.tensor(float(value)))
        if rank == 0:
            board.publish("only/first", value)
    logging_point()
    for index in range(3000):  # exceeds the initial buffer
        board.publish(f"many/{index}", torch.tensor(float(rank)))
    logging_point()
    for index in range(3000):
        board.publish(f"many/{index}", torch.tensor(float(rank)))
    logging_point()
    (folder / f"rank{rank}.json").write_text(json.dumps({"points": points, "received": received}))
    end_group()


def _counted(function: Any, calls: list[str]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(function.__name__)
        return function(*args, **kwargs)

    return call


if __name__ == "__main__":
    main(Path(sys.argv[1]))
