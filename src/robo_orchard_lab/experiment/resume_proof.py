"""What processes build that prove an experiment to go on exactly where it was stopped."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robo_orchard_lab.experiment.config import ExperimentConfig
from robo_orchard_lab.experiment.trust_settings import ExperimentTrust
from robo_orchard_lab.pipeline import HookBasedTrainer


def build(
    run_folder: Path,
    resume_from: str | os.PathLike[str] | None,
    document: Mapping[str, Any],
    trust: Sequence[str],
) -> HookBasedTrainer:
    """The trainer of an experiment, for `robo_orchard_lab.testing.prove_resume`.

    Args:
        run_folder: of this run.
        resume_from: as `prove_resume` says.
        document: of the experiment, as plain data.
        trust: names of packages and classes.
    """
    trusted = ExperimentTrust.of(trust, pyproject=False)
    trusted.find_local_modules()
    experiment = ExperimentConfig.from_dict(document, trust=trusted.trust)
    return experiment.build(run_folder=run_folder, resume=resume_from or "never").trainer


def spread_stops(steps: int, stops: int) -> list[int]:
    """So many stops, evenly spread within a run of so many steps.

    >>> spread_stops(20, 3), spread_stops(3, 5)
    ([5, 10, 15], [1, 2])
    """
    found = {round(steps * (number + 1) / (stops + 1)) for number in range(stops)}
    return sorted(stop for stop in found if 0 < stop < steps)
