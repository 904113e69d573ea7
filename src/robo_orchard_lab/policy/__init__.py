"""Policies for manipulation: from observations to chunks of actions, and to a success rate.

- `policy`: interface of policies, normalization of observations and actions by the statistics of a
  dataset, and the batch processor `PolicyProcessor`
- `behavior_cloning`: `BehaviorCloning`, an MLP
- `diffusion`: `DiffusionPolicy`, a 1-D temporal U-Net that denoises actions
- `act`: `ACT`, a transformer on camera images
- `rollouts`: `rollout`, episodes in vectorised environments, with their success rate
- `environment_pool`, `environment_worker`: environments in worker processes
- `rollout_evaluation`: `RolloutEvaluation`, the hook
- `pretrained`: `save_policy`, `load_policy`, `export_policy`
- `samples`: `Reach`, an environment without a simulator

Names are imported on first use: workers of rollouts import neither torch nor the trainer.
"""

from typing import TYPE_CHECKING

from robo_orchard_core.utils.lazy_exports import lazy_exports

_MODULE_OF = {
    "ACT": "act",
    "BehaviorCloning": "behavior_cloning",
    "DiffusionPolicy": "diffusion",
    "Episode": "rollouts",
    "Normalizer": "policy",
    "Policy": "policy",
    "PolicyProcessor": "policy",
    "Reach": "samples",
    "RolloutError": "environment_pool",
    "RolloutEvaluation": "rollout_evaluation",
    "RolloutEvaluationConfig": "rollout_evaluation",
    "RolloutResult": "rollouts",
    "export_policy": "pretrained",
    "load_policy": "pretrained",
    "rollout": "rollouts",
    "save_policy": "pretrained",
}

__all__ = sorted(_MODULE_OF)

if TYPE_CHECKING:
    from robo_orchard_lab.policy.act import ACT as ACT
    from robo_orchard_lab.policy.behavior_cloning import BehaviorCloning as BehaviorCloning
    from robo_orchard_lab.policy.diffusion import DiffusionPolicy as DiffusionPolicy
    from robo_orchard_lab.policy.environment_pool import RolloutError as RolloutError
    from robo_orchard_lab.policy.policy import Normalizer as Normalizer
    from robo_orchard_lab.policy.policy import Policy as Policy
    from robo_orchard_lab.policy.policy import PolicyProcessor as PolicyProcessor
    from robo_orchard_lab.policy.pretrained import export_policy as export_policy
    from robo_orchard_lab.policy.pretrained import load_policy as load_policy
    from robo_orchard_lab.policy.pretrained import save_policy as save_policy
    from robo_orchard_lab.policy.rollout_evaluation import RolloutEvaluation as RolloutEvaluation
    from robo_orchard_lab.policy.rollout_evaluation import (
        RolloutEvaluationConfig as RolloutEvaluationConfig,
    )
    from robo_orchard_lab.policy.rollouts import Episode as Episode
    from robo_orchard_lab.policy.rollouts import RolloutResult as RolloutResult
    from robo_orchard_lab.policy.rollouts import rollout as rollout
    from robo_orchard_lab.policy.samples import Reach as Reach
else:
    __getattr__ = lazy_exports(__name__, _MODULE_OF)
