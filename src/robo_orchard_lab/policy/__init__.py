"""Policies for manipulation: from observations to chunks of actions.

- `policy`: interface of policies, and the batch processor `PolicyProcessor`
- `normalization`: normalization of observations and actions by the statistics of a dataset
- `behavior_cloning`: `BehaviorCloning`, an MLP
- `diffusion`, `temporal_unet`: `DiffusionPolicy`, a 1-D temporal U-Net that denoises actions
- `act`: `ACT`, a transformer on camera images
"""

from robo_orchard_lab.policy.act import ACT
from robo_orchard_lab.policy.behavior_cloning import BehaviorCloning
from robo_orchard_lab.policy.diffusion import DiffusionPolicy
from robo_orchard_lab.policy.normalization import Normalizer
from robo_orchard_lab.policy.policy import Policy, PolicyProcessor

__all__ = [
    "ACT",
    "BehaviorCloning",
    "DiffusionPolicy",
    "Normalizer",
    "Policy",
    "PolicyProcessor",
]
