"""Hyperparameter search over Optuna: many runs of one experiment file, each in its own run folder.

- `space`: the search space of a sweep, a validated file.
- `storage`: the study's database; recovery of trials that lost their process.
- `sweep`: trials in child processes, several at a time.
- `trial_hook`: hook of a trial's run that reports values and stops pruned trials.
- `results`: ranking, importance of parameters, page.

Requires the extra ``search``: ``pip install "robo-orchard-hooks[search]"``.
"""

from robo_orchard_lab.search.space import Dimension, SweepSpace
from robo_orchard_lab.search.trial_hook import SweepTrial, SweepTrialConfig

__all__ = ["Dimension", "SweepSpace", "SweepTrial", "SweepTrialConfig"]
