"""Script of ``test_observers.py`` on each rank: train without and with hooks, count collectives."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from observed import make_observed_trainer, observing_hooks
from robo_orchard_lab.testing import count_collectives


def train(hooks: list[Any]) -> Any:
    trainer = make_observed_trainer(hooks, max_step=200, buffers=False)
    with count_collectives() as calls:
        trainer()
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    return trainer.accelerator, weights.tolist(), [call.what for call in calls]


def main(folder: Path) -> None:
    _, bare, without = train([])
    accelerator, weights, collectives = train(observing_hooks(folder, "50 steps", "5 steps"))
    added = Counter(collectives)
    added.subtract(without)  # Accelerate synchronizes the shuffling once per epoch
    result = {"added": {**+added}, "weights": weights, "bare": bare}
    (folder / f"rank{accelerator.process_index}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
