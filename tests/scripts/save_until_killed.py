"""Fork a child for each line "go ROOT START" that saves repeatedly until it is killed.

Output of a child: "pid P", then "saved N" once save N is acknowledged. "ended" follows its end.
Forking from one process starts each child at once.
"""

from __future__ import annotations

import os
import sys

import torch

from robo_orchard_lab.pipeline.checkpoint import CheckpointStore, Retention

STEPS = 5
"""Steps repeat, so that checkpoints are replaced as well as removed."""


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def save_again_and_again(root: str, number: int) -> None:
    with CheckpointStore(root, retention=Retention(keep_last=3)) as store:
        while True:
            number += 1
            weights = {"a": torch.full((400_000,), float(number)), "b": torch.tensor(number)}
            pending = store.prepare(
                number % STEPS, {"model": weights, "trainer": number}, {"random": [number]}
            )
            pending.commit()
            say(f"saved {number}")


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        _, root, start = line.split()
        child = os.fork()
        if child == 0:
            say(f"pid {os.getpid()}")
            try:
                save_again_and_again(root, int(start))
            finally:
                os._exit(1)
        os.waitpid(child, 0)
        say("ended")


if __name__ == "__main__":
    main()
